"""The planner: which blocks of rows and columns the tile engine works on, how often it forms the logits, and whether
the cut kernels run in its stead.

Pure functions of sizes, dtypes, memory and measured rates. Costs are in units of N·H·V flops: the logits take 2, the
gradient of hidden 2 and that of weight 2.

    fused      6   the coefficient of a row is known once its logits are: gradients are formed while they are there
    kept       6   all logits fit the workspace and wait in it for the backward
    recompute  8   the backward forms the logits again
    cut        8   so do the cut kernels, whose logits never leave the chip
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from mopo_kernels.backends import native
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.products import sums_in
from mopo_kernels.head.rates import Rates
from mopo_kernels.head.rows import Rows, count

CPU_WORKSPACE = 64 * 2**20  # at least
CPU_MOST = 512 * 2**20  # to which it grows with the vocabulary, and what logits that wait for the backward may take
CPU_ROWS = 1024  # of all columns: products of 256 are fast, but each block reads and writes weight's gradient once more
CPU_COLUMNS = 2048  # of a product of a CPU: hidden · weightᵀ of 128 rows ran at 105 GFLOP/s, of 8192 columns at 75
GPU_WORKSPACE = 512 * 2**20  # at least: 2048 rows of 128k logits in 16 bits
GPU_SHARE = 64  # this part of a GPU's memory, if that is more: the more rows, the less often the sums are read
ALIGN = 128  # column blocks are whole numbers of it
ROW_ALIGN = 16  # rows that the products take at a time
STREAM_ROWS = 1024  # of a tile that holds only some columns, on a CPU: enough to make reading the weight cheap
# Below this many rows the products, bound by reading the weight, lose more than forming the logits twice costs (8/6).
MIN_RESIDENT_ROWS = 48

Logits = Literal["fused", "kept", "recompute"]


class HeadSizes(NamedTuple):
    """What is planned for."""

    rows: int
    hidden_size: int
    vocab: int
    dtype: torch.dtype
    compute: torch.dtype  # of tile and products
    gathered: bool = True  # only some rows count, and are copied together
    on_gpu: bool = False
    sums_in_place: bool = False  # products are added to float32 sums where these stand
    needs_weight: bool = True  # its gradient is asked for

    @property
    def widest(self) -> int:
        """Columns of a product at most."""
        return self.vocab if self.on_gpu else min(self.vocab, CPU_COLUMNS)

    @classmethod
    def of(cls, inputs: HeadInputs, rows: Rows, call: HeadCall) -> HeadSizes:
        (vocab, hidden_size), weight = inputs.weight.shape, inputs.weight
        vocab = vocab if call.shard is None else call.shard.largest
        return cls(
            *(max(count(rows), 1), hidden_size, vocab, weight.dtype, compute_dtype(weight)),
            gathered=not isinstance(rows, slice),
            on_gpu=weight.is_cuda,
            sums_in_place=weight.is_cuda and not torch.compiler.is_compiling() and _sums_in_place(weight),
            needs_weight=call.needs[1],
        )


@dataclass(frozen=True)
class Plan:
    """Blocks of one call of the tile engine, and why."""

    row_block: int
    column_block: int  # columns of one product
    resident: bool  # the tile holds all columns of its rows, so statistics and gradient read the same logits
    compute: torch.dtype  # dtype of tile and products; panels of weight are converted where it differs
    workspace: int  # bytes of the temporaries
    reason: str
    lent: bool = False  # the tile stands where weight's gradient will stand, and not in the workspace

    def tile_columns(self, vocab: int) -> int:
        return vocab if self.resident else self.column_block


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums run in and log-probabilities come in: sums in 16 bits bias training."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """What products run in: float32 where that is faster than the weight's own dtype."""
    is_widened = weight.device.type == "cpu" and weight.dtype != torch.float64 and not native.multiplies(weight.dtype)
    return torch.float32 if is_widened else weight.dtype


