"""Packing of responses behind shared prompts, and log-probs of whole responses, against one sequence at a time."""

import pytest
import torch
from accelerate import Accelerator

from mopo_trainer.data.packing import IGNORE_INDEX, SequenceBatch, pack
from mopo_trainer.training.head import LMHead, response_hidden_states
from mopo_trainer.training.reference import response_logps

SEQUENCES = [  # (input_ids, prompt_tokens): two groups of ragged responses, one response of a single token
    ([5, 6, 7, 20, 21, 22], 3),
    ([5, 6, 7, 30], 3),
    ([5, 6, 7, 40, 41], 3),
    ([9, 50, 51, 52, 53], 1),
    ([9, 60, 61], 1),
]
GROUPS = [0, 0, 0, 1, 1]
BATCH = SequenceBatch.of(SEQUENCES)


def plain_logps(model):
    """log π(response | prompt) of each sequence alone, from the model's own logits."""
    logps = []
    for ids, prompt in SEQUENCES:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        logps.append(logp[prompt - 1 :].sum())
    return torch.stack(logps)


def test_layout_of_a_shared_prompt():
    packed = pack(BATCH, torch.tensor(GROUPS), pad_token_id=0)
    assert packed.input_ids.tolist() == [[5, 6, 7, 20, 21, 22, 30, 40, 41], [9, 50, 51, 52, 53, 60, 61, 0, 0]]
    assert packed.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 5, 3, 3, 4]
    assert packed.segment.tolist()[1] == [0, 1, 1, 1, 1, 2, 2, -1, -1]
    assert packed.tokens == 16
    assert packed.source.tolist()[1] == [2, 0, 0, 0]  # the prompt's last token predicts every response's first
    assert packed.source.tolist()[2][:2] == [2, 7]
    assert packed.target.tolist()[2] == [40, 41, IGNORE_INDEX, IGNORE_INDEX]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sharing_the_prompt_changes_no_hidden_state_and_no_gradient(tiny_model, attention):
    tiny_model.set_attn_implementation(attention)
    found = []
    for row_of in (None, torch.tensor(GROUPS)):
        packed = pack(BATCH, row_of, pad_token_id=0)
        tiny_model.zero_grad()
        hidden = response_hidden_states(tiny_model, tiny_model, packed)
        counted = hidden[packed.target != IGNORE_INDEX]
        counted.square().sum().backward()
        found.append((counted, tiny_model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_other_attention_is_refused_for_shared_prompts_only(tiny_model):
    tiny_model.config._attn_implementation = "flash_attention_2"
    packed = pack(BATCH, torch.tensor(GROUPS), pad_token_id=0)
    with pytest.raises(ValueError, match="share_prompt needs attn_implementation 'sdpa' or 'eager'"):
        response_hidden_states(tiny_model, tiny_model, packed)
    assert set(pack(BATCH, None, 0).model_inputs("flash_attention_2", torch.float32)) == {
        "input_ids",
        "attention_mask",
    }


@pytest.mark.parametrize("row_of", [None, GROUPS])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_response_logps_in_any_batching(tiny_model, row_of, batch_size):
    tiny_model.train()
    logps = response_logps(
        tiny_model, SEQUENCES, accelerator=Accelerator(cpu=True), batch_size=batch_size, pad_token_id=0, row_of=row_of
    )
    assert tiny_model.training
    torch.testing.assert_close(logps, plain_logps(tiny_model).double(), rtol=1e-5, atol=1e-5)


def test_head_options_follow_the_model_config(tiny_model):
    tiny_model.config.final_logit_softcapping = 30.0
    tiny_model.config.logits_scaling = 4.0
    assert LMHead.of(tiny_model).options == {"bias": None, "softcap": 30.0, "logit_scale": 0.25}
    tiny_model.config.logit_scale = 0.5
    assert LMHead.of(tiny_model).options["logit_scale"] == 0.5
