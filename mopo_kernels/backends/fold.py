"""The fold contract: everything between the matrix products of the LM head, on one tile of logits.

A tile holds raw logits hidden · weightᵀ of R rows and the C columns first_column … first_column + C − 1 of the
vocabulary, row-major with any row stride. With the transform folded into three numbers,

    u = inner · (logit + bias);   z = outer · tanh(u) with a softcap, else u

    fold_statistics   per row, online over tiles:  max ← max z,  sum ← Σ exp(z − max),  target ← z at the target column
    fold_gradient     tile ← coefficient · (onehot(target) − exp(z − lse)) · dz/dlogit,  in place
    fold_peaks        per block of `block` × `block` elements: max of exp(z − lse)

so that lse = max + log sum, logp = target − lse, and the overwritten tile is ∂(Σ coefficient · logp)/∂logit, ready for
the two products that give the gradients of hidden and weight. Rows of negative target are not read by fold_statistics;
rows of coefficient 0 become 0 whatever they held; −inf logits have probability 0; NaN and +inf give NaN. Arithmetic is
float32 or better for tiles of 16 and 32 bits, float64 for float64; statistics are kept in float64. Every backend with
a tile engine is a module with these functions.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Transform(NamedTuple):
    """What happens to a logit before the softmax, and the derivative's constant part."""

    inner: float
    outer: float
    softcap: bool

    @classmethod
    def of(cls, temperature: float, softcap: float | None, logit_scale: float = 1.0) -> Transform:
        """z = softcap · tanh(logit_scale · logit / softcap) / temperature, or logit_scale · logit / temperature."""
        if softcap is None:
            return cls(logit_scale / temperature, 1.0, False)
        return cls(logit_scale / softcap, softcap / temperature, True)


class Statistics(NamedTuple):
    """Running statistics of rows, float64."""

    max: Tensor  # [R]
    sum: Tensor  # [R]
    target: Tensor  # [R]

    @classmethod
    def start(cls, rows: int, device: torch.device) -> Statistics:
        lowest = torch.full((2, rows), -math.inf, dtype=torch.float64, device=device)
        return cls(lowest[0], torch.zeros(rows, dtype=torch.float64, device=device), lowest[1])

    @property
    def lse(self) -> Tensor:  # [R]
        return self.max + self.sum.log()

    @property
    def logp(self) -> Tensor:  # [R]
        return self.target - self.max - self.sum.log()  # in this order huge logits cancel first


class Fold(Protocol):
    """A backend module of the tile engine."""

    UNAVAILABLE: str  # why this backend cannot run here, "" if it can
    WIDENED: frozenset[torch.dtype]  # dtypes whose matrix products run faster in float32

    def fold_statistics(
        self,
        tile: Tensor,  # [R, C]
        target: Tensor,  # [R] int64
        statistics: Statistics,  # [R] each, updated in place
        transform: Transform,
        *,
        first_column: int = 0,
        bias: Tensor | None = None,  # [C]
    ) -> None: ...

    def fold_gradient(
        self,
        tile: Tensor,  # [R, C], read
        target: Tensor,  # [R] int64
        lse: Tensor,  # [R] float64
        coefficient: Tensor,  # [R] float64
        transform: Transform,
        *,
        first_column: int = 0,
        bias: Tensor | None = None,  # [C]
        out: Tensor | None = None,  # [R, C] in the tile's dtype, or None: in place
    ) -> None: ...

    def fold_peaks(
        self,
        tile: Tensor,  # [R, C]
        lse: Tensor,  # [R] float64
        transform: Transform,
        *,
        block: int,
        bias: Tensor | None = None,  # [C]
    ) -> Tensor: ...  # [ceil(R / block), ceil(C / block)] float64
