"""A head split over two processes is the whole one: values, gradients, bytes that travel, and what is refused."""

import pytest
import torch
from processes import together
from split_head import H, N, checks, numbers, run

from mopo_kernels.backends.native import cpu

pytestmark = pytest.mark.skipif(bool(cpu.UNAVAILABLE), reason=cpu.UNAVAILABLE)

FORWARD, GRADIENT = 2e-6, 2e-5  # of a float32 head, relative to the largest value


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return together(run, tmp_path_factory.mktemp("split"))


def assert_same(pairs, tolerance):
    for found, expected in pairs:
        expected = torch.tensor(expected, dtype=torch.float64)
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=tolerance * max(scale, 1.0)
        )


@pytest.mark.parametrize("name", checks())
def test_a_split_head_is_the_whole_one(ranks, name):
    for rank in ranks:
        values, gradients = rank["checks"][name]
        assert_same(values, FORWARD)
        assert_same(gradients, GRADIENT)


def test_parts_of_a_16_bit_gradient_are_added_up_before_they_are_rounded(ranks):
    for rank in ranks:
        (split, whole), sampled = rank["cancelling"]
        assert split <= 1.1 * whole
        assert sampled <= 2**-9


def test_every_rank_has_the_same_bits(ranks):
    for name in checks():
        if "same rows" in name:
            first, second = ([found for found, _ in rank["checks"][name][0]] for rank in ranks)
            assert first == second, name


def test_a_compiled_call_breaks_its_graph_says_why_and_is_right(ranks):
    for rank in ranks:
        pairs, refused = rank["compiled"]
        assert_same(pairs, 0)
        assert "compare their arguments" in refused


def test_bytes_that_a_rank_sends(ranks):
    """Statistics of 24 bytes a row, 32 with entropies; H numbers a row in the backward; never logits."""
    *_, target, _ = numbers()
    counted = int((target != -100).sum())
    agreement = 8 * 30
    for rank in ranks:
        assert rank["bytes"]["same"] == ([agreement, 24 * counted], [4 * H * counted])
        assert rank["bytes"]["entropy"] == ([agreement, 32 * counted], [4 * H * counted])
        most = max(int((target[:14] != -100).sum()), int((target[14:] != -100).sum()))
        forward, backward = rank["bytes"]["own"]
        assert forward == [agreement, 8, 4 * H * most, 8 * most, 24 * counted]
        assert backward == [4 * most, 4 * H * counted]
    assert counted < N


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", "hold different rows (20, 20 that count): with a batch each"),
        ("hidden", "other hidden states or labels for the same targets"),
        ("labels", "other hidden states or labels for the same targets"),
        ("options", "different options"),
        ("gradients", "different options, dtypes or gradients"),
        ("target", "target holds 301, outside [0, 301)"),
        ("reference", "backend='reference' has no split LM heads"),
        ("layout", "an LM head takes Shard(0) or Replicate()"),
        ("mesh", "on one dimension, beside replicas with rows='own'"),
        ("both", "a DTensor knows its own group"),
        ("hidden dtensor", "hand over hidden.to_local()"),
        ("replicas", "other hidden states or labels for the same targets"),
    ],
)
def test_what_is_refused_on_every_rank(ranks, name, message):
    for rank in ranks:
        assert message in rank["errors"][name]


def test_nan_in_one_part_is_an_error_on_every_rank(ranks):
    assert "another process's part of the LM head" in ranks[0]["errors"]["nan"]
    assert "weight holds NaN" in ranks[1]["errors"]["nan"]
