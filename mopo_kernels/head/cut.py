"""The cut engine: kernels that keep the logits on the chip (backends/triton/cut.py) take whole blocks of rows.

8·N·H·V flops, forward and backward: the logits are formed again, and never written.
"""

from __future__ import annotations

from torch import Tensor

from mopo_kernels.backends.fold import Statistics
from mopo_kernels.backends.triton import cut
from mopo_kernels.head.call import Gradients, HeadCall, HeadInputs
from mopo_kernels.head.plan import accumulate_dtype
from mopo_kernels.head.rows import Rows, put, take


class CutEngine:
    """An engine without a tile. Its temporaries are what is gathered of a block and the sum of the block's gradient."""

    def __init__(self, inputs: HeadInputs, call: HeadCall, *, row_block: int) -> None:
        self.inputs, self.call, self.row_block = inputs, call, row_block
        self.bias = None if inputs.bias is None else inputs.bias.to(accumulate_dtype(inputs.weight.dtype)).contiguous()
        self.grad_hidden = inputs.hidden.new_zeros(inputs.hidden.shape) if call.needs[0] else None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def statistics(self, rows: Rows) -> Statistics:
        return cut.cut_statistics(self._block(rows))

    def add(self, rows: Rows, lse: Tensor, coefficient: Tensor, lse_coefficient: Tensor | None = None) -> None:
        if lse_coefficient is not None:
            raise NotImplementedError("the cut kernels have no gradient of lse: give the call to the tile engine")
        gradients = cut.cut_gradients(self._block(rows), lse, coefficient, self.call.needs)
        if self.grad_hidden is not None and gradients[0] is not None:
            put(self.grad_hidden, rows, gradients[0])
        self.grad_weight, self.grad_bias = _sum(self.grad_weight, gradients[1]), _sum(self.grad_bias, gradients[2])

    def finish(self) -> Gradients:
        _, weight, bias, _ = self.inputs
        return (
            self.grad_hidden,
            _finished(self.grad_weight, weight, self.call.needs[1]),
            _finished(self.grad_bias, bias, self.call.needs[2]),
        )

    def _block(self, rows: Rows) -> cut.CutInputs:
        hidden = take(self.inputs.hidden, rows, self.inputs.weight.dtype)
        return cut.CutInputs(hidden, self.inputs.weight, self.inputs.target[rows], self.call.transform, self.bias)


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


def _finished(total: Tensor | None, like: Tensor | None, needed: bool) -> Tensor | None:
    if not needed or like is None:
        return None
    return like.new_zeros(like.shape) if total is None else total.to(like.dtype)
