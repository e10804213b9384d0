"""The shared checks of fold_contract.py on the reference backend, which the engine runs on to sample gradients."""

import fold_contract
import pytest
from fold_truth import DTYPES, TRANSFORMS
from hypothesis import given, settings

from mopo_kernels.backends import reference

WIDTHS = [1, 7, 16, 100, 300]


@settings(max_examples=40, deadline=None)
@given(**fold_contract.tile_strategies(rows=4, widths=WIDTHS))
def test_ragged_tiles(**case):
    fold_contract.check_tiles(reference, "cpu", **case)


@settings(max_examples=60, deadline=None)
@given(**fold_contract.sampled_strategies(rows=4, widths=WIDTHS))
def test_samples_of_ragged_tiles(**case):
    fold_contract.check_samples(reference, "cpu", **case)


def test_special_logits_and_rows():
    fold_contract.check_special_logits(reference, "cpu")
    fold_contract.check_masked_tokens(reference, "cpu")
    for bad in (float("nan"), float("inf")):
        fold_contract.check_bad_logits(reference, "cpu", bad, 17, 37)
    fold_contract.check_rows_that_do_not_count(reference, "cpu", 37, DTYPES[0])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sampling_is_unbiased(transform):
    for dtype in DTYPES:
        fold_contract.check_sampling_is_unbiased(reference, "cpu", dtype, transform)


def test_extreme_samples_and_products():
    fold_contract.check_extreme_samples(reference, "cpu")
    for dtype in DTYPES:
        fold_contract.check_sample_products(reference, "cpu", dtype)
