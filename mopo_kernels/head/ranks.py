"""How a split LM head enters: as a DTensor, or as this process's rows of the weight with the group that holds the rest.

    rows="same"   every process has the same hidden states and targets (tensor parallel). Each returns the same
                  log-probabilities, and grad_hidden is complete on each.
    rows="own"    every process has a batch of its own (data parallel, FSDP). Rows that count are gathered, each process
                  works on all of them with its part of the vocabulary, and gets back what is its own. The gradients of
                  weight and bias are means over the processes, as DDP and FSDP form them.

Before any work the processes compare what they were called with: 240 bytes each, 16 more for each tensor of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mopo_kernels.backends.reference import RowValues
from mopo_kernels.checks import check_choice
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.ops import run_head_logprob
from mopo_kernels.head.plan import default_workspace
from mopo_kernels.head.rows import rows_that_count, take
from mopo_kernels.head.sampled import run_sampled_logprob
from mopo_kernels.head.shard import Shard, add_up, gather, group_of, number_of

RowsOf = Literal["same", "own"]
COMPILER = "processes that share an LM head compare their arguments"  # torch.compile breaks the graph there
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AGREEMENT = 1e-3  # of sums of what may be rounded otherwise elsewhere


class Split(NamedTuple):
    """How a head is split over processes, as a caller says it."""

    vocab_group: dist.ProcessGroup | None
    rows: RowsOf
    same: Sequence[Tensor | None] = ()  # what else must be the same everywhere where rows are

    def concerns(self, weight: Tensor) -> bool:
        return self.vocab_group is not None or _is_dtensor(weight)


class _Part(NamedTuple):
    """What a process holds of a head, and with whom."""

    group: dist.ProcessGroup
    is_split: bool  # or everybody has all of it


@torch.compiler.disable(reason=COMPILER)
def take_part(inputs: HeadInputs, split: Split) -> tuple[HeadInputs, _Part]:
    """The process's own tensors in place of DTensors.

    Raises:
        ValueError: DTensors of other layouts, or beside tensors that are none.
    """
    check_choice("rows", split.rows, ("same", "own"))
    if _is_dtensor(inputs.hidden) or _is_dtensor(inputs.target):
        raise ValueError("hidden and target are this process's rows, no DTensors: hand over hidden.to_local()")
    weight, bias = inputs.weight, inputs.bias
    if split.vocab_group is not None:
        if _is_dtensor(weight) or _is_dtensor(bias):
            raise ValueError("vocab_group goes with a local part of the weight; a DTensor knows its own group")
        if split.rows == "own":
            world = dist.get_world_size(split.vocab_group)
            weight, bias = _divided(weight, world), None if bias is None else _divided(bias, world)
        return inputs._replace(weight=weight, bias=bias), _Part(split.vocab_group, True)
    part = _layout(weight, split.rows)
    if bias is not None and not (_is_dtensor(bias) and _placements(bias) == _placements(weight)):
        raise ValueError("bias must be a DTensor that is split as weight is")
    own = split.rows == "own"
    return inputs._replace(weight=_local(weight, own), bias=None if bias is None else _local(bias, own)), part


@torch.compiler.disable(reason=COMPILER)
def agree(inputs: HeadInputs, call: HeadCall, split: Split, part: _Part) -> HeadCall:
    """The call with its shard, once the processes have found that they speak of the same.

    Raises:
        ValueError: on every process, where options differ, a target of any is out of range, or rows differ and
            rows="own" does not say so.
    """
    if call.backend == "reference":
        raise ValueError("backend='reference' has no split LM heads: leave backend out, or gather the weight")
    world, rank = dist.get_world_size(part.group), dist.get_rank(part.group)
    workspace = call.workspace_bytes or default_workspace(inputs.weight.device, len(inputs.weight))
    options = [*replace(call, workspace_bytes=None).flat(), inputs.hidden.shape[-1], inputs.bias is not None]
    numbers = [inputs.weight.shape[0], workspace, *options, DTYPES.index(inputs.weight.dtype)]
    said = torch.cat([torch.tensor(numbers, dtype=torch.float64, device=inputs.weight.device), _marks(inputs, call)])
    said = torch.cat([said, *(_sum_mark(x) for x in split.same if x is not None)])
    table = gather(said, part.group).cpu()
    columns, settings, extremes, rows = table.split([2, len(numbers) - 2, 2, table.shape[1] - len(numbers) - 2], 1)
    if not (settings == settings[0]).all():
        raise ValueError("the processes that share this LM head call it with different options, dtypes or gradients")
    sizes = [int(x) for x in columns[:, 0]]
    vocab = sum(sizes) if part.is_split else sizes[0]
    _check_extremes(extremes, vocab)
    if split.rows == "same":
        _check_same(rows)
    call = replace(call, workspace_bytes=int(columns[:, 1].min()))
    if not part.is_split or world == 1:
        return call
    shard = Shard(number_of(part.group), sum(sizes[:rank]), vocab, max(sizes), split.rows == "own")
    return replace(call, shard=shard)


@torch.compiler.disable(reason=COMPILER)
def run_own_rows(inputs: HeadInputs, call: HeadCall) -> RowValues:
    """`run_head_logprob` of this process's rows, for which the others' parts of the vocabulary come together here."""
    hidden, _, _, target = inputs
    group = group_of(cast(Shard, call.shard).group)
    counted = rows_that_count(target, call.ignore_index)
    count = target[counted].numel()
    most = max(int(gather(torch.tensor(count, device=target.device), group).max()), 1)
    padded = torch.nn.functional.pad(take(hidden, counted, hidden.dtype), (0, 0, 0, most - count))
    targets = torch.nn.functional.pad(target[counted], (0, most - count), value=call.ignore_index)
    everybody = inputs._replace(hidden=_GatheredRows.apply(padded, group), target=gather(targets, group).view(-1))
    is_sampled = call.grad_sampling is not None and any(call.needs)
    values = (run_sampled_logprob if is_sampled else run_head_logprob)(everybody, call)

    def mine(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        own = _OwnRows.apply(x, group)[:count]
        return own.new_zeros(target.shape).index_copy(0, torch.arange(len(target), device=x.device)[counted], own)

    return RowValues(*map(mine, values))


# ------------------------------------------------------------------------------------------------------------- layouts


def _is_dtensor(x: Tensor | None) -> bool:
    return type(x).__name__ == "DTensor"  # whose module is slow to import, and not there in every build


def _placements(x: Any) -> tuple[Any, ...]:
    return tuple(x.placements)


def _layout(weight: Any, rows: RowsOf) -> _Part:
    """Who holds the rest of a DTensor that is split by rows, or not at all."""
    mesh, placements = weight.device_mesh, weight.placements
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    known = all(type(placements[i]).__name__ == "Shard" and placements[i].dim == 0 for i in split)
    if not known or len(split) > 1 or (mesh.ndim > 1 and rows == "same"):
        raise ValueError(
            f"weight is a DTensor {placements} on a mesh {tuple(mesh.shape)}; an LM head takes Shard(0) or Replicate() "
            "on one dimension, beside replicas with rows='own': redistribute it, or give full_tensor()"
        )
    return _Part(mesh.get_group(split[0] if split else 0), bool(split))


def _local(x: Tensor, own_rows: bool) -> Tensor:
    return cast(Tensor, _Local.apply(x, own_rows))


class _Local(torch.autograd.Function):
    """A DTensor's local part; its gradient is a DTensor of the same layout, the processes' mean where rows differ."""

    @staticmethod
    def forward(ctx: Any, x: Any, own_rows: bool) -> Tensor:
        ctx.mesh, ctx.placements, ctx.own_rows = x.device_mesh, x.placements, own_rows
        ctx.shape, ctx.stride = x.shape, x.stride()
        return x.to_local().detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, None]:
        from torch.distributed.tensor import DTensor

        if ctx.own_rows:
            for i, placement in enumerate(ctx.placements):
                if placement.is_replicate():
                    gradient = add_up(gradient.clone(), ctx.mesh.get_group(i))
            gradient = gradient / ctx.mesh.size()
        layout = {"run_check": False, "shape": ctx.shape, "stride": ctx.stride}
        return DTensor.from_local(gradient, ctx.mesh, ctx.placements, **layout), None


def _divided(x: Tensor, divisor: int) -> Tensor:
    """x, whose gradient by the rows of all processes becomes the mean of theirs."""
    return cast(Tensor, _Divided.apply(x, divisor))


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


# ---------------------------------------------------------------------------------------------------------------- rows


class _GatheredRows(torch.autograd.Function):
    """Rows of all processes; the gradient comes back complete, so that each keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank = dist.get_rank(group)
        ctx.rows = len(x)
        return gather(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rank * ctx.rows :][: ctx.rows], None


