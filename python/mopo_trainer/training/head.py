"""The LM head of a Hugging Face model: what enters it, and how log-probabilities come out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from mopo_kernels import sequence_logprob, token_logprob
from mopo_trainer.data.packing import IGNORE_INDEX, PackedSequences, SequenceBatch, pack
from mopo_trainer.training.adapter import head_in_use
from mopo_trainer.training.split import is_zero3


class Unfused(ValueError):
    """Why the head of a model cannot be an argument of `linear_logprob`."""


def linear_head(plain: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits.

    Raises:
        Unfused: there is none, or it is wrapped (an adapter on it) or packed (quantised).
    """
    head = head_in_use(plain.get_output_embeddings())
    if head is None:
        raise Unfused("it names no LM head (get_output_embeddings)")
    if not isinstance(head, nn.Linear):
        kind = f"{type(head).__module__.split('.')[0]} {type(head).__name__}"
        raise Unfused(f"its LM head is a {kind}, no plain linear layer (an adapter is best kept off the head)")
    if not head.weight.is_floating_point():
        raise Unfused(f"its LM head is quantised ({head.weight.dtype})")
    return head


@contextmanager
def head_input(plain: PreTrainedModel, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, the head gets `replace(its input)`; what it would have got is in the list, [R, T, H] a forward.

    Inputs of another shape, or given by name, pass untouched and uncaptured.
    """
    captured: list[Tensor] = []

    def swap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3:
            return None
        captured.append(args[0])
        return replace(args[0]), *args[1:]

    handle = linear_head(plain).register_forward_pre_hook(swap)
    try:
        yield captured
    finally:
        handle.remove()


class Forward(NamedTuple):
    """One pass of a batch through the model."""

    states: Tensor  # [R, T, H] hidden states before the head, or [R, T, V] logits
    router_loss: Tensor | None  # [] of a mixture of experts, unweighted


@dataclass(frozen=True)
class Transform:
    """What a model does to the product of its head, as `linear_logprob` takes it."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Scoring:
    """How log-probabilities of responses come out of a model; `probe.probe_scoring` measures it once."""

    pad_token_id: int
    transform: Transform | None = Transform()  # None: through the model's own logits
    share_prompt: bool = False
    router_weight: float = 0.0  # of a mixture of experts' router loss
    backend: str | None = None

    def pack(self, sequences: SequenceBatch, row_of: Tensor | None) -> PackedSequences:
        """Rows for the model; sequences of equal `row_of` share their prompt where that is exact."""
        return pack(sequences, row_of if self.share_prompt else None, self.pad_token_id)

    def forward(self, model: nn.Module, plain: PreTrainedModel, packed: PackedSequences) -> Forward:
        """Run `model`, whose wrappers (DDP) see the pass; `plain` is the model without them.

        With a transform the head makes the logits of one position only, so that [R, T, V] never exists.
        """
        inputs = packed.model_inputs(plain.config._attn_implementation, plain.dtype)
        if self.transform is None:
            output = model(**inputs, use_cache=False)
            states = output.logits
        else:
            with head_input(plain, lambda hidden: hidden[:, :1]) as captured:
                output = model(**inputs, use_cache=False)
            if not captured:
                raise Unfused("its LM head does not read hidden states [R, T, H]")
            states = captured[-1]
        last = states[:, -packed.input_ids.shape[1] :]  # adapters may run the model before, or put tokens in front
        return Forward(last, getattr(output, "aux_loss", None))

    def logp(self, plain: PreTrainedModel, states: Tensor, packed: PackedSequences) -> Tensor:  # [S]
        """log π(y|x) of every sequence, from the states of its forward pass."""
        if self.transform is not None:
            head = head_arguments(plain, states, packed, self.transform)
            hidden = head.pop("hidden")
            return as_head_pass(plain, partial(sequence_logprob, **head, backend=self.backend), hidden)
        target = _targets_of_positions(packed, states.shape[:2])
        return token_logprob(states, target, backend=self.backend).sum(-1)


def head_arguments(
    plain: PreTrainedModel, states: Tensor, packed: PackedSequences, transform: Transform
) -> dict[str, Any]:
    """Hidden states [S, L, H] of the targets, the head and its transform, as `sequence_logprob` takes them."""
    head = linear_head(plain)
    return {
        "hidden": states.flatten(0, 1)[packed.source].to(head.weight.dtype),
        "weight": head.weight,
        "target": packed.target,
        "bias": head.bias,
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
        "rows": "own",  # of a weight that FSDP leaves split
    }


def as_head_pass(plain: PreTrainedModel, function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`function(hidden)`, which reads the head's weight; under ZeRO-3 as a forward pass of the head itself.

    ZeRO-3 keeps a part of every weight and makes it whole for the passes of its module alone, forward and backward, by
    hooks on what enters and leaves `module(...)`.
    """
    head = linear_head(plain)
    if not is_zero3(head.weight):
        return function(hidden)
    attributes = vars(head)
    own = {name: value for name, value in attributes.items() if name == "forward"}
    attributes["forward"] = function
    try:
        return head(hidden)
    finally:
        del attributes["forward"]
        attributes.update(own)


def _targets_of_positions(packed: PackedSequences, shape: Sequence[int]) -> Tensor:  # [R, T]
    """The token that each position predicts, where rows hold one sequence each."""
    counts = packed.target != IGNORE_INDEX
    target = packed.target.new_full((shape[0] * shape[1],), IGNORE_INDEX)
    return target.index_copy(0, packed.source[counts], packed.target[counts]).view(shape)
