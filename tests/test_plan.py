"""The planner: within the workspace wherever blocks can be that small, one pass where rows fit, and it says why."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels.plan import ALIGN, CPU_WORKSPACE, compute_dtype, fits_kept, plan


def make(rows, hidden_size, vocab, *, dtype=torch.float32, compute=None, workspace=CPU_WORKSPACE, logits="fused"):
    compute = compute or compute_dtype(dtype, multiplies_bfloat16=False)
    return plan(rows, hidden_size, vocab, dtype=dtype, compute=compute, workspace_bytes=workspace, logits=logits)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 10_000),
    hidden_size=st.integers(1, 8192),
    vocab=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    multiplies_bfloat16=st.booleans(),
    workspace=st.integers(2**20, 2**30),
    logits=st.sampled_from(["fused", "recompute"]),
)
def test_blocks_fit_the_workspace(rows, hidden_size, vocab, dtype, multiplies_bfloat16, workspace, logits):
    compute = compute_dtype(dtype, multiplies_bfloat16=multiplies_bfloat16)
    p = make(rows, hidden_size, vocab, dtype=dtype, compute=compute, workspace=workspace, logits=logits)
    assert 1 <= p.row_block <= max(rows, 1)
    assert 1 <= p.column_block <= vocab
    assert p.column_block == vocab or p.column_block % ALIGN == 0
    tile = p.row_block * p.tile_columns(vocab) * compute.itemsize
    assert tile <= p.workspace
    smallest = 24 * hidden_size * (ALIGN + 1) + 8 * ALIGN + 100  # one row, ALIGN columns, the widest dtypes
    assert p.workspace <= max(workspace, smallest)


def test_one_pass_where_a_fair_block_of_whole_rows_fits():
    p = make(2048, 512, 32768)
    assert p.resident
    assert p.row_block * 32768 * 4 <= CPU_WORKSPACE
    assert "6·N·H·V" in p.reason
    assert make(256, 2048, 128256).resident  # two blocks of 128 rows


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
    sizes = {"dtype": torch.float32, "compute": torch.float32}
    assert fits_kept(256, 64, 8192, **sizes, workspace_bytes=16 * 2**20)
    assert not fits_kept(256, 64, 8192, **sizes, workspace_bytes=8 * 2**20)
    assert make(256, 64, 8192, workspace=16 * 2**20, logits="kept").row_block == 256


@pytest.mark.parametrize(
    ("dtype", "multiplies", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
        (torch.float16, True, torch.float32),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
    ],
)
def test_products_run_in_16_bits_only_where_the_cpu_multiplies_them(dtype, multiplies, expected):
    assert compute_dtype(dtype, multiplies_bfloat16=multiplies) == expected


def test_converted_panels_are_small_beside_the_workspace():
    p = make(2048, 512, 32768, dtype=torch.bfloat16)
    assert p.compute == torch.float32
    assert p.column_block * 512 * 4 <= CPU_WORKSPACE // 4
