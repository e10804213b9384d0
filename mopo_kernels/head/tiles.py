"""The engine: LM-head log-probabilities and their gradients, a block of rows × columns of logits at a time.

    logits = hidden · weightᵀ            vendor GEMM into a tile
    logp, or tile ← ∂L/∂logits           fold kernels of the backend (backends/fold.py)
    grad_hidden += tile · weight         vendor GEMM
    grad_weight += tileᵀ · hidden        vendor GEMM

Where the plan says so, the cut kernels (backends/cut.py) do all of this for a block of rows, without a tile. Only rows
that count are ever gathered. Blocks come from the planner (plan.py). Sums of gradients are float32 (float64
for float64). Nothing here knows autograd: the operators that torch sees are in head_ops.py and policy_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.cpu import on_huge_pages
from mopo_kernels.backends.fold import Fold, Statistics, Transform
from mopo_kernels.grad_filter import drop_small_blocks
from mopo_kernels.plan import ALIGN, Plan, accumulate_dtype

Rows = torch.Tensor | slice  # where a block's rows stand in hidden: int64, or a slice, which is never copied


@dataclass(frozen=True)
class Head:
    """An LM head and how to fold its logits."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V] float32 (float64 for float64 heads)
    transform: Transform
    backend: str
    plan: Plan
    grad_filter: float | None = None

    @property
    def fold(self) -> Fold:
        return backends.fold(self.backend)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def column_blocks(self) -> Iterator[slice]:
        step = self.plan.column_block
        return (slice(first, min(first + step, self.vocab)) for first in range(0, self.vocab, step))

    def panel(self, columns: slice) -> Tensor:  # [C, H] in the plan's compute dtype
        return self.weight[columns].to(self.plan.compute)

    def bias_of(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def tile(self, rows: int) -> Tensor:
        """Uninitialised memory for the logits of a block."""
        columns = self.plan.tile_columns(self.vocab)
        tile = self.weight.new_empty(min(rows, self.plan.row_block), columns, dtype=self.plan.compute)
        return on_huge_pages(tile)

    def view(self, tile: Tensor, rows: int, columns: slice) -> Tensor:  # [R, C]
        """The part of a tile that holds these columns: each has its place only where the tile is resident."""
        return tile[:rows, columns] if self.plan.resident else tile[:rows, : columns.stop - columns.start]

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        torch.mm(hidden, self.panel(columns).t(), out=out)

    def statistics(self, hidden: Tensor, target: Tensor, tile: Tensor) -> Statistics:
        """Form the logits of a block of rows and fold them; a resident tile holds all of them afterwards."""
        if self.plan.cut:
            return backends.cut.cut_statistics(hidden, self.weight, target, self.transform, bias=self.bias)
        rows = hidden.shape[0]
        statistics = Statistics.start(rows, hidden.device)
        for columns in self.column_blocks():
            part = self.view(tile, rows, columns)
            self.logits(hidden, columns, part)
            self.fold.fold_statistics(
                part,
                target,
                statistics,
                self.transform,
                first_column=columns.start,
                bias=self.bias_of(columns),
            )
        return statistics


class GradientSum:
    """Gradients of hidden, weight and bias, those that are needed, summed over blocks."""

    def __init__(
        self, head: Head, hidden: Tensor, *, needs: Sequence[bool], blocks: int, weight_sum: Tensor | None = None
    ) -> None:
        """`weight_sum`: [V, H] in accumulate_dtype, to which weight's gradient is added instead of to a new sum."""
        needs_hidden, needs_weight, needs_bias = needs
        self.head = head
        self.needs = needs_hidden, needs_weight, needs_bias
        self.accumulate = accumulate_dtype(head.weight.dtype)
        contiguous = torch.contiguous_format
        self.hidden = torch.zeros_like(hidden, memory_format=contiguous) if needs_hidden else None
        # With one block each column is summed once, so weight's own dtype will do; a filter takes it in stripes.
        dtype = head.weight.dtype if blocks == 1 and head.grad_filter is None else self.accumulate
        self.weight = weight_sum
        if needs_weight and weight_sum is None and not head.plan.cut:
            self.weight = on_huge_pages(torch.empty_like(head.weight, dtype=dtype, memory_format=contiguous))
        self.bias = head.weight.new_zeros(head.vocab, dtype=self.accumulate) if needs_bias else None
        self.first = weight_sum is None  # nothing is summed yet

    def add(
        self,
        rows: Rows,  # [R]
        hidden: Tensor,  # [R, H], those rows
        target: Tensor,  # [R]
        lse: Tensor,  # [R] float64
        coefficient: Tensor,  # [R] float64
        tile: Tensor,  # holds the logits if the plan is resident, else room for a column block of them
        *,
        out: Tensor | None = None,  # [R, column block] where the tile must not be overwritten
    ) -> None:
        """Add ∂(Σ coefficient · logp) of a block of rows."""
        head = self.head
        if head.plan.cut:
            return self._add_cut(rows, hidden, target, lse, coefficient)
        grad_hidden = self._hidden_sum(rows, hidden)
        for columns in head.column_blocks():
            part = head.view(tile, hidden.shape[0], columns)
            if not head.plan.resident:
                head.logits(hidden, columns, part)
            bias = head.bias_of(columns)
            keep = self._kept_blocks(part, lse, bias)
            grad = part if out is None else out[: hidden.shape[0], : columns.stop - columns.start]
            head.fold.fold_gradient(
                part, target, lse, coefficient, head.transform, first_column=columns.start, bias=bias, out=grad
            )
            needed = None if keep is None else drop_small_blocks(grad, target - columns.start, keep)
            if self.bias is not None:
                self.bias[columns] += grad.sum(0, dtype=self.accumulate)
            if needed is None:
                self._products(grad, hidden, columns, grad_hidden)
            else:
                self._filtered_products(grad, hidden, columns, grad_hidden, needed)
        self._put_hidden(rows, grad_hidden)
        self.first = False

    def finish(self, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The sums, in the dtypes of hidden, weight and the caller's bias."""
        if self.first and self.needs[1]:
            self.weight = torch.zeros_like(self.head.weight, memory_format=torch.contiguous_format)
        return (
            self.hidden,
            None if self.weight is None else self.weight.to(self.head.weight.dtype),
            None if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )

    def _hidden_sum(self, rows: Rows, hidden: Tensor) -> Tensor | None:
        """Zeros to sum the block's gradient in: those of the result, where they stand together and have the dtype."""
        if self.hidden is None:
            return None
        if isinstance(rows, slice) and self.hidden.dtype == self.accumulate:
            return self.hidden[rows]
        return torch.zeros_like(hidden, dtype=self.accumulate)

    def _put_hidden(self, rows: Rows, gradient: Tensor | None) -> None:
        if self.hidden is None or gradient is None:
            return
        if isinstance(rows, Tensor):
            self.hidden.index_copy_(0, rows, gradient.to(self.hidden.dtype))
        elif not self.hidden[rows].is_set_to(gradient):
            self.hidden[rows] = gradient

    def _add_cut(self, rows: Rows, hidden: Tensor, target: Tensor, lse: Tensor, coefficient: Tensor) -> None:
        head = self.head
        grad_hidden, grad_weight, grad_bias = backends.cut.cut_gradients(
            *(hidden, head.weight, target, lse, coefficient, head.transform),
            bias=head.bias,
            needs=self.needs,
            grad_filter=head.grad_filter,
        )
        self._put_hidden(rows, grad_hidden)
        if grad_weight is not None:
            self.weight = grad_weight if self.weight is None else self.weight.add_(grad_weight)
        if self.bias is not None and grad_bias is not None:
            self.bias += grad_bias
        self.first = False

    def _kept_blocks(self, logits: Tensor, lse: Tensor, bias: Tensor | None) -> Tensor | None:
        """[stripes, column blocks] bool: where some probability reaches grad_filter; None where all blocks count."""
        head = self.head
        if head.grad_filter is None:
            return None
        return head.fold.fold_peaks(logits, lse, head.transform, block=ALIGN, bias=bias) >= head.grad_filter

    def _products(self, grad: Tensor, hidden: Tensor, columns: slice, grad_hidden: Tensor | None) -> None:
        if grad_hidden is not None:
            _add_product(grad_hidden, grad, self.head.panel(columns))
        if self.weight is not None:
            _add_product(self.weight[columns], grad.t(), hidden, overwrite=self.first)

    def _filtered_products(
        self, grad: Tensor, hidden: Tensor, columns: slice, grad_hidden: Tensor | None, needed: Tensor
    ) -> None:
        """The products over the columns that grad_filter leaves in each stripe of rows."""
        if self.weight is not None and self.first:
            self.weight[columns] = 0
        for stripe, (part, mask) in enumerate(zip(grad.split(ALIGN), needed, strict=True)):
            rows = slice(stripe * ALIGN, stripe * ALIGN + part.shape[0])
            index = mask.nonzero().squeeze(-1)
            part = part.index_select(1, index)
            if grad_hidden is not None:
                panel = self.head.weight[columns].index_select(0, index).to(self.head.plan.compute)
                _add_product(grad_hidden[rows], part, panel)
            if self.weight is not None:
                self.weight[columns].index_add_(0, index, _product(part.t(), hidden[rows]).to(self.weight.dtype))


def fused_gradients(
    head: Head,
    hidden: Tensor,  # [N, H]
    target: Tensor,  # [N]
    blocks: Sequence[Rows],  # whole groups where the coefficients need them
    coefficient: Callable[[Rows, Tensor], Tensor],  # (rows, their logp, float64) → ∂L/∂logp, float64
    sums: GradientSum,
) -> Tensor:  # [N] float64, 0 where no block has the row
    """Log-probabilities and, in the same pass, the gradients of a loss whose ∂L/∂logp needs one block's logp only."""
    logp = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    tile = head.tile(max(map(count, blocks), default=0))
    for rows in blocks:
        parts = split(rows, head.plan.row_block)
        lse = []
        for part in parts:
            statistics = head.statistics(gather(head, hidden, part), target[part], tile)
            logp[part] = statistics.logp
            lse.append(statistics.lse)
        weights = coefficient(rows, logp[rows]).split(head.plan.row_block)
        for part, part_lse, part_weights in zip(parts, lse, weights, strict=True):
            inputs = gather(head, hidden, part)
            if head.plan.resident and len(parts) > 1:  # a group larger than the tile: form its logits again
                head.statistics(inputs, target[part], tile)
            sums.add(part, inputs, target[part], part_lse, part_weights.contiguous(), tile)
    return logp


def rows_that_count(target: Tensor, ignore_index: int) -> Rows:
    rows = (target != ignore_index).nonzero().squeeze(-1)
    return slice(0, len(target)) if len(rows) == len(target) else rows


def count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def split(rows: Rows, size: int) -> Sequence[Rows]:
    """Blocks of at most `size` rows."""
    if isinstance(rows, Tensor):
        return rows.split(size) if len(rows) > 0 else ()
    return [slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]


def gather(head: Head, hidden: Tensor, rows: Rows) -> Tensor:  # [R, H]
    """Rows of hidden in the dtype that products run in."""
    chosen = hidden[rows] if isinstance(rows, slice) else hidden.index_select(0, rows)
    return chosen.to(head.plan.compute)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrite: bool = False) -> None:
    """total += left · right, or total = left · right; operands of 16 bits give one rounding per block, not per sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if overwrite else 1)
    elif overwrite:
        total.copy_(_product(left, right))
    else:
        total.add_(_product(left, right))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right in their own dtype: under autocast they have been cast as it asks for."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
