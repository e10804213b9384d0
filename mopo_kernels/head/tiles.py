"""The tile engine: LM-head log-probabilities and their gradients, a block of rows × columns of logits at a time.

    logits = hidden · weightᵀ            vendor GEMM into a tile           2·N·H·V flops
    logp, or tile ← ∂L/∂logits           fold kernels (backends/fold.py)   N·V elements read, or read and written
    grad_hidden += tile · weight         vendor GEMM                       2·N·H·V
    grad_weight += tileᵀ · hidden        vendor GEMM                       2·N·H·V

or, where gradients are sampled, the entries of a tile in the place of its gradient, and no product (sampled.py).
Only rows that count are ever gathered; blocks come from the planner (plan.py). Gradients are summed in float32 (float64
for float64). Nothing here knows autograd: the operators that torch sees are in ops.py and policy.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.fold import Samples, Statistics, Tile
from mopo_kernels.backends.memory import new_empty
from mopo_kernels.head.call import Gradients, HeadCall, HeadInputs
from mopo_kernels.head.plan import Plan, accumulate_dtype
from mopo_kernels.head.products import add_product
from mopo_kernels.head.rows import Rows, count, put, take


class TileEngine:
    """An engine whose logits are a tile at a time in memory."""

    def __init__(
        self,
        inputs: HeadInputs,
        call: HeadCall,
        plan: Plan,
        *,
        blocks: Sequence[Rows],  # that will come
        kept: Tensor | None = None,  # [N, V] memory for the logits of all rows, which stay in it
        holds: Rows | None = None,  # the block whose logits `kept` holds already
    ) -> None:
        self.inputs, self.call, self.plan = inputs, call, plan
        self.row_block = plan.row_block
        self.fold = backends.fold(call.backend)
        self.accumulate = accumulate_dtype(inputs.weight.dtype)
        self.bias = None if inputs.bias is None else inputs.bias.to(self.accumulate).contiguous()
        self.holds = holds  # the block of rows whose logits the tile holds
        rows = max(map(count, blocks), default=0)
        shape = min(rows, plan.row_block), plan.tile_columns(self.vocab)
        self.result = new_empty(inputs.weight, inputs.weight.shape, inputs.weight.dtype) if plan.lent else None
        self.tile = self._new_tile(shape) if kept is None else kept
        needs_hidden, needs_weight, needs_bias = call.needs
        self.out: Tensor | None = None  # where gradients go that must not overwrite the logits
        if kept is not None and any(call.needs):
            self.out = new_empty(inputs.weight, (rows, plan.column_block), plan.compute)
        # A split head's sum goes on over the processes, whose parts cancel: rounded to 16 bits they would not.
        sum_dtype = inputs.hidden.dtype if call.shard is None else self.accumulate
        self.grad_hidden = inputs.hidden.new_zeros(inputs.hidden.shape, dtype=sum_dtype) if needs_hidden else None
        parts = sum(-(-count(block) // plan.row_block) for block in blocks)
        # With one block each column is summed once, so weight's own dtype will do, unless the tile stands there.
        dtype = inputs.weight.dtype if parts == 1 and not plan.lent else self.accumulate
        self.grad_weight = new_empty(inputs.weight, inputs.weight.shape, dtype) if needs_weight else None
        self.grad_bias = inputs.weight.new_zeros(self.vocab, dtype=self.accumulate) if needs_bias else None
        self.is_first = True  # nothing is summed yet

    @property
    def vocab(self) -> int:
        return self.inputs.weight.shape[0]

    def statistics(self, rows: Rows) -> Statistics:
        hidden = take(self.inputs.hidden, rows, self.plan.compute)
        target = self.inputs.target[rows]
        statistics = Statistics.start(len(target), target.device, entropy=self.call.outputs.entropy)
        for columns in self._column_blocks():
            tile = self._tile(target, columns)
            self._form(hidden, columns, tile.logits)
            self.fold.fold_statistics(tile, statistics)
        self.holds = rows
        return statistics

    def add(self, rows: Rows, lse: Tensor, coefficient: Tensor, lse_coefficient: Tensor | None = None) -> None:
        hidden = take(self.inputs.hidden, rows, self.plan.compute)
        target = self.inputs.target[rows]
        grad_hidden = self._hidden_sum(rows, hidden)
        has_logits = self.plan.resident and self.holds is rows
        for columns in self._column_blocks():
            tile = self._tile(target, columns)
            if not has_logits:
                self._form(hidden, columns, tile.logits)
            grad = tile.logits if self.out is None else self.out[: len(target), : tile.logits.shape[1]]
            self.fold.fold_gradient(tile, lse, coefficient, grad, lse_coefficient)
            if grad_hidden is not None:
                add_product(grad_hidden, grad, self._panel(columns))
            if self.grad_weight is not None:
                add_product(self.grad_weight[columns], grad.t(), hidden, overwrite=self.is_first)
            if self.grad_bias is not None:
                self.grad_bias[columns] += grad.sum(0, dtype=self.accumulate)
        if self.grad_hidden is not None and grad_hidden is not None:
            put(self.grad_hidden, rows, grad_hidden)
        self.holds = rows if self.out is not None else None
        self.is_first = False

    def sample(self, rows: Rows, lse: Tensor, running: Tensor, samples: Samples) -> None:
        """Draw a block's entries, of logits that are there or formed again; `running`: the random numbers, in place."""
        assert self.call.grad_sampling is not None
        has_logits = self.plan.resident and self.holds is rows
        hidden = None if has_logits else take(self.inputs.hidden, rows, self.plan.compute)
        target = self.inputs.target[rows]
        for columns in self._column_blocks():
            tile = self._tile(target, columns)
            if hidden is not None:
                self._form(hidden, columns, tile.logits)
            self.fold.fold_sample(tile, lse, running, self.call.grad_sampling, samples)

    def finish(self) -> Gradients:
        del self.tile  # so that its memory is free for what follows
        bias = self.inputs.bias
        if self.grad_weight is not None and self.is_first:
            self.grad_weight.zero_()
        return (
            self.grad_hidden,
            None if self.grad_weight is None else self._weight_result(self.grad_weight),
            None if self.grad_bias is None or bias is None else self.grad_bias.to(bias.dtype),
        )

    def _weight_result(self, total: Tensor) -> Tensor:
        """The sum in weight's dtype: over the tile, which nobody reads again, if that stands in the result's memory."""
        return total.to(self.inputs.weight.dtype) if self.result is None else self.result.copy_(total)

    def _new_tile(self, shape: tuple[int, int]) -> Tensor:
        if self.result is None:
            return new_empty(self.inputs.weight, shape, self.plan.compute)
        return self.result.view(-1)[: shape[0] * shape[1]].view(shape)

    def _column_blocks(self) -> Iterator[slice]:
        step = self.plan.column_block
        return (slice(first, min(first + step, self.vocab)) for first in range(0, self.vocab, step))

    def _tile(self, target: Tensor, columns: slice) -> Tile:
        """The part of the tile for these columns: each has its place only where the tile is resident."""
        width = columns.stop - columns.start
        logits = self.tile[: len(target), columns if self.plan.resident else slice(0, width)]
        bias = None if self.bias is None else self.bias[columns]
        return Tile(logits, target, self.call.transform, columns.start, bias)

    def _form(self, hidden: Tensor, columns: slice, logits: Tensor) -> None:
        torch.mm(hidden, self._panel(columns).t(), out=logits)

    def _panel(self, columns: slice) -> Tensor:  # [C, H]
        return self.inputs.weight[columns].to(self.plan.compute)

    def _hidden_sum(self, rows: Rows, hidden: Tensor) -> Tensor | None:
        """Zeros to sum the block's gradient in: those of the result, where they stand together and have the dtype."""
        if self.grad_hidden is None:
            return None
        if isinstance(rows, slice) and self.grad_hidden.dtype == self.accumulate:
            return self.grad_hidden[rows]
        return torch.zeros_like(hidden, dtype=self.accumulate)
