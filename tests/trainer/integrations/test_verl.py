"""The estimator in verl's registry, called as its V0 trainer calls it.

verl needs another transformers than the tests have, so where it is not installed its interface is a test double: the
registry, and the one function of verl's that ours calls. Against the real verl 0.9.1 these tests were run by hand.
"""

import importlib
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from mopo_kernels import InfeasibleThresholds

MODULE = "verl.trainer.ppo.core_algos"


def interface_of_verl():
    """A test double of verl.trainer.ppo.core_algos: what mopo_trainer.integrations.verl takes from it."""
    double = ModuleType(MODULE)
    double.ADV_ESTIMATOR_REGISTRY = {"gdpo": lambda **given: ("GDPO", given)}

    def compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, norm_adv_by_std_in_grpo=True):
        scores = token_level_rewards.sum(-1)
        for one in set(index):
            rows = torch.from_numpy(index == one)
            centred = scores[rows] - scores[rows].mean()
            scores[rows] = centred / (scores[rows].std() + 1e-6) if norm_adv_by_std_in_grpo else centred
        return scores[:, None] * response_mask, scores[:, None] * response_mask

    double.compute_grpo_outcome_advantage = compute_grpo_outcome_advantage
    return double


@pytest.fixture
def verl(monkeypatch):
    try:
        interface = importlib.import_module(MODULE)
    except ImportError:
        interface = interface_of_verl()
        for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, MODULE, interface)
    monkeypatch.setitem(interface.ADV_ESTIMATOR_REGISTRY, "gdpo", interface.ADV_ESTIMATOR_REGISTRY["gdpo"])
    monkeypatch.delitem(sys.modules, "mopo_trainer.integrations.verl", raising=False)
    importlib.import_module("mopo_trainer.integrations.verl")
    yield interface
    sys.modules.pop("mopo_trainer.integrations.verl")


def configuration(tmp_path, **changed):
    mopo = {"primary": "helpful", "thresholds": {"concise": 0.5}, "state": str(tmp_path / "multipliers.json")}
    keys = {"gdpo_reward_keys": ["helpful", "concise"], "norm_adv_by_std_in_grpo": False}
    return keys | {"mopo": {key: value for key, value in (mopo | changed).items() if value is not None}}


def advantage(verl, config, concise=(0.5, 0.0, 0.5, 0.0, 0.0, None), penalty=0.0):
    given = {"helpful": np.array([0, 1, 0.5, 0.5, 1, 0]), "concise": np.array(concise, dtype=object)}
    scores = torch.zeros(6, 3)
    estimator = verl.ADV_ESTIMATOR_REGISTRY["gdpo"]
    return estimator(
        token_level_rewards=scores - penalty * torch.eye(6, 3),
        response_mask=torch.ones(6, 3),
        index=np.array(["a", "b", "a", "b", "a", "b"], dtype=object),  # verl's batches are in any order
        config=config,
        non_tensor_batch=given,
        batch={"token_level_scores": scores},
    )[0][:, 0].tolist()


def test_advantages_are_those_of_the_score_and_multipliers_move(verl, tmp_path):
    config = configuration(tmp_path)
    assert advantage(verl, config) == pytest.approx([-0.5, 0.5, 0, 0, 0.5, -0.5])
    state = json.loads((tmp_path / "multipliers.json").read_text())
    price = 0.1 * (0.5 - 1 / 6)  # what is not scored takes the mean of its prompt: (0.5, 0.5, 0), (0, 0, –)
    assert state["multipliers"] == {"helpful": 1, "concise": pytest.approx(price)}
    expected = [-0.5 + price / 6, 0.5, price / 6, 0, 0.5 - price / 3, -0.5]
    assert advantage(verl, config) == pytest.approx(expected, abs=1e-6)


def test_what_is_not_scored_takes_no_side(verl, tmp_path):
    config = configuration(tmp_path, thresholds={"concise": 0.9})
    for _ in range(2):  # the multiplier is above 0 in the second batch
        found = advantage(verl, config, concise=(0.5, 1.0, 0.5, 1.0, 0.0, None))
    assert found[1::2] == pytest.approx([0.5, 0, -0.5], abs=1e-6)


def test_verls_kl_in_the_reward_counts(verl, tmp_path):
    """The first three responses are 0.3 farther from the reference: two of prompt a, one of prompt b."""
    found = advantage(verl, configuration(tmp_path), penalty=0.3)
    assert found == pytest.approx([-0.6, 0.3, -0.1, 0.1, 0.7, -0.4], abs=1e-6)


def test_another_process_goes_on_with_the_file(verl, tmp_path):
    config = configuration(tmp_path)
    advantage(verl, config)
    sys.modules["mopo_trainer.integrations.verl"]._dual.cache_clear()  # as a new process
    advantage(verl, config)
    state = json.loads((tmp_path / "multipliers.json").read_text())
    assert state["step"] == 2
    assert state["multipliers"]["concise"] == pytest.approx(0.2 * (0.5 - 1 / 6))


def test_what_is_refused(verl, tmp_path):
    with pytest.raises(ValueError, match="name the JSON file that keeps the multipliers"):
        advantage(verl, configuration(tmp_path, state=None))
    with pytest.raises(ValueError, match="primary must be one of the objectives helpful, concise; got 'kind'"):
        advantage(verl, configuration(tmp_path, primary="kind"))
    with pytest.raises(InfeasibleThresholds, match=r"'concise' must reach 1\.5"):
        advantage(verl, configuration(tmp_path, thresholds={"concise": 1.5}))
    with pytest.raises(ValueError, match=r"'concise' holds 0 to 3; give win rates, in \[0, 1\]"):
        advantage(verl, configuration(tmp_path), concise=(0, 1, 3, 0, 0, 0))
    with pytest.raises(ValueError, match="compute_score returns no 'kind'; it returns: helpful, concise"):
        advantage(verl, configuration(tmp_path, thresholds=None) | {"gdpo_reward_keys": ["helpful", "kind"]})
    advantage(verl, configuration(tmp_path))
    swapped = configuration(tmp_path) | {"gdpo_reward_keys": ["concise", "helpful"]}
    with pytest.raises(ValueError, match="its multipliers are of helpful, concise; name another file"):
        advantage(verl, swapped)


def test_without_thresholds_gdpo_is_verls_own(verl, tmp_path, monkeypatch):
    module = sys.modules["mopo_trainer.integrations.verl"]
    monkeypatch.setattr(module, "gdpo", lambda **given: ("verl's own", sorted(given)))
    found = module.mopo_advantage(torch.zeros(2, 1), torch.ones(2, 1), np.array([0, 0]), {}, batch=None)
    assert found == ("verl's own", ["batch", "config", "index", "response_mask", "token_level_rewards"])
