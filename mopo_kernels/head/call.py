"""What a call of the LM head is asked for: its tensors and its options, validated once and handed on whole.

Torch's operators take neither, so `HeadCall.flat` and `HeadCall.unflat` stand on either side of that border.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mopo_kernels import backends
from mopo_kernels.backends.fold import Transform
from mopo_kernels.checks import check_grad_sampling, check_positive
from mopo_kernels.head.shard import Shard

Needs = tuple[bool, bool, bool]  # whether the gradients of hidden, weight and bias are asked for
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


class Outputs(NamedTuple):
    """What is asked for beside the log-probabilities."""

    lse: bool = False
    entropy: bool = False
    hit: bool = False


NOTHING_ELSE = Outputs()


class HeadInputs(NamedTuple):
    """The tensors of a head, one row per token."""

    hidden: Tensor  # [N, H], or [*, H] before they are flattened
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [N] int64

    @property
    def needs(self) -> Needs:
        """Which gradients autograd will ask for."""
        hidden, weight, bias = (
            torch.is_grad_enabled() and x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)
        )
        return hidden, weight, bias

    def flattened(self) -> HeadInputs:
        """Leading dimensions as one."""
        return self._replace(hidden=self.hidden.reshape(-1, self.hidden.shape[-1]), target=self.target.reshape(-1))

    def autocast(self) -> HeadInputs:
        """The inputs as torch.autocast would hand them to a linear layer."""
        device = self.hidden.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)

        def cast(x: Tensor) -> Tensor:
            return x if x.dtype == torch.float64 else x.to(dtype)

        bias = None if self.bias is None else cast(self.bias)
        return HeadInputs(cast(self.hidden), cast(self.weight), bias, self.target)


_WHOLE = Shard(-1, 0, 0, 0, False)  # in numbers, a vocabulary that is not split


class _Flat(NamedTuple):
    """A HeadCall in numbers."""

    inner: float
    outer: float
    softcap: float
    ignore_index: float
    workspace_bytes: float
    average: float
    needs_hidden: float
    needs_weight: float
    needs_bias: float
    lse: float
    entropy: float
    hit: float
    grad_sampling: float
    backend: float  # its place in the table
    group: float  # what a Shard holds, or −1
    first: float
    vocab: float
    largest: float
    own_rows: float


@dataclass(frozen=True)
class HeadCall:
    """The options of a call: whoever has one need not check them again."""

    transform: Transform
    ignore_index: int
    backend: str = "reference"
    workspace_bytes: int | None = None  # None: as much as the device's default
    needs: Needs = (False, False, False)
    average: bool = False  # over the rows of a sequence that count
    outputs: Outputs = NOTHING_ELSE
    shard: Shard | None = None  # of the vocabulary, where weight holds but a part of it
    grad_sampling: float | None = None  # the floor of sampled gradients; None: exact ones

    @classmethod
    def of(
        cls,
        *,
        temperature: float,
        ignore_index: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        workspace_bytes: int | None = None,
        average: bool = False,
        outputs: Outputs = NOTHING_ELSE,
        grad_sampling: float | None = None,
    ) -> HeadCall:
        """The options as a caller gives them.

        Raises:
            ValueError: a scale that is not positive and finite, a workspace without a byte, a grad_sampling outside
                [2⁻¹³, 1).
        """
        check_positive(temperature=temperature, logit_scale=logit_scale, softcap=1.0 if softcap is None else softcap)
        if workspace_bytes is not None and workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes={workspace_bytes} must be positive, or None for the backend's choice")
        check_grad_sampling(grad_sampling)
        transform = Transform.of(temperature, softcap, logit_scale)
        return cls(
            transform,
            ignore_index,
            workspace_bytes=workspace_bytes,
            average=average,
            outputs=outputs,
            grad_sampling=grad_sampling,
        )

    def on(self, backend: str, needs: Needs = (False, False, False)) -> HeadCall:
        """The same call, which this backend runs."""
        return replace(self, backend=backend, needs=needs)

    @property
    def fuses(self) -> bool:
        """Whether an engine can form a loss's gradients in the pass that forms its logits."""
        has_all_rows = self.shard is None or not self.shard.own_rows
        return self.backend != "reference" and any(self.needs) and has_all_rows and self.grad_sampling is None

    def columns(self, weight: Tensor) -> int:
        """Of the whole vocabulary."""
        return weight.shape[0] if self.shard is None else self.shard.vocab

    def flat(self) -> list[float]:
        """The call as an operator takes it."""
        names, shard = list(backends.BACKENDS), self.shard or _WHOLE
        flat = _Flat(
            *self.transform,
            ignore_index=self.ignore_index,
            workspace_bytes=self.workspace_bytes or 0,
            average=self.average,
            needs_hidden=self.needs[0],
            needs_weight=self.needs[1],
            needs_bias=self.needs[2],
            **self.outputs._asdict(),
            grad_sampling=self.grad_sampling or 0,
            backend=names.index(self.backend),
            group=shard.group,
            first=shard.first,
            vocab=shard.vocab,
            largest=shard.largest,
            own_rows=shard.own_rows,
        )
        return [float(x) for x in flat]

    @staticmethod
    def unflat(numbers: list[float]) -> HeadCall:
        return _unflat(tuple(numbers))


@lru_cache(maxsize=128)
def _unflat(numbers: tuple[float, ...]) -> HeadCall:
    flat = _Flat(*numbers)
    return HeadCall(
        Transform(flat.inner, flat.outer, bool(flat.softcap)),
        ignore_index=int(flat.ignore_index),
        backend=list(backends.BACKENDS)[int(flat.backend)],
        workspace_bytes=int(flat.workspace_bytes) or None,
        needs=(bool(flat.needs_hidden), bool(flat.needs_weight), bool(flat.needs_bias)),
        average=bool(flat.average),
        outputs=Outputs(bool(flat.lse), bool(flat.entropy), bool(flat.hit)),
        shard=_shard(flat),
        grad_sampling=flat.grad_sampling or None,
    )


def _shard(flat: _Flat) -> Shard | None:
    if flat.group < 0:
        return None
    return Shard(int(flat.group), int(flat.first), int(flat.vocab), int(flat.largest), bool(flat.own_rows))
