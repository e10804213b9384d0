"""The fold contract: everything between the matrix products of the LM head, on one tile of logits.

A tile holds raw logits hidden · weightᵀ of R rows and the C columns first_column … first_column + C − 1 of the
vocabulary, row-major with any row stride. With the transform folded into three numbers,

    u = inner · (logit + bias);   z = outer · tanh(u) with a softcap and where u is finite, else u

    fold_statistics   per row, online over tiles:  maximum ← max z,  total ← Σ exp(z − maximum),  chosen ← z[target]
                      for entropies only:          weighted ← Σ exp(z − maximum) · (z − maximum)
    fold_gradient     out ← (coefficient · (onehot(target) − p) + lse_coefficient · p) · dz/dlogit,   p = exp(z − lse)

so that lse = maximum + log total, logp = chosen − lse, entropy = log total − weighted / total, and `out` is
∂(Σ coefficient · logp + Σ lse_coefficient · lse)/∂logit, ready for the two products that give the gradients of hidden
and weight; it may be the tile itself. Rows of negative target are not read by fold_statistics; rows whose coefficients
are 0 become 0 whatever they held. A u of −inf, by the logit or the bias, masks a
token, with a softcap too: its probability is 0, and dz/dlogit = 1 − tanh² = 0 with a softcap. NaN and +inf give NaN.
Arithmetic is float32 or better for tiles of 16 and 32 bits, float64 for float64; statistics are kept in float64. Every
backend with a tile engine has these functions.
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
    def of(cls, temperature: float, softcap: float | None = None, logit_scale: float = 1.0) -> Transform:
        """z = softcap · tanh(logit_scale · logit / softcap) / temperature, or logit_scale · logit / temperature."""
        if softcap is None:
            return cls(logit_scale / temperature, 1.0, False)
        return cls(logit_scale / softcap, softcap / temperature, True)


class Tile(NamedTuple):
    """A block of rows × columns of logits, and what folding them takes."""

    logits: Tensor  # [R, C]; rows anywhere apart, the elements of one side by side
    target: Tensor  # [R] int64, contiguous: columns of the whole vocabulary
    transform: Transform
    first_column: int = 0
    bias: Tensor | None = None  # [C] float32 (float64 for float64 tiles), contiguous


class Statistics(NamedTuple):
    """Running statistics of rows, float64 and contiguous."""

    maximum: Tensor  # [R] of z
    total: Tensor  # [R] Σ exp(z − maximum)
    chosen: Tensor  # [R] z of the target
    weighted: Tensor | None = None  # [R] Σ exp(z − maximum) · (z − maximum), where the entropy is asked for

    @classmethod
    def start(cls, rows: int, device: torch.device, *, entropy: bool = False) -> Statistics:
        lowest = torch.full((2, rows), -math.inf, dtype=torch.float64, device=device)
        zeros = torch.zeros((2 if entropy else 1, rows), dtype=torch.float64, device=device)
        return cls(lowest[0], zeros[0], lowest[1], zeros[1] if entropy else None)

    @property
    def lse(self) -> Tensor:  # [R]
        return self.maximum + self.total.log()

    @property
    def logp(self) -> Tensor:  # [R]
        return self.chosen - self.maximum - self.total.log()  # in this order huge logits cancel first

    @property
    def entropy(self) -> Tensor:  # [R] nats
        if self.weighted is None:
            raise ValueError("these statistics were not started for entropies")
        return self.total.log() - self.weighted / self.total

    @property
    def hit(self) -> Tensor:  # [R] bool: no token's z is above the target's
        return self.chosen >= self.maximum


class Fold(Protocol):
    """A backend of the tile engine."""

    UNAVAILABLE: str  # why this backend cannot run here, "" if it can

    def fold_statistics(self, tile: Tile, statistics: Statistics) -> None:
        """Fold a tile's logits into the statistics [R] of its rows, in place."""

    def fold_gradient(
        self,
        tile: Tile,
        lse: Tensor,  # [R] float64, contiguous
        coefficient: Tensor,  # [R] float64, contiguous
        out: Tensor,  # [R, C] in the logits' dtype, its rows' elements side by side; may be tile.logits
        lse_coefficient: Tensor | None = None,  # [R] float64, contiguous
    ) -> None:
        """Write ∂(Σ coefficient · logp + Σ lse_coefficient · lse)/∂logit of a tile."""
