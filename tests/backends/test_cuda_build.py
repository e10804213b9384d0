"""The CUDA kernels without a GPU: what nvcc makes of them, and the same sources run by an emulation of CUDA.

cuda_emulation compiles the .cu files and bindings.cpp as C++: every thread of a block is a fiber, in an order
that can be turned round. So indices, tails, barriers and arithmetic are tested here; exp and tanh are the host's.
"""

import contextlib
import importlib.util
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import fold_contract
import pybind11
import pytest
import test_batch
import torch
from fold_contract import fold_statistics, random_tile
from fold_truth import DTYPES, TRANSFORMS, exact_fold, sparse
from hypothesis import given, settings

from bench.gpu import cuda_report
from mopo_kernels import backends
from mopo_kernels.backends import native, reference
from mopo_kernels.backends.fold import Tile
from mopo_kernels.backends.native import cuda

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
BUILD = cuda_report.BUILD
STEP = {torch.float64: 2048, torch.float32: 4096, torch.bfloat16: 8192, torch.float16: 8192}  # columns a block reads
SAMPLE_CHUNK = {dtype: 2048 // dtype.itemsize for dtype in DTYPES}  # columns of a chunk

UNAVAILABLE = cuda.UNAVAILABLE  # before the emulation takes its place

needs_nvcc = pytest.mark.skipif(BUILD["find_nvcc"]() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA backend with its kernels run by the emulation, standing where the "cpu" backend does."""
    if shutil.which("g++") is None or int(subprocess.check_output(["g++", "-dumpversion"]).split(b".")[0]) < 12:
        pytest.skip("needs g++ 12, for _Float16")
    module = tmp_path_factory.mktemp("emulated") / "_cuda.so"
    includes = [str(EMULATION), pybind11.get_include(), sysconfig.get_path("include")]
    sources = [*BUILD["CUDA_SOURCES"], "csrc/cuda/bindings.cpp"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-U_FORTIFY_SOURCE"]  # fortified longjmp keeps to one stack
    flags += ['-DMOPO_CUDA_ARCHS="8.0,9.0a"', *(f"-I{path}" for path in includes)]
    # A 16-byte access that is not aligned stops the process, as it would stop a GPU.
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    subprocess.run(["g++", *flags, "-x", "c++", *sources, "-o", str(module)], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("_cuda", module)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    torch.use_deterministic_algorithms(True)  # whatever torch allocates holds NaN until it is written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "module", extension)
        patch.setattr(cuda, "UNAVAILABLE", "")
        patch.setattr(cuda, "_queue", lambda x: contextlib.nullcontext(0))
        patch.setitem(backends.BACKENDS, "cpu", cuda)
        yield cuda
    torch.use_deterministic_algorithms(False)


ORDERS = ["forward", "backward", "interleaved"]


def in_every_order(monkeypatch, run):
    """What `run` returns when warps run ahead of each other, from the first or from the last, or take turns."""
    results = []
    for order in ORDERS:
        monkeypatch.setenv("EMULATED_ORDER", order)
        results.append(run())
    return results


# -------------------------------------------------------------------------------------------------------------- fold


@settings(max_examples=120, deadline=None)
@given(
    **fold_contract.tile_strategies(rows=5, widths=[1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 1000, 4095, 4097, 8193]),
)
def test_ragged_tiles_at_any_alignment(emulated, **case):
    fold_contract.check_tiles(emulated, "cpu", **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("around", [-1, 0, 1])
def test_every_alignment_around_a_whole_number_of_steps(emulated, dtype, around):
    for offset, out_offset in [(0, 0), (1, 1), (0, 1), (3, None), (7, 2)]:
        fold_contract.check_tiles(
            *(emulated, "cpu"),
            **{"rows": 2, "widths": [2 * STEP[dtype] + around], "offset": offset, "padding": 1},
            **{"out_offset": out_offset, "dtype": dtype, "transform": TRANSFORMS[1]},
            **{"with_bias": True, "scale": 3.0, "seed": offset},
        )


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.randn(2, 262144) * 3, id="normal"),
        pytest.param(torch.full((2, 262144), 0.3), id="all the same"),  # every rounding of the sum goes one way
        pytest.param(torch.full((2, 262144), -5.3).index_fill(1, torch.tensor([77]), 1.7), id="one above the others"),
        pytest.param(torch.linspace(-40, 30, 2 * 262144).view(2, -1), id="a new maximum in every step"),
    ],
)
def test_a_vocabulary_of_256k_is_summed_to_2e6(emulated, logits):
    fold_contract.check_accuracy(emulated, "cpu", logits)


def test_masked_vocabulary_and_huge_logits(emulated):
    fold_contract.check_special_logits(emulated, "cpu")
    fold_contract.check_masked_tokens(emulated, "cpu")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("columns", [37, 9001])
def test_nan_and_infinity_are_not_swallowed(emulated, bad, columns):
    for column in (0, 7, 16, 36, columns - 1):
        fold_contract.check_bad_logits(emulated, "cpu", bad, column, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [19, 9001])
def test_rows_that_do_not_count_are_skipped_or_become_zero(emulated, columns, dtype):
    fold_contract.check_rows_that_do_not_count(emulated, "cpu", columns, dtype)


def test_long_rows_of_one_block(emulated):
    fold_contract.check_long_rows_of_one_block(emulated, "cpu", 2 * STEP[torch.bfloat16] + 4001)


def test_zero_rows_and_zero_columns(emulated):
    for shape in [(0, 5), (3, 0), (0, 0)]:
        fold_contract.check_rows_that_do_not_count(emulated, "cpu", 0, torch.float32)
        tile = Tile(torch.empty(shape), torch.zeros(shape[0], dtype=torch.int64), TRANSFORMS[0])
        per_row = torch.zeros(shape[0], dtype=torch.float64)
        emulated.fold_gradient(tile, per_row, per_row, tile.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_no_bit_of_a_fold(emulated, monkeypatch, dtype):
    logits, _ = random_tile(3, 2 * STEP[dtype] + 77, dtype, "cpu", offset=1)
    target, ones = torch.tensor([3, 8, 9001]) % logits.shape[1], torch.ones(3, dtype=torch.float64)

    def run():
        widths = [77, logits.shape[1] - 77]
        statistics = fold_statistics(emulated, logits, target, TRANSFORMS[2], None, widths, entropy=True)
        grad = torch.full_like(logits, math.nan)
        emulated.fold_gradient(Tile(logits, target, TRANSFORMS[2]), statistics.lse, ones, grad)
        return *statistics, grad

    for results in zip(*in_every_order(monkeypatch, run), strict=True):
        assert all(torch.equal(x, results[0]) for x in results)


def test_the_binding_refuses_what_the_kernels_cannot_take(emulated):
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    per_row = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="overlap"):
        emulated.fold_gradient(Tile(logits[:1].expand(2, 3), target, TRANSFORMS[0]), per_row, per_row, logits)
    module, sizes = emulated.module, {"rows": 1, "columns": 2**20, "row_stride": 2**20, "first_column": 0}
    tile = module.Tile(logits=(1, "float32"), **sizes, bias=0, target=1)
    with pytest.raises(ValueError, match="a per-row array is missing"):
        module.statistics(tile, module.Transform(1.0, 1.0, False), (1, 1, 1), 0, 0)
    with pytest.raises(ValueError, match="2 per-row arrays are none of what the kernel takes"):
        module.statistics(tile, module.Transform(1.0, 1.0, False), (1, 1), 1, 0)
    with pytest.raises(ValueError, match="dtype 'int32' is none of"):
        module.Tile(logits=(1, "int32"), **sizes, bias=0, target=1)


# ------------------------------------------------------------------------------------------------------------ samples


@settings(max_examples=80, deadline=None)
@given(**fold_contract.sampled_strategies(rows=4, widths=[1, 2, 3, 7, 8, 9, 15, 17, 33, 255, 1000, 4095, 4097, 8193]))
def test_samples_of_ragged_tiles_at_any_alignment(emulated, **case):
    fold_contract.check_samples(emulated, "cpu", **case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("around", [-1, 0, 1])
def test_samples_around_a_whole_number_of_chunks(emulated, dtype, around):
    for offset in (0, 1, 7):
        fold_contract.check_samples(
            *(emulated, "cpu"),
            **{"rows": 2, "widths": [2 * SAMPLE_CHUNK[dtype] + around], "offset": offset, "padding": 1, "dtype": dtype},
            **{"transform": TRANSFORMS[1], "with_bias": True, "masked": 0.0, "scale": 3.0, "seed": 2},
        )


@pytest.mark.parametrize("around", [-1, 0, 1, 300])
def test_samples_of_more_than_one_stretch(emulated, around):
    widths = [256 * SAMPLE_CHUNK[torch.float64] + around]
    fold_contract.check_samples(
        *(emulated, "cpu"),
        **{"rows": 2, "widths": widths, "offset": 1, "padding": 1, "dtype": torch.float64, "transform": TRANSFORMS[0]},
        **{"with_bias": False, "masked": 0.0, "scale": 6.0, "seed": 3},
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_sampling_is_unbiased(emulated, transform):
    for dtype in DTYPES:
        fold_contract.check_sampling_is_unbiased(emulated, "cpu", dtype, transform, draws=64)


def test_extreme_samples(emulated):
    fold_contract.check_extreme_samples(emulated, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [37, 1032])
def test_products_of_samples(emulated, dtype, width):
    fold_contract.check_sample_products(emulated, "cpu", dtype, width=width)


def test_products_of_more_lists_than_blocks(emulated):
    """Blocks sum up several lists, some empty, one longer than what the threads of a block fetch at a time."""
    fold_contract.check_sample_products(emulated, "cpu", torch.float32, rows=150, vocab=20000, width=9)
    # Lists of rows lie apart in memory, those of columns one after the other.
    fold_contract.check_sample_products(emulated, "cpu", torch.float32, rows=17000, vocab=40, width=9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_threads_changes_no_sample(emulated, monkeypatch, dtype):
    logits, _ = random_tile(3, 2 * SAMPLE_CHUNK[dtype] + 77, dtype, "cpu", offset=1)
    target, uniform = torch.tensor([3, -1, 9001]) % logits.shape[1], torch.tensor([0, 0.5, 0.75], dtype=torch.float64)
    lse = exact_fold(logits, target, uniform, TRANSFORMS[2])[0]
    arguments = (target, lse, uniform, 2.0**-8, TRANSFORMS[2], None, [77, logits.shape[1] - 77])

    def run():
        samples, running = fold_contract.fold_sample(emulated, logits, *arguments)
        out = torch.full((3, 70), math.nan)
        emulated.sample_hidden(samples, torch.ones(logits.shape[1], 70), out)
        return *samples, running, out

    for results in zip(*in_every_order(monkeypatch, run), strict=True):
        assert all(torch.equal(x, results[0]) for x in results)


def test_more_entries_than_there_is_room_for_are_left_out(emulated):
    """Where lse is not that of the logits: memory of the next row is not written."""
    logits, target = torch.zeros(2, 5000), torch.tensor([7, -1])
    zeros = torch.zeros(2, dtype=torch.float64)
    samples, _ = fold_contract.fold_sample(emulated, logits, target, zeros, zeros, 0.5, TRANSFORMS[0], None, [5000])
    assert samples.counts.tolist() == [samples.columns.shape[1], 0]
    assert samples.columns.tolist() == [list(range(samples.columns.shape[1])), [-1] * samples.columns.shape[1]]


def test_the_binding_refuses_samples_that_do_not_fit(emulated):
    module = emulated.module
    tile = module.Tile(logits=(1, "float32"), rows=1, columns=4, row_stride=4, first_column=0, bias=0, target=1)
    transform = module.Transform(1.0, 1.0, False)

    def samples(rows, dtype):
        return module.Samples(1, (1, dtype), 1, (rows, 3))

    for found, message in (
        ((samples(2, "float32"), (1, 1), 0.5), "tile and samples differ in rows"),
        ((samples(1, "float64"), (1, 1), 0.5), "values of samples are float64 beside float64"),
        ((samples(1, "float32"), (1,), 0.5), "the kernel takes lse and running sums"),
        ((samples(1, "float32"), (1, 0), 0.5), "a per-row array is missing"),
        ((samples(1, "float32"), (1, 1), 1.5), "the floor lies between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            module.sample(tile, transform, *found, 0)
    matrix = module.Matrix((1, "bfloat16"), (3, 8), 8)
    for lists, value, out, message in (
        ((1, 1), (1, "float32"), matrix, "lists are start, stop and source_row"),
        ((0, 1, 1), (1, "float32"), matrix, "a per-row array is missing"),
        ((1, 1, 1), (1, "float64"), matrix, "float32 beside what is narrower"),
        ((1, 1, 1), (1, "bfloat16"), matrix, "float32 beside what is narrower"),
        ((1, 1, 1), (1, "float32"), module.Matrix((1, "float16"), (3, 8), 8), "has the dtype of its matrix or of"),
        (
            (1, 1, 1),
            (1, "float32"),
            module.Matrix((1, "bfloat16"), (3, 7), 8),
            "sizes of matrix and product do not fit",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module.sum_rows(lists, value, matrix, out, 0)


# --------------------------------------------------------------------------------------- addresses of more than 31 bits

ROWS, VOCAB = 2**17, 2**18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_of_2_to_the_35_logits(emulated, dtype):
    """A block per row, so the longest sums there are; equal terms round the same way in all of them."""
    logits, counted = sparse(ROWS * VOCAB, dtype).view(ROWS, VOCAB), [0, ROWS // 2 + 1, ROWS - 1]
    logits[counted] = torch.randn(3, VOCAB).to(dtype)
    logits[ROWS // 2 + 1] = 0.3
    logits[ROWS // 2 + 1, 5] = 1
    target = torch.full((ROWS,), -1)
    target[counted] = torch.tensor([1, VOCAB - 1, 77])
    lse, at_target, *_ = exact_fold(logits[counted], target[counted], torch.ones(3).double(), TRANSFORMS[0], None)
    statistics = fold_statistics(emulated, logits, target, TRANSFORMS[0], None, [VOCAB])
    torch.testing.assert_close(statistics.lse[counted], lse, rtol=2e-6, atol=0)
    torch.testing.assert_close(statistics.chosen[counted], at_target, rtol=0, atol=0)
    assert (statistics.total == 0).sum() == ROWS - 3


def test_gradient_of_rows_2_to_the_33_apart(emulated):
    memory = sparse(ROWS * VOCAB, torch.bfloat16)
    first, second = (torch.as_strided(memory, (4, 300), (ROWS // 4 * VOCAB, 1), 1000 * i) for i in range(2))
    first.copy_(torch.randn(4, 300))
    target, coefficient = torch.tensor([0, 1, 2, 299]), torch.randn(4, dtype=torch.float64)
    lse, _, _, gradient = exact_fold(first, target, coefficient, TRANSFORMS[0], None)
    emulated.fold_gradient(Tile(first, target, TRANSFORMS[0]), lse, coefficient, second)
    assert ((second.double() - gradient).abs() <= gradient.abs() * 2**-7 + 1e-12).all()


def test_sums_of_sequences_2_to_the_33_apart(emulated):
    stride, shape = 2**33, (3, 50)
    logp = torch.as_strided(sparse(3 * stride, torch.float32), shape, (stride, 1))
    target = torch.as_strided(sparse(3 * stride, torch.int64), shape, (stride, 1))
    logp.copy_(torch.randn(shape))
    target[1, :20] = -100
    sums, counts = emulated.sequence_sums(logp, target, -100)
    expected, expected_counts = reference.sequence_sums(logp, target, -100)
    torch.testing.assert_close(sums, expected)
    assert torch.equal(counts, expected_counts)


# ------------------------------------------------------------------------------------------------------------- batch


@given(**test_batch.LABEL_STRATEGIES)
@settings(deadline=None, max_examples=60)
def test_label_statistics_are_what_plain_torch_computes(emulated, **options):
    test_batch.assert_same(test_batch.random_labels(**options, dtypes=test_batch.FLOATS), "cpu")


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2], id="one pair"),
        pytest.param([2] * 300, id="pairs of more threads than a block has"),
        pytest.param([700], id="one large group"),
        pytest.param([2, 200, 3, 57], id="very unequal groups"),
    ],
)
def test_groups_of_any_number_and_size(emulated, sizes):
    test_batch.test_groups_of_any_number_and_size("cpu", sizes)


def test_more_objectives_than_a_block_has_warps(emulated):
    test_batch.assert_same(test_batch.random_labels(3, [2, 3, 4], objectives=21, unlabelled=0.3), "cpu")


@pytest.mark.parametrize(("field", "index", "value"), test_batch.BAD)
def test_bad_values_are_flagged(emulated, field, index, value):
    assert test_batch.values_of(test_batch.changed(field, index, value), "cpu")[1].valid == 0


def test_the_order_of_threads_changes_no_bit_of_label_statistics(emulated, monkeypatch):
    labels = test_batch.random_labels(5, [2, 3, 5] * 40, unlabelled=0.2, eps=0.1)
    runs = in_every_order(monkeypatch, lambda: emulated.label_statistics(labels))
    for results in zip(*runs, strict=True):
        assert all(torch.equal(x, results[0]) for x in results)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, 1), (4, 255), (3, 256), (2, 3000)])
@pytest.mark.parametrize("dtype", test_batch.FLOATS)
def test_sequence_sums(emulated, rows, columns, dtype):
    logp, target = torch.randn(rows, columns + 3, dtype=dtype)[:, 2:-1], torch.randint(0, 3, (rows, columns + 1))[:, 1:]
    expected, expected_counts = reference.sequence_sums(logp, target, 0)
    sums, counts = emulated.sequence_sums(logp.masked_fill_(target == 0, math.nan), target, 0)
    torch.testing.assert_close(sums, expected, **test_batch.SUMS)
    assert torch.equal(counts, expected_counts)


TEAM_TEST = """
#include <cstdio>
#include "launch.cuh"
#include "team.cuh"

template <int THREADS>
__global__ void rounds(int* wrong, int64_t* memory) {  // the same calls again and again, by warps that do not wait
    const mopo::Team<THREADS> team;
    int64_t* own = memory + 1001 * (threadIdx.x / THREADS);
    for (int64_t n : {0, 1, 31, 32, 33, 500, 1000}) {
        team.for_each(n, [&](int64_t i) { own[i] = i + n; });
        double total[2];
        team.sum(n, total, [&](int64_t i, double* sum) { sum[0] += own[n - 1 - i] - n, sum[1] += n; });
        *wrong += total[0] != n * (n - 1) / 2 || total[1] != n * n;
        team.once([&] { own[1000] = n; });
        *wrong += own[1000] != n;
        *wrong += team.max(n, [&](int64_t i) { return i % 7 - n; }) != (n == 0 ? -INFINITY : (n < 7 ? n - 1 : 6) - n);
        *wrong += team.min(n, [&](int64_t i) { return n - i; }) != (n == 0 ? INFINITY : 1);
    }
}

int main() {
    int wrong = 0;
    int64_t memory[2002];
    mopo::launch(rounds<mopo::WARP>, 1, 64, nullptr, &wrong, memory);
    mopo::launch(rounds<256>, 2, 256, nullptr, &wrong, memory);
    std::printf("%d", wrong);
}
"""


@pytest.mark.parametrize("order", ORDERS)
def test_reductions_of_a_team_follow_each_other(tmp_path, monkeypatch, order):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    monkeypatch.setenv("EMULATED_ORDER", order)
    source, program = tmp_path / "team.cpp", tmp_path / "team"
    source.write_text(TEAM_TEST)
    folder = ROOT / "csrc" / "cuda"
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", f"-I{EMULATION}", f"-I{folder}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout == "0"


# -------------------------------------------------------------------------------------------------------------- nvcc

# 85 registers leave three blocks of 256 threads on a multiprocessor, 128 two; label statistics are one block in all.
REGISTERS = {"statistics_kernel": 85, "gradient_kernel": 85, "sample_kernel": 128, "sequence_sums_kernel": 64}
REGISTERS["sum_rows_kernel"] = 64  # of 128 threads
REGISTERS["gradient_kernel<float64, more>"] = 128


@needs_nvcc
@pytest.mark.parametrize(
    "names", [["9.0a"], pytest.param(BUILD["CUDA_ARCHS"].split(), marks=pytest.mark.slow)], ids=["9.0a", "all"]
)
def test_no_kernel_spills_and_registers_leave_room_for_several_blocks(names):
    resources = cuda_report.kernel_resources(names)
    assert len(resources) == 36 * len(names)
    for found in resources:
        assert found.spill_bytes == found.stack_bytes == 0, found
        assert found.registers <= REGISTERS.get(found.kernel, REGISTERS.get(found.kernel.split("<")[0], 168)), found
    assert cuda_report.resource_table(resources).count("\n") == 37


@needs_nvcc
def test_logits_are_read_and_written_16_bytes_at_a_time():
    command = [BUILD["find_nvcc"](), "-ptx", *BUILD["NVCC_FLAGS"], "-arch=compute_90", "csrc/cuda/fold.cu", "-o", "-"]
    ptx = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"\.entry \w*?\d(statistics|gradient)_kernel(.*?)\n}", ptx, re.DOTALL)
    assert len(kernels) == 16
    wide = r"\.global\.(v4\.[bfu]32|v2\.[bfu]64)"
    for name, body in kernels:
        assert len(re.findall("ld" + wide, body)) >= 4
        assert name == "statistics" or len(re.findall("st" + wide, body)) >= 4


def test_architectures_become_options_of_nvcc():
    options = BUILD["code_generation"](["8.0", "9.0a", "12.0+PTX"])
    codes = [("80", "sm_80"), ("90a", "sm_90a"), ("120", "sm_120"), ("120", "compute_120")]
    assert options == [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]
    with pytest.raises(SystemExit, match=r"MOPO_CUDA_ARCHS must be like .* got 'sm_90'"):
        BUILD["code_generation"](["sm_90"])


def build_script(monkeypatch, **environment):
    """What setup.py defines in this environment."""
    for name in ("MOPO_BUILD_CUDA", "MOPO_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py", run_name="build_options")


def test_a_forced_build_says_what_is_missing(monkeypatch):
    with pytest.raises(SystemExit, match="MOPO_BUILD_CUDA=1, but nvcc is missing: install the CUDA toolkit"):
        build_script(monkeypatch, MOPO_BUILD_CUDA="1", CUDA_HOME="/nowhere")["cuda_extensions"]()


def test_without_nvcc_or_a_torch_with_cuda_the_kernels_are_left_out(monkeypatch, capsys):
    assert build_script(monkeypatch, CUDA_HOME="/nowhere")["cuda_extensions"]() == []
    assert "nvcc is missing" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", None)
    if BUILD["find_nvcc"]():
        assert build_script(monkeypatch)["cuda_extensions"]() == []
        assert "no torch with CUDA is in sight" in capsys.readouterr().err


@needs_nvcc
@pytest.mark.parametrize(("version", "built"), [("99.0", True), ("1.0", False)])
def test_nvcc_must_not_be_newer_than_torch(monkeypatch, version, built):
    monkeypatch.setattr(torch.version, "cuda", version)
    assert bool(build_script(monkeypatch)["cuda_extensions"]()) == built
    (extension,) = build_script(monkeypatch, MOPO_BUILD_CUDA="1", MOPO_CUDA_ARCHS="8.9")["cuda_extensions"]()
    assert not extension.optional
    assert [x for x in extension.extra_compile_args if "gencode" in x] == ["-gencode=arch=compute_89,code=sm_89"]
    assert '-DMOPO_CUDA_ARCHS="8.9"' in extension.extra_compile_args
    assert build_script(monkeypatch, MOPO_BUILD_CUDA="0")["cuda_extensions"]() == []


@needs_nvcc
@pytest.mark.slow
def test_the_extension_knows_its_architectures_and_is_built_again_for_others(tmp_path):
    def build(architectures):
        command = [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            str(tmp_path),
            "--build-temp",
            f"{tmp_path}/t",
        ]
        environment = os.environ | {"MOPO_BUILD_CUDA": "1", "MOPO_CUDA_ARCHS": architectures}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        (module,) = (tmp_path / "mopo_kernels").glob("_cuda*")
        return module.read_bytes(), module.stat().st_mtime_ns

    first, written = build("9.0a")
    assert b"9.0a\0" in first
    assert build("9.0a")[1] == written
    assert b"8.0+PTX\0" in build("8.0+PTX")[0]


def test_code_runs_on_gpus_of_its_architecture_and_ptx_on_later_ones(monkeypatch):
    fits = {"8.0": [(8, 0), (8, 6)], "8.6": [(8, 6)], "9.0a": [(9, 0)], "12.0+PTX": [(12, 0), (12, 1), (13, 0)]}
    for name, gpus in fits.items():
        every = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (12, 1), (13, 0)]
        assert [gpu for gpu in every if native.runs_on(name, gpu)] == gpus
    monkeypatch.setattr(native, "ARCHITECTURES", ("8.0", "9.0a"))
    monkeypatch.setattr(cuda, "UNAVAILABLE", "")
    native.unfit_for.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r'built for 8\.0, 9\.0a and this GPU is 7\.5.*MOPO_CUDA_ARCHS="7\.5"'):
        backends.choose("label_statistics", "cuda", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backends.choose("label_statistics", "cuda", "cuda").backend == "cuda"
    native.unfit_for.cache_clear()


@pytest.mark.skipif(not UNAVAILABLE, reason="the extension is built")
def test_the_backend_says_how_to_build_it():
    assert "MOPO_BUILD_CUDA=1 pip install --no-build-isolation" in UNAVAILABLE


def test_every_kernel_is_in_the_extension_and_the_source_distribution():
    assert set(BUILD["CUDA_SOURCES"]) == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu")}
    patterns = (ROOT / "MANIFEST.in").read_text().split()
    files = [path for path in itertools.chain((ROOT / "csrc").rglob("*.*")) if path.is_file()]
    assert all(f"*{path.suffix}" in patterns for path in files), files
