"""Log-probs of whole responses against one sequence at a time, what a batch of them holds, the hash of the weights."""

import pytest
import torch
from accelerate import Accelerator
from tiny import plain_logps

from mopo_trainer.training.head import Scoring
from mopo_trainer.training.reference import _batches, frozen_fingerprint, policy_fingerprint, response_logps

SEQUENCES = [  # (input_ids, prompt_tokens): two groups of ragged responses, one response of a single token
    ([9, 50, 51], 1),
    ([9, 60, 61, 62], 1),
    ([5, 6, 7, 20, 21, 22], 3),
    ([5, 6, 7, 30], 3),
    ([5, 6, 7, 40, 41], 3),
]
GROUPS = [1, 1, 0, 0, 0]


@pytest.mark.parametrize("row_of", [None, GROUPS])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_response_logps_in_any_batching(tiny_model, row_of, batch_size):
    tiny_model.train()
    tiny_model.model.layers[0].self_attn.attention_dropout = 0.5
    logps = response_logps(
        tiny_model,
        SEQUENCES,
        scoring=Scoring(pad_token_id=0, share_prompt=row_of is not None),
        accelerator=Accelerator(cpu=True),
        batch_size=batch_size,
        row_of=row_of,
    )
    assert tiny_model.training
    assert logps.dtype == torch.float64
    torch.testing.assert_close(logps, plain_logps(tiny_model, SEQUENCES), rtol=1e-5, atol=1e-5)


def test_batches_take_the_longest_rows_first_and_rows_whole():
    assert _batches(SEQUENCES, None, 2) == [[2, 4], [1, 3], [0]]
    assert _batches(SEQUENCES, GROUPS, 2) == [[2, 3, 4], [0, 1]]  # at least a row, however small the batch
    assert _batches(SEQUENCES, GROUPS, 5) == [[2, 3, 4, 0, 1]]
    assert _batches(SEQUENCES, GROUPS, 4) == [[2, 3, 4], [0, 1]]


def test_fingerprints_see_bytes_configuration_and_numbers(tiny_model):
    model = tiny_model
    weight, module = model.model.layers[1].mlp.up_proj.weight, model.model.rotary_emb
    changes = {
        "permuted weights": lambda: weight.data.copy_(weight.data.flip(0)),
        "softcap": lambda: setattr(model.config, "final_logit_softcapping", 3.0),
        "rope": lambda: model.config.rope_parameters.update(rope_theta=5.0),
        "a buffer": lambda: module.inv_freq.mul_(1.5),
        "a number of a module": lambda: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
        "attention": lambda: setattr(model.config, "_attn_implementation", "eager"),
    }
    seen = {policy_fingerprint(model), policy_fingerprint(model, "bf16")}
    assert len(seen) == 2
    for change in changes.values():
        with torch.no_grad():
            change()
        assert policy_fingerprint(model) == policy_fingerprint(model) not in seen
        seen.add(policy_fingerprint(model))


def test_fingerprints_do_not_see_names_and_states(tiny_model):
    before = policy_fingerprint(tiny_model), frozen_fingerprint(tiny_model)
    tiny_model.config._name_or_path, tiny_model.config.transformers_version = "elsewhere", "1"
    tiny_model.config.use_cache = False
    tiny_model.train()
    assert (policy_fingerprint(tiny_model), frozen_fingerprint(tiny_model)) == before
    with torch.no_grad():
        tiny_model.model.norm.weight += 1
    assert policy_fingerprint(tiny_model) != before[0]
    assert frozen_fingerprint(tiny_model) == before[1], "trained weights stand in the checkpoint"
    tiny_model.model.norm.weight.requires_grad_(False)
    assert frozen_fingerprint(tiny_model) != before[1]