def default_workspace(device: torch.device, vocab: int = 0, *, keeps: bool = False) -> int:
    """Bytes that temporaries may take where the caller sets no bound; `keeps`: the logits of all rows among them.

    On a CPU as many rows of float32 logits as products need to be fast; on a GPU, a share of its memory.
    """
    if device.type != "cuda":
        return CPU_MOST if keeps else min(max(CPU_WORKSPACE, CPU_ROWS * vocab * 4), CPU_MOST)
    if torch.compiler.is_compiling():  # what is traced asks the device nothing; operators plan when they run
        return GPU_WORKSPACE
    return max(GPU_WORKSPACE, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)


def _sums_in_place(weight: torch.Tensor) -> bool:
    accumulate = accumulate_dtype(weight.dtype)
    return weight.dtype == accumulate or sums_in(accumulate, weight.dtype, weight.device)


def plan_for(inputs: HeadInputs, rows: Rows, call: HeadCall, logits: Logits) -> Plan:
    """The tile engine's blocks for these rows."""
    sizes = HeadSizes.of(inputs, rows, call)
    return make_plan(sizes, _workspace(inputs, call, sizes, logits), logits)


def _workspace(inputs: HeadInputs, call: HeadCall, sizes: HeadSizes, logits: Logits) -> int:
    return call.workspace_bytes or default_workspace(inputs.weight.device, sizes.vocab, keeps=logits == "kept")


