"""The CUDA kernels on a GPU against float64 torch: the checks of fold_contract.py, sizes that only a GPU folds quickly,
golden cases, streams and captured graphs. test_batch.py runs the batch contract there.
"""

import math

import fold_contract
import pytest
import torch
from fold_contract import fold_statistics, random_tile
from fold_truth import DTYPES, TRANSFORMS, exact_fold
from golden_cases import golden, tensor
from hypothesis import given, settings
from test_batch import SUMS

from mopo_kernels import backends
from mopo_kernels.backends import reference
from mopo_kernels.backends.fold import Tile
from mopo_kernels.backends.native import cuda
from mopo_kernels.objective.target import label_statistics

pytestmark = [
    pytest.mark.skipif(bool(cuda.UNAVAILABLE), reason=cuda.UNAVAILABLE),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GIB = 2**30


def needs_memory(size):
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of GPU memory, {free / GIB:.0f} are free")


@settings(max_examples=300, deadline=None)
@given(
    **fold_contract.tile_strategies(rows=9, widths=[1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 1000, 4095, 4097, 8193, 50257]),
)
def test_ragged_tiles_at_any_alignment(**case):
    fold_contract.check_tiles(cuda, "cuda", **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 262144), (2, 262143), (7, 151936), (600, 50257), (5000, 32001)])
def test_few_long_rows_and_many(rows, columns, dtype):
    fold_contract.check_tiles(
        *(cuda, "cuda"),
        **{"rows": rows, "widths": [columns], "offset": 0, "padding": 0, "out_offset": None, "dtype": dtype},
        **{"transform": TRANSFORMS[1], "with_bias": False, "scale": 3.0, "seed": rows},
    )


@pytest.mark.parametrize("value", [0.3, -5.3])
def test_a_vocabulary_of_256k_is_summed_to_2e6(value):
    fold_contract.check_accuracy(cuda, "cuda", torch.randn(64, 262144, device="cuda") * 3)
    fold_contract.check_accuracy(cuda, "cuda", torch.full((64, 262144), value, device="cuda"))


def test_masked_vocabulary_and_huge_logits():
    fold_contract.check_special_logits(cuda, "cuda")
    fold_contract.check_masked_tokens(cuda, "cuda")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [37, 9001, 100000])
def test_nan_and_infinity_are_not_swallowed(bad, columns):
    for column in (0, 7, 16, 36, columns - 1):
        fold_contract.check_bad_logits(cuda, "cuda", bad, column, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 19, 9001])
def test_rows_that_do_not_count_are_skipped_or_become_zero(columns, dtype):
    fold_contract.check_rows_that_do_not_count(cuda, "cuda", columns, dtype)


def test_long_rows_of_one_block():
    fold_contract.check_long_rows_of_one_block(cuda, "cuda", 151936)