class _OwnRows(torch.autograd.Function):
    """This process's rows of all; the gradients by theirs are gathered, for each adds up all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view(dist.get_world_size(group), -1)[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather(gradient, ctx.group).view(-1), None


# ---------------------------------------------------------------------------------------------------------- comparison


def _marks(inputs: HeadInputs, call: HeadCall) -> Tensor:  # float64
    """The least and largest target; then what is the same where rows are: targets, and the sum of two hidden states."""
    hidden, _, _, target = inputs.flattened()
    if len(target) == 0:
        return hidden.new_zeros(6, dtype=torch.float64)
    counts = target != call.ignore_index
    place = torch.arange(len(target), device=target.device)
    known = torch.where(counts, target, 0)
    extremes = torch.stack([known.amin(), known.amax()])
    mixed = (torch.where(counts, target, -1) + 2) * ((place * 2654435761) % 2**31 + 1)
    exact = torch.stack([counts.sum(), mixed.sum() % 2**52])
    ends = torch.stack([torch.where(counts, place, len(target)).amin(), torch.where(counts, place, -1).amax()])
    two = hidden[ends.clamp(0, len(target) - 1)] * counts.any()
    return torch.cat([extremes.double(), exact.double(), _sum_mark(two.detach())])


def _sum_mark(x: Tensor) -> Tensor:  # [2] float64
    """A sum that tells tensors apart, and how large it could be."""
    flat = torch.nan_to_num(x.detach().double()).flatten()
    signs = torch.cos(torch.arange(flat.numel(), dtype=torch.float64, device=x.device) ** 2 + 1)
    return torch.stack([(flat * signs).sum(), flat.abs().sum()])


def _check_extremes(extremes: Tensor, vocab: int) -> None:
    outside = extremes[(extremes < 0) | (extremes >= vocab)]
    if len(outside):
        raise ValueError(f"target holds {int(outside[0])}, outside [0, {vocab}) for a head of {vocab} rows")


def _check_same(rows: Tensor) -> None:  # [W, 2 + 2 · tensors]
    exact, sums = rows[:, :2], rows[:, 2:].unflatten(1, (-1, 2))
    values, scales = sums.unbind(-1)
    close = (values - values[0]).abs() <= AGREEMENT * scales.amax(0)
    if not (exact == exact[0]).all():
        raise ValueError(
            f"the processes that share this LM head hold different rows ({', '.join(str(int(x)) for x in exact[:, 0])} "
            "that count): with a batch each (data parallel, FSDP) give rows='own'; rows='same' means one batch for all"
        )
    if not close.all():
        raise ValueError(
            "the processes that share this LM head hold other hidden states or labels for the same targets (dropout of "
            "different seeds?): make them the same, or give rows='own' if each has a batch of its own"
        )