def make_plan(sizes: HeadSizes, workspace_bytes: int, logits: Logits) -> Plan:
    """Blocks whose temporaries stay within `workspace_bytes`, as far as blocks of one row and ALIGN columns can."""
    cost, vocab = _Bytes.of(sizes), sizes.vocab
    if logits == "kept":
        return _kept(sizes, cost, workspace_bytes)
    column_block = sizes.widest if cost.per_column == 0 else _aligned(workspace_bytes // 4 // cost.per_column, sizes)
    per_row = cost.per_row + vocab * cost.logit
    panels = column_block * cost.per_column
    capacity = (workspace_bytes - panels) // per_row
    lent = _lent_rows(sizes, cost, workspace_bytes - panels) if logits == "fused" and sizes.rows > capacity else 0
    if lent > max(capacity, MIN_RESIDENT_ROWS):
        row_block = _balanced(sizes.rows, lent)
        reason = f"one pass, 6·N·H·V: {row_block} rows × all {vocab} columns fit where weight's gradient will stand"
        used = row_block * cost.per_row + panels
        return Plan(row_block, column_block, True, sizes.compute, used, reason, lent=True)
    if logits == "fused" and capacity >= min(sizes.rows, MIN_RESIDENT_ROWS):
        row_block = _balanced(sizes.rows, capacity)
        reason = f"one pass, 6·N·H·V: {row_block} rows × all {vocab} columns fit the workspace"
        return Plan(row_block, column_block, True, sizes.compute, row_block * per_row + panels, reason)
    return _streamed(sizes, cost, workspace_bytes)


def fits_kept(inputs: HeadInputs, call: HeadCall) -> bool:
    """Whether the logits of all rows fit the workspace beside what the backward needs to use them."""
    sizes = HeadSizes.of(inputs, slice(0, len(inputs.target)), call)._replace(gathered=True)
    workspace = _workspace(inputs, call, sizes, "kept")
    return make_plan(sizes, workspace, "kept").workspace <= workspace


def seconds(sizes: HeadSizes, plan: Plan, rates: Rates) -> tuple[float, float]:
    """The cost model: forward and backward by the tile engine and by the cut kernels, at a GPU's measured rates.

    Tiles: the products at 6 or 8·N·H·V, whose rate has what they read and write themselves in it; the logits, read by
    the statistics' fold, read and written by the gradient's; the float32 sum of the weight's gradient, read and written
    for each block of rows after the first. Cut: statistics at 2·N·H·V and gradients at 6·N·H·V, whose measured rate has
    the atomic sums in it.
    """
    product = 2.0 * sizes.rows * sizes.hidden_size * sizes.vocab
    logits = 3 * sizes.dtype.itemsize * sizes.rows * sizes.vocab
    sums = 2 * 4 * sizes.hidden_size * sizes.vocab * (-(-sizes.rows // plan.row_block) - 1)
    tiles = product * (3 if plan.resident else 4) / rates.gemm + (logits + sums) / rates.copy
    return tiles, product / rates.cut_statistics + 3 * product / rates.cut_gradients


class _Bytes(NamedTuple):
    """What a row, a column and a logit cost in temporaries; the statistics' 64 bytes per row are left out."""

    per_row: int  # hidden and its gradient's sum, where they are copies
    per_column: int  # converted panel of weight, product waiting to be summed
    logit: int

    @classmethod
    def of(cls, sizes: HeadSizes) -> _Bytes:
        accumulate, compute, dtype = accumulate_dtype(sizes.dtype), sizes.compute, sizes.dtype
        panel = 0 if compute == dtype else compute.itemsize
        row = compute.itemsize if sizes.gathered or compute != dtype else 0
        row_sum = accumulate.itemsize if sizes.gathered or accumulate != dtype else 0
        product = 0 if dtype == accumulate or sizes.sums_in_place else accumulate.itemsize
        return cls(sizes.hidden_size * (row + row_sum), sizes.hidden_size * (panel + product), compute.itemsize)


def _lent_rows(sizes: HeadSizes, cost: _Bytes, workspace_bytes: int) -> int:
    """Rows of a tile in the memory of weight's gradient, which is not written before all sums in float32 are complete.

    A head of 16 bits has V · H elements of it, so H rows of V logits.
    """
    if not (sizes.sums_in_place and sizes.needs_weight and sizes.dtype.itemsize == 2):
        return 0
    return min(sizes.hidden_size, workspace_bytes // cost.per_row if cost.per_row else sizes.rows)


def _kept(sizes: HeadSizes, cost: _Bytes, workspace_bytes: int) -> Plan:
    rows, vocab = sizes.rows, sizes.vocab
    column_block = _aligned(workspace_bytes // 8 // (rows * cost.logit + cost.per_column), sizes)
    used = rows * (cost.per_row + vocab * cost.logit) + column_block * (rows * cost.logit + cost.per_column)
    reason = f"logits kept for the backward, 6·N·H·V: {rows} × {vocab} fit the workspace"
    return Plan(rows, column_block, True, sizes.compute, used, reason)


def _streamed(sizes: HeadSizes, cost: _Bytes, workspace_bytes: int) -> Plan:
    def columns_of(row_block: int) -> int:
        return (workspace_bytes - row_block * cost.per_row) // (row_block * cost.logit + cost.per_column)

    row_block = _balanced(sizes.rows, _square(sizes, cost, workspace_bytes) if sizes.on_gpu else STREAM_ROWS)
    least = 1 if sizes.on_gpu else 2  # columns of a tile for each of its rows
    while row_block > 1 and columns_of(row_block) < min(sizes.vocab, least * row_block):
        row_block = (row_block + 1) // 2
    column_block = _aligned(columns_of(row_block), sizes)
    used = row_block * cost.per_row + column_block * (row_block * cost.logit + cost.per_column)
    reason = f"logits formed in each pass, 8·N·H·V: {row_block} rows × {column_block} columns at a time"
    return Plan(row_block, column_block, False, sizes.compute, used, reason)


def _square(sizes: HeadSizes, cost: _Bytes, workspace_bytes: int) -> int:
    """Rows of a tile of as many columns, if there are so many: it reads and writes the sums of both gradients least."""
    per_row, logit = cost.per_row, cost.logit
    side = int((math.sqrt(per_row**2 + 4 * logit * workspace_bytes) - per_row) / (2 * logit))
    return max(1, workspace_bytes // (per_row + min(side, sizes.vocab) * logit))


def _aligned(columns: int, sizes: HeadSizes) -> int:
    return min(sizes.widest, max(ALIGN, columns // ALIGN * ALIGN))


def _balanced(rows: int, capacity: int) -> int:
    """Rows of a block when `rows` are dealt evenly to as few blocks as `capacity` allows."""
    even = -(-rows // -(-rows // capacity))
    return min(capacity, -(-even // ROW_ALIGN) * ROW_ALIGN, rows)
