"""Win rates from pairs and comparisons, and the comparisons that are refused."""

import itertools
import math

import pytest
import torch
from golden_cases import tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels import win_rate_from_comparisons, win_rate_from_pairs


def test_pairs_lie_first_then_second():
    preference = tensor([[1.0, 0.3], [None, 0.0]])
    expected = tensor([[1.0, 0.3], [None, 0.0], [0.0, 0.7], [None, 1.0]])
    torch.testing.assert_close(win_rate_from_pairs(preference), expected, equal_nan=True)


@given(seed=st.integers(0, 10**6), responses=st.integers(2, 6))
@settings(deadline=None, max_examples=15)
def test_comparisons_average_over_the_opponents_met(seed, responses):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(responses))
    pairs = pairs[torch.rand(len(pairs), generator=generator) < 0.7]
    first, second = pairs[:, 0], pairs[:, 1]
    preference = torch.rand(len(pairs), 2, generator=generator, dtype=torch.float64)
    preference[torch.rand(preference.shape, generator=generator) < 0.3] = math.nan

    expected = torch.full((responses, 2), math.nan, dtype=torch.float64)
    for i, k in itertools.product(range(responses), range(2)):
        met = [float(p[k]) for f, p in zip(first, preference, strict=True) if f == i]
        met += [1 - float(p[k]) for s, p in zip(second, preference, strict=True) if s == i]
        met = [p for p in met if not math.isnan(p)]
        if met:
            expected[i, k] = sum(met) / len(met)
    torch.testing.assert_close(
        win_rate_from_comparisons(first, second, preference, responses), expected, equal_nan=True
    )


def test_all_comparisons_of_a_pair_are_its_pair_labels():
    preference = tensor([[0.9, None], [0.2, 1.0]])
    from_comparisons = win_rate_from_comparisons(torch.tensor([0, 1]), torch.tensor([2, 3]), preference, 4)
    torch.testing.assert_close(from_comparisons, win_rate_from_pairs(preference), equal_nan=True)


@pytest.mark.parametrize(
    ("first", "second", "preference", "message"),
    [
        ([0], [0], [[1.0]], "comparison 0 compares response 0 with itself"),
        ([0, 2], [1, 1], [[1.0], [0.5]], "first must hold responses 0 .. 1; got 0 .. 2"),
        ([0], [-1], [[1.0]], "second must hold responses"),
        ([0, 1], [1, 0], [[1.0], [0.5]], "responses 0 and 1 are compared twice for objective 0"),
        ([0], [1], [[1.5]], r"preference must lie in \[0, 1\]"),
        ([0], [1, 1], [[1.0]], "first and second must have one index"),
    ],
)
def test_bad_comparisons_are_named(first, second, preference, message):
    with pytest.raises(ValueError, match=message):
        win_rate_from_comparisons(torch.tensor(first), torch.tensor(second), torch.tensor(preference), 2)


def test_a_pair_may_be_labelled_once_per_objective():
    preference = tensor([[1.0, None], [None, 0.3]])
    win_rate = win_rate_from_comparisons(torch.tensor([0, 1]), torch.tensor([1, 0]), preference, 2)
    torch.testing.assert_close(win_rate, tensor([[1.0, 0.7], [0.0, 0.3]]))


def test_bad_pairs_are_named():
    with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\].*got 2 in row 0, objective 1"):
        win_rate_from_pairs(torch.tensor([[0.0, 2.0]]))
