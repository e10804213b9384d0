"""Layout of responses behind shared prompts, against a plain loop and against one sequence at a time."""

import random

import pytest
import torch

from mopo_trainer.data.packing import IGNORE_INDEX, SequenceBatch, collate, pack
from mopo_trainer.training.head import Scoring, Transform, head_arguments

SEQUENCES = [  # (input_ids, prompt_tokens): two groups of ragged responses, one response of a single token
    ([5, 6, 7, 20, 21, 22], 3),
    ([5, 6, 7, 30], 3),
    ([5, 6, 7, 40, 41], 3),
    ([9, 50, 51, 52, 53], 1),
    ([9, 60, 61], 1),
]
GROUPS = [0, 0, 0, 1, 1]
BATCH = SequenceBatch.of(SEQUENCES)
PAD = 1


def ragged_groups(seed):
    """Groups of one to four responses behind prompts of one to five tokens, and group ids that may come back."""
    rng = random.Random(seed)
    sequences, row_of = [], []
    for number in range(rng.randint(1, 5)):
        prompt = [rng.randrange(2, 99) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(1, 4)):
            response = [rng.randrange(2, 99) for _ in range(rng.randint(1, 6))]
            sequences.append((prompt + response, len(prompt)))
            row_of.append(number % 3)
    return sequences, row_of


def laid_out(sequences, row_of):
    """The fields of PackedSequences by a loop over rows, responses and tokens."""
    rows, sources, targets = [], [], []
    for i, (ids, prompt) in enumerate(sequences):
        if row_of is None or i == 0 or row_of[i] != row_of[i - 1]:
            rows.append([(token, position, 0) for position, token in enumerate(ids[:prompt])])
        row = rows[-1]
        number, start = max(segment for _, _, segment in row) + 1, len(row)
        row += [(token, position, number) for position, token in enumerate(ids) if position >= prompt]
        sources.append([(len(rows) - 1, column) for column in [prompt - 1, *range(start, len(row) - 1)]])
        targets.append(list(ids[prompt:]))
    width, longest = max(map(len, rows)), max(map(len, targets))
    padded = [row + [(PAD, 0, -1)] * (width - len(row)) for row in rows]
    input_ids, position_ids, segment = (torch.tensor([[cell[i] for cell in row] for row in padded]) for i in range(3))
    flat = [[row * width + column for row, column in source] + [0] * (longest - len(source)) for source in sources]
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segment": segment,
        "source": torch.tensor(flat),
        "target": torch.tensor([target + [IGNORE_INDEX] * (longest - len(target)) for target in targets]),
        "tokens": sum(map(len, rows)),
        "is_shared": len(rows) < len(sequences),
    }


@pytest.mark.parametrize("shared", [False, True])
def test_any_ragged_batch_is_laid_out_as_a_loop_would(shared):
    for seed in range(30):
        sequences, row_of = ragged_groups(seed)
        row_of = row_of if shared else None
        packed = pack(SequenceBatch.of(sequences), None if row_of is None else torch.tensor(row_of), PAD)
        for name, expected in laid_out(sequences, row_of).items():
            found = getattr(packed, name)
            assert torch.equal(found, expected) if torch.is_tensor(expected) else found == expected, (seed, name)


def assert_same_sequences(found, expected):
    for name in ("ids", "lengths", "prompts"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


def test_taking_sequences_is_taking_them_before_they_are_laid_flat():
    for seed in range(30):
        sequences, _ = ragged_groups(seed)
        index = random.Random(seed).choices(range(len(sequences)), k=4)
        taken = SequenceBatch.of(sequences).take(torch.tensor(index))
        assert_same_sequences(taken, SequenceBatch.of([sequences[i] for i in index]))


def test_a_batch_knows_whose_labels_its_responses_have():
    rows = [
        {"input_ids": [[5, 6, 7], [5, 8], [5, 9]], "prompt_tokens": [1, 1, 1], "first_response": 40},
        {"input_ids": [[3, 4, 2], [3, 4, 6]], "prompt_tokens": [2, 2], "first_response": 7},
    ]
    batch = collate(rows)["batch"]
    assert batch.response.tolist() == [40, 41, 42, 7, 8]
    assert batch.group.tolist() == [0, 0, 0, 1, 1]
    assert_same_sequences(
        batch.sequences, SequenceBatch.of([([5, 6, 7], 1), ([5, 8], 1), ([5, 9], 1), ([3, 4, 2], 2), ([3, 4, 6], 2)])
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sharing_the_prompt_changes_no_hidden_state_and_no_gradient(tiny_model, attention):
    tiny_model.set_attn_implementation(attention)
    found = []
    for share in (False, True):
        scoring = Scoring(pad_token_id=0, share_prompt=share)
        packed = scoring.pack(BATCH, torch.tensor(GROUPS))
        assert packed.is_shared == share
        tiny_model.zero_grad()
        hidden = head_arguments(
            tiny_model, scoring.forward(tiny_model, tiny_model, packed).states, packed, Transform()
        )["hidden"]
        counted = hidden[packed.target != IGNORE_INDEX]
        counted.square().sum().backward()
        found.append((counted, tiny_model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_without_shared_prompts_a_model_gets_tokens_and_a_plain_mask():
    plain = pack(BATCH, None, 0).model_inputs("flash_attention_2", torch.float32)
    assert plain["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in SEQUENCES]
    assert set(plain) == {"input_ids", "attention_mask"}
