"""The two engines of an LM head, the protocol that they share, and the choice between them.

tiles   a block of rows × columns of logits at a time in memory (tiles.py)
cut     no logits in memory at all (cut.py): on request, or where rates measured on the GPU at hand say so
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.fold import Statistics
from mopo_kernels.backends.triton import cut
from mopo_kernels.head.call import Gradients, HeadCall, HeadInputs
from mopo_kernels.head.cut import CutEngine
from mopo_kernels.head.plan import HeadSizes, Logits, Plan, fits_kept, plan_for, seconds
from mopo_kernels.head.rates import rates_of
from mopo_kernels.head.rows import Rows, count, split
from mopo_kernels.head.sharded import ShardedEngine, of_shard
from mopo_kernels.head.tiles import TileEngine


class Engine(Protocol):
    """How an LM head is computed, block of rows by block of rows: a block's statistics before what is added for it."""

    row_block: int  # rows that it takes at a time

    def statistics(self, rows: Rows) -> Statistics:
        """The statistics of a block of rows."""

    def add(self, rows: Rows, lse: Tensor, coefficient: Tensor, lse_coefficient: Tensor | None = None) -> None:
        """Add ∂(Σ coefficient · logp + Σ lse_coefficient · lse) of a block of rows; all float64."""

    def finish(self) -> Gradients:
        """The sums, in the dtypes of hidden, weight and bias; None where not needed."""


def choose_backend(inputs: HeadInputs, call: HeadCall, asked: str | None, *, is_split: bool = False) -> str:
    """The table's choice, or the cut kernels where nobody asks for another and rates measured here are for them.

    With lse or entropies the cut kernels would spill registers, and they do not know of columns elsewhere: such calls
    go to Triton's tile engine. Rates are not asked under torch.compile: a choice by sizes would compile anew for each.

    Raises:
        ValueError: sampled gradients of the cut kernels, which have no logits to draw from.
    """
    weight = inputs.weight
    choice = backends.choose("linear_logprob", weight.device.type, asked, weight.dtype)
    if call.grad_sampling is not None and choice.backend == "cut":
        raise ValueError(
            f"grad_sampling={call.grad_sampling} needs logits to draw from, and backend='cut' has none in memory; "
            "leave the backend (or MOPO_BACKEND) out, or choose a tile engine ('triton', 'cuda', 'cpu')"
        )
    if call.grad_sampling is not None:
        return choice.backend
    if is_split or call.outputs.lse or call.outputs.entropy:
        return "triton" if choice.backend == "cut" else choice.backend
    if choice.requested or choice.backend == "reference" or cut.UNAVAILABLE or torch.compiler.is_compiling():
        return choice.backend
    rates = rates_of(weight.device, weight.dtype)
    if rates is None:
        return choice.backend
    rows, call = slice(0, inputs.hidden.shape[:-1].numel()), call.on(choice.backend, inputs.needs)
    by_tiles, by_cut = seconds(HeadSizes.of(inputs, rows, call), plan_for(inputs, rows, call, "fused"), rates)
    return "cut" if by_cut < by_tiles else choice.backend


def can_keep(inputs: HeadInputs, call: HeadCall) -> bool:
    """Whether the engine that the call's backend is can leave the logits for the backward, and has room for them."""
    return call.backend != "cut" and fits_kept(inputs, call)


def make_engine(
    inputs: HeadInputs,
    call: HeadCall,
    rows: Rows,
    logits: Logits,
    deal: Callable[[Any, int], Sequence[Rows]] = split,  # rows to blocks of at most so many
) -> tuple[Engine, Sequence[Rows]]:
    """The engine that the call's backend is, and the blocks in which it takes these rows."""
    if call.backend == "cut":
        row_block = max(count(rows), 1)
        return CutEngine(inputs, call, row_block=row_block), deal(rows, row_block)
    plan = plan_for(inputs, rows, call, logits)
    blocks = deal(rows, plan.row_block)
    return tile_engine(inputs, call, plan, rows, blocks=blocks), blocks


def make_kept_engine(
    inputs: HeadInputs, call: HeadCall, rows: Rows, kept: Tensor, *, is_filled: bool
) -> tuple[Engine, Sequence[Rows]]:
    """The tile engine over memory [N, V] for the logits of all rows, which another has filled or it will itself."""
    blocks, plan = [rows] if count(rows) else [], plan_for(inputs, rows, call, "kept")
    engine = tile_engine(inputs, call, plan, rows, blocks=blocks, kept=kept, holds=rows if is_filled else None)
    return engine, blocks


def tile_engine(
    inputs: HeadInputs, call: HeadCall, plan: Plan, rows: Rows, **options: Any
) -> TileEngine | ShardedEngine:
    """The tile engine, of a part of the vocabulary where the call has but that."""
    if call.shard is None:
        return TileEngine(inputs, call, plan, **options)
    return ShardedEngine(TileEngine(of_shard(inputs, call.shard), call, plan, **options), call.shard, rows)


def fused_gradients(
    engine: Engine,
    target: Tensor,  # [N]
    blocks: Sequence[Rows],  # whole groups where the coefficients need them
    coefficient: Callable[[Rows, Tensor], Tensor],  # (rows, their logp, float64) → ∂L/∂logp, float64
    record: Callable[[Rows, Statistics], None] = lambda rows, statistics: None,
) -> Tensor:  # [N] float64, 0 where no block has the row
    """Log-probabilities and, in the same pass, the gradients of a loss whose ∂L/∂logp needs one block's logp only.

    `record` is handed the statistics of all rows.
    """
    logp = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    for rows in blocks:
        parts = split(rows, engine.row_block) if count(rows) > engine.row_block else [rows]
        lse = []
        for part in parts:
            statistics = engine.statistics(part)
            logp[part] = statistics.logp
            record(part, statistics)
            lse.append(statistics.lse)
        weights = coefficient(rows, logp[rows]).split(engine.row_block)
        for part, part_lse, part_weights in zip(parts, lse, weights, strict=True):
            engine.add(part, part_lse, part_weights.contiguous())
    return logp
