"""Thresholds in verl: its GDPO estimator, whose fixed weights of rewards become multipliers.

    VERL_USE_EXTERNAL_MODULES=mopo_trainer.integrations.verl python -m verl.trainer.main_ppo trainer.use_v1=false \\
        algorithm.adv_estimator=gdpo 'algorithm.gdpo_reward_keys=[helpful,concise]' \\
        +algorithm.mopo.primary=helpful +algorithm.mopo.thresholds.concise=0.5 \\
        +algorithm.mopo.state=checkpoints/multipliers.json ...

`compute_score` returns, beside its score, the win rate of the response against the prompt's opponents under each of the
keys: `integrations.online.wins(reward, opponents' rewards)`. Without `algorithm.mopo` GDPO is verl's own.

verl hands rewards by name to the estimator called "gdpo" alone, and its V1 trainer to none, which is why this takes
GDPO's place and needs `trainer.use_v1=false`. The estimator runs in one process, the driver.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, compute_grpo_outcome_advantage

from mopo_trainer.files import write_json
from mopo_trainer.integrations.online import MeasuredDual, mean_win_rates, without_gaps

logger = logging.getLogger(__name__)
gdpo = ADV_ESTIMATOR_REGISTRY["gdpo"]


def mopo_advantage(
    token_level_rewards: Tensor,  # [N, L]
    response_mask: Tensor,  # [N, L]
    index: np.ndarray,  # [N] the prompt of each response
    config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # [N, L], [N, L]
    """GRPO's advantage of s_i = v_ip + Σ_k λ_k v_ik (and verl's KL in the reward), then a step of the multipliers.

    `algorithm.mopo`: primary, thresholds ({key: win rate}), state (a JSON file, written after each batch; one that is
    there is gone on with), multiplier_lr (0.1).

    Raises:
        ValueError: no `state`, names that are no reward key, rewards that are no win rates.
        InfeasibleThresholds: a threshold above 1.
    """
    if config is None or config.get("mopo") is None:
        return gdpo(
            token_level_rewards=token_level_rewards, response_mask=response_mask, index=index, config=config, **kwargs
        )
    mopo, names = config.get("mopo"), list(config.get("gdpo_reward_keys") or [])
    if mopo.get("state") is None:
        raise ValueError("algorithm.mopo.state is not set: name the JSON file that keeps the multipliers")
    thresholds = tuple(sorted((mopo.get("thresholds") or {}).items()))
    dual = _dual(tuple(names), mopo.get("primary"), thresholds, mopo.get("multiplier_lr", 0.1), mopo.get("state"))
    win_rate = _win_rates(kwargs["non_tensor_batch"], names).to(token_level_rewards.device)
    group = torch.from_numpy(np.unique(index, return_inverse=True)[1]).to(win_rate.device)
    penalty = (token_level_rewards - kwargs["batch"]["token_level_scores"]).sum(-1)
    score = without_gaps(win_rate, group).nan_to_num(0) @ dual.multipliers.to(win_rate) + penalty
    mean = mean_win_rates(win_rate, group)
    dual.measure(mean)
    state = {"step": int(dual.step), "multipliers": dict(zip(names, dual.multipliers.tolist(), strict=True))}
    write_json(Path(mopo.get("state")), state | {"measured": dual.metrics(mean)})
    return compute_grpo_outcome_advantage(
        score.float()[:, None],
        response_mask,
        index,
        norm_adv_by_std_in_grpo=config.get("norm_adv_by_std_in_grpo", True),
    )


@lru_cache(maxsize=1)
def _dual(
    names: Sequence[str], primary: str, thresholds: Sequence[tuple[str, float]], multiplier_lr: float, state: str
) -> MeasuredDual:
    """The multipliers of this process's run, from the file where there is one."""
    dual = MeasuredDual(names, primary, dict(thresholds), multiplier_lr)
    if Path(state).is_file():
        saved = json.loads(Path(state).read_text())
        if list(saved["multipliers"]) != list(names):
            raise ValueError(f"{state}: its multipliers are of {', '.join(saved['multipliers'])}; name another file")
        dual.multipliers.copy_(torch.tensor(list(saved["multipliers"].values())))
        dual.step.fill_(saved["step"])
        logger.warning("multipliers of step %d are taken from %s: %s", saved["step"], state, saved["multipliers"])
    return dual


def _win_rates(found: Mapping[str, Any], names: Sequence[str]) -> Tensor:  # [N, K]
    columns = []
    for name in names:
        if name not in found:
            raise ValueError(f"compute_score returns no {name!r}; it returns: {', '.join(found)}")
        column = torch.from_numpy(np.asarray(found[name], dtype=np.float64))
        if ((column < 0) | (column > 1)).any():
            raise ValueError(f"{name!r} holds {column.min():g} to {column.max():g}; give win rates, in [0, 1]")
        columns.append(column)
    return torch.stack(columns, 1)


ADV_ESTIMATOR_REGISTRY["gdpo"] = mopo_advantage
