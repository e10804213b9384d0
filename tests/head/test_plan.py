"""The planner: within the workspace wherever blocks can be that small, one pass where rows fit, and it says why."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels.backends.fold import Transform
from mopo_kernels.head import rates
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.plan import (
    ALIGN,
    CPU_COLUMNS,
    CPU_MOST,
    CPU_ROWS,
    CPU_WORKSPACE,
    GPU_WORKSPACE,
    HeadSizes,
    default_workspace,
    fits_kept,
    make_plan,
    seconds,
)
from mopo_kernels.head.rates import Rates


def make(
    rows,
    hidden_size,
    vocab,
    *,
    dtype=torch.float32,
    compute=None,
    workspace=CPU_WORKSPACE,
    logits="fused",
    gathered=True,
    **gpu,
):
    sizes = HeadSizes(max(rows, 1), hidden_size, vocab, dtype, compute or widened(dtype), gathered, **gpu)
    return make_plan(sizes, workspace, logits)


def widened(dtype):
    return max(dtype, torch.float32, key=lambda x: x.itemsize)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(0, 10_000),
    hidden_size=st.integers(1, 8192),
    vocab=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    widen=st.booleans(),
    workspace=st.integers(2**20, 2**30),
    logits=st.sampled_from(["fused", "recompute"]),
    gpu=st.fixed_dictionaries({"on_gpu": st.booleans(), "sums_in_place": st.booleans(), "needs_weight": st.booleans()}),
)
def test_blocks_fit_the_workspace(rows, hidden_size, vocab, dtype, widen, workspace, logits, gpu):
    compute = widened(dtype) if widen and not gpu["on_gpu"] else dtype
    gpu["sums_in_place"] &= gpu["on_gpu"]
    options = {"dtype": dtype, "compute": compute, "workspace": workspace, "logits": logits}
    p = make(rows, hidden_size, vocab, **options, **gpu)
    assert gpu["on_gpu"] or p.column_block <= CPU_COLUMNS
    assert 1 <= p.row_block <= max(rows, 1)
    assert 1 <= p.column_block <= vocab
    assert p.column_block == vocab or p.column_block % ALIGN == 0
    tile = p.row_block * p.tile_columns(vocab) * compute.itemsize
    if p.lent:
        assert tile <= hidden_size * vocab * dtype.itemsize
    else:
        assert tile <= p.workspace
    smallest = 24 * hidden_size * (ALIGN + 1) + 8 * ALIGN + 100  # one row, ALIGN columns, the widest dtypes
    assert p.workspace <= max(workspace, smallest)


def test_one_pass_where_a_fair_block_of_whole_rows_fits():
    p = make(2048, 512, 32768)
    assert p.resident
    assert p.row_block * 32768 * 4 <= CPU_WORKSPACE
    assert "6·N·H·V" in p.reason
    assert make(256, 2048, 128256).resident


def test_rows_that_all_count_are_not_copied():
    assert make(256, 2048, 128256, gathered=False).row_block == 128
    assert make(2048, 512, 32768, gathered=False).row_block == 512
    assert make(256, 2048, 128256).row_block < 128


def test_rows_are_dealt_evenly():
    p = make(2048, 512, 32768)
    blocks = -(-2048 // p.row_block)
    assert p.row_block - 2048 / blocks <= 16


def test_a_small_workspace_recomputes_rather_than_multiplying_a_few_rows_at_a_time():
    p = make(2048, 512, 32768, workspace=4 * 2**20)
    assert not p.resident
    assert p.row_block >= 128
    assert "8·N·H·V" in p.reason
    assert make(4, 512, 32768, workspace=2**20).resident  # four rows are all there is, and they fit


def test_kept_logits_count_against_the_workspace():
    inputs = HeadInputs(torch.empty(256, 64), torch.empty(8192, 64), None, torch.empty(256))
    for workspace, fits in ((16 * 2**20, True), (8 * 2**20, False)):
        call = HeadCall(Transform.of(1.0), -100, workspace_bytes=workspace)
        assert fits_kept(inputs, call) == fits
    assert make(256, 64, 8192, workspace=16 * 2**20, logits="kept").row_block == 256


def test_the_cost_model_counts_what_each_engine_does():
    n, h, v = 16384, 4096, 131072
    tiles = make(n, h, v, dtype=torch.bfloat16, compute=torch.bfloat16, workspace=2**29)
    free = Rates(gemm=6e14, copy=math.inf, cut_statistics=6e14, cut_gradients=6e14)
    sizes = HeadSizes(n, h, v, torch.bfloat16, torch.bfloat16)
    assert seconds(sizes, tiles, free) == pytest.approx((6 * n * h * v / 6e14, 8 * n * h * v / 6e14))
    assert tiles.resident
    blocks = math.ceil(n / tiles.row_block)
    moved = 3 * 2 * n * v + 8 * h * v * (blocks - 1)
    by_tiles, _ = seconds(sizes, tiles, free._replace(copy=3e12))
    assert by_tiles == pytest.approx(6 * n * h * v / 6e14 + moved / 3e12)
    streamed = make(n, h, v, dtype=torch.bfloat16, compute=torch.bfloat16, workspace=2**23)
    assert seconds(sizes, streamed, free)[0] == pytest.approx(8 * n * h * v / 6e14)


def test_a_cpus_workspace_grows_with_the_vocabulary_to_as_many_rows_as_products_need():
    cpu = torch.device("cpu")
    assert default_workspace(cpu, 1000) == CPU_WORKSPACE
    assert default_workspace(cpu, 49152) == CPU_ROWS * 49152 * 4
    assert default_workspace(cpu, 10**6) == CPU_MOST
    assert default_workspace(cpu, 1000, keeps=True) == CPU_MOST
    for vocab in (32768, 49152, 128256, 151936):
        assert make(2048, 2048, vocab, workspace=default_workspace(cpu, vocab)).row_block >= 600


def test_logits_of_up_to_512_mib_wait_on_a_cpu_for_the_backward():
    for rows, fits in ((1000, True), (1100, False)):
        inputs = HeadInputs(torch.empty(rows, 64), torch.empty(2**17 - 4096, 64), None, torch.empty(rows))
        assert fits_kept(inputs, HeadCall(Transform.of(1.0), -100)) == fits


@pytest.mark.parametrize(("gib", "expected"), [(24, GPU_WORKSPACE), (80, 80 * 2**24)])
def test_the_workspace_grows_with_a_gpus_memory(gib, expected, monkeypatch):
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert default_workspace(torch.device("cuda")) == expected


def test_what_the_planner_asks_of_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    measured = {"gemm": 6e14, "copy": 3e12, "cut_statistics": 5e14, "cut_gradients": 4e14}
    monkeypatch.setattr(rates, "_table", lambda: {"sm_90": {"bfloat16": measured}})
    assert rates.rates_of(gpu, torch.bfloat16) == Rates(**measured)
    assert rates.rates_of(gpu, torch.float16) is None
    assert rates.rates_of(torch.device("cpu"), torch.bfloat16) is None


GPU = {"dtype": torch.bfloat16, "compute": torch.bfloat16, "workspace": GPU_WORKSPACE, "on_gpu": True}


def test_a_gpus_tile_stands_where_weights_gradient_will_and_costs_no_workspace():
    p = make(16384, 4096, 128256, **GPU, sums_in_place=True)
    assert (p.lent, p.resident, p.row_block, p.column_block) == (True, True, 4096, 128256)
    assert p.workspace == 4096 * 4096 * 6  # copies of counted rows and their float32 sums
    assert not make(16384, 4096, 128256, **GPU, sums_in_place=True, needs_weight=False).lent
    assert not make(16384, 4096, 128256, **GPU).lent  # products wait to be summed
    assert not make(1024, 4096, 128256, **GPU, sums_in_place=True).lent  # fits the workspace: no sums in float32
    assert not make(16384, 512, 32768, **GPU, sums_in_place=True).lent  # the workspace holds more rows
    assert not make(16384, 4096, 128256, **GPU, sums_in_place=True, logits="recompute").lent


def test_a_gpu_that_forms_logits_again_takes_square_tiles():
    p = make(65536, 4096, 128256, **GPU, sums_in_place=True, logits="recompute")
    assert not p.resident
    assert 0.9 < p.column_block / p.row_block < 1.3
    assert p.workspace > 0.95 * GPU_WORKSPACE
    few = make(1000, 4096, 128256, **GPU, sums_in_place=True, logits="recompute")
    assert few.row_block == 1000


def test_converted_panels_are_small_beside_the_workspace():
    p = make(2048, 512, 32768, dtype=torch.bfloat16)
    assert p.compute == torch.float32
    assert p.column_block * 512 * (4 + 4) <= CPU_WORKSPACE // 4  # and the product that waits to be summed