@settings(max_examples=200, deadline=None)
@given(
    **fold_contract.sampled_strategies(
        rows=9, widths=[1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 1000, 4095, 4097, 8193, 50257]
    ),
)
def test_samples_of_ragged_tiles_at_any_alignment(**case):
    fold_contract.check_samples(cuda, "cuda", **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sampling_is_unbiased(dtype, transform):
    fold_contract.check_sampling_is_unbiased(cuda, "cuda", dtype, transform)


def test_extreme_samples():
    fold_contract.check_extreme_samples(cuda, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [{}, {"rows": 3000, "vocab": 50257, "width": 1500, "capacity": 67}])
def test_products_of_samples(dtype, sizes):
    fold_contract.check_sample_products(cuda, "cuda", dtype, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backends_draw_the_same_samples_but_for_their_exponentials(dtype):
    """A step that differs is next to the other one: hardly any do."""
    logits = (torch.randn(64, 50257, generator=torch.Generator().manual_seed(0)) * 2).to("cuda", dtype)
    target = torch.arange(64, device="cuda") * 700
    lse = exact_fold(logits, target, torch.zeros(64, device="cuda").double(), TRANSFORMS[0])[0]
    uniform = fold_contract.on_grid(torch.rand(64, dtype=torch.float64)).cuda()
    arguments = (logits, target, lse, uniform, 2.0**-6, TRANSFORMS[0], None, [50257])
    drawn = (fold_contract.fold_sample(fold, *arguments)[0] for fold in (cuda, backends.fold("triton")))
    ours, others = (fold_contract.dense(samples, 50257)[1] for samples in drawn)
    assert (ours & others).sum() >= 0.98 * (ours | others).sum()


def test_more_than_2_to_the_32_logits():
    rows, columns = 2**14 + 3, 2**18
    needs_memory(3 * rows * columns * 2 + 16 * GIB)
    logits = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    target = torch.randint(columns, (rows,), device="cuda")
    ones = torch.ones(rows, dtype=torch.float64, device="cuda")
    statistics = fold_statistics(cuda, logits, target, TRANSFORMS[0], None, [columns])
    last = slice(rows - 5, rows)
    lse, at_target, _, gradient = exact_fold(logits[last], target[last], ones[last], TRANSFORMS[0], None)
    torch.testing.assert_close(statistics.lse[last], lse, rtol=2e-6, atol=0)
    torch.testing.assert_close(statistics.chosen[last], at_target, rtol=0, atol=0)
    cuda.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, ones, logits)
    assert ((logits[last].double() - gradient).abs() <= gradient.abs() * 2**-7 + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_give_the_same_bits(dtype):
    logits, _ = random_tile(3, 200001, dtype, "cuda", offset=1)
    target, ones = torch.tensor([3, 8, 9001], device="cuda"), torch.ones(3, dtype=torch.float64, device="cuda")

    def run():
        statistics = fold_statistics(cuda, logits, target, TRANSFORMS[2], None, [77, 199924], entropy=True)
        grad = torch.full_like(logits, math.nan)
        cuda.fold_gradient(Tile(logits, target, TRANSFORMS[2]), statistics.lse, ones, grad)
        return *statistics, grad

    first = run()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


@pytest.mark.parametrize("case", golden("batch"))
def test_golden_batch(case):
    lag = case["lag_log_ratio"]
    statistics = label_statistics(
        tensor(case["win_rate"]).cuda(),
        torch.tensor(case["group"]).cuda(),
        tensor([1.0, *case["multipliers"]]).cuda(),
        tau=case["tau"],
        eps=case["eps"],
        lag_log_ratio=None if lag is None else tensor(lag).cuda(),
        backend="cuda",
    )
    values = statistics.to("cpu").values
    relative = {"rtol": case["tol"]["rel"], "atol": 0}
    torch.testing.assert_close(values.ess, tensor(case["ess"]), **relative)
    torch.testing.assert_close(values.weights, tensor(case["weights"]), **relative)
    torch.testing.assert_close(values.win_rates[1:], tensor(case["win_rates"]), **relative)
    torch.testing.assert_close(values.lower_bounds[1:], tensor(case["lower_bounds"]), **relative)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 4096), (3, 100003), (70000, 33)])
def test_sequence_sums(rows, columns):
    logp = torch.randn(rows, columns + 3, device="cuda")[:, 2:-1]
    target = torch.randint(0, 3, (rows, columns + 1), device="cuda")[:, 1:]
    expected, expected_counts = reference.sequence_sums(logp, target, 0)
    sums, counts = cuda.sequence_sums(logp.masked_fill_(target == 0, math.nan), target, 0)
    torch.testing.assert_close(sums, expected, **SUMS)
    assert torch.equal(counts, expected_counts)


def test_work_goes_to_the_current_stream():
    """Behind a long wait on another stream, the kernels must wait too."""
    logits, target = torch.randn(8, 32000, device="cuda"), torch.arange(8, device="cuda")
    expected = fold_statistics(cuda, logits * 2, target, TRANSFORMS[0], None, [32000])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        logits.mul_(2)
        statistics = fold_statistics(cuda, logits, target, TRANSFORMS[0], None, [32000])
    stream.synchronize()
    assert torch.equal(statistics.total, expected.total)


def test_the_kernels_can_be_captured_in_a_graph():
    logits, target = torch.randn(8, 100000, device="cuda"), torch.arange(8, device="cuda")
    ones, out = torch.ones(8, dtype=torch.float64, device="cuda"), torch.empty_like(logits)

    def step():
        statistics = fold_statistics(cuda, logits, target, TRANSFORMS[0], None, [100000])
        cuda.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, ones, out)

    step()
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)
