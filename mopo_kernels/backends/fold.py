"""The fold contract: everything between the matrix products of the LM head, on one tile of logits.

A tile holds raw logits hidden · weightᵀ of R rows and the C columns first_column … first_column + C − 1 of the
vocabulary, row-major with any row stride. With the transform folded into three numbers,

    u = inner · (logit + bias);   z = outer · tanh(u) with a softcap and where u is finite, else u

    fold_statistics   per row, online over tiles:  maximum ← max z,  total ← Σ exp(z − maximum),  chosen ← z[target]
                      for entropies only:          weighted ← Σ exp(z − maximum) · (z − maximum)
    fold_gradient     out ← (coefficient · (onehot(target) − p) + lse_coefficient · p) · dz/dlogit,   p = exp(z − lse)
    fold_sample       the entries of q · dz/dlogit, where q is p rounded at random (below)

so that lse = maximum + log total, logp = chosen − lse, entropy = log total − weighted / total, and `out` is
∂(Σ coefficient · logp + Σ lse_coefficient · lse)/∂logit, ready for the two products that give the gradients of hidden
and weight; it may be the tile itself. Rows of negative target are not read by fold_statistics; rows whose coefficients
are 0 become 0 whatever they held. A u of −inf, by the logit or the bias, masks a
token, with a softcap too: its probability is 0, and dz/dlogit = 1 − tanh² = 0 with a softcap. NaN and +inf give NaN.
Arithmetic is float32 or better for tiles of 16 and 32 bits, float64 for float64; statistics are kept in float64. Every
backend with a tile engine has these functions.

Sampling. With a floor in (0, 1), entries p_v ≥ floor stay exact and the others are rounded to 0 or to the floor by
systematic sampling: one number of a row, uniform in [0, 1), and a running sum C over the columns in their order,

    t_v = p_v · (1 / floor)      q_v = p_v                                   where p_v ≥ floor
    C_v = C_{v−1} + t_v          q_v = floor · (⌊C_v⌋ − ⌊C_{v−1}⌋)           elsewhere;   C_{−1} = uniform

so that E[q] = p and Σ q lies within floor of Σ p. There are at most ⌈1/floor⌉ entries q > 0 whatever V is, and rounding
may add one: K exact ones leave a mass of 1 − K · floor, in which C grows by 1/floor − K.
p, t and floor are in the tile's arithmetic; the running sum is float64, and what enters it, t and `uniform`, is rounded
to a multiple of GRID, to the nearest even, so that the sum is exact in any order: blocks of columns, threads and trees
of partial sums change no entry. `running` carries it from tile to tile of a row. Only entries q > 0 are kept, and that
of the target whether or not its q is 0, so that whoever holds them can add the gradient of z[target].
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

GRID = 2.0**-40  # of the running sum: (t + 1.5 · 2^12) − 1.5 · 2^12 in float64 rounds t ≤ 1 to it; exact up to 2^13
SPARE = 1e-3  # of the mass of a row that may come from rounding: p of float32 sum to 1 within 1e-5


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

    def slope(self, z: Tensor) -> Tensor:
        """dz/dlogit."""
        if not self.softcap:
            return torch.full_like(z, self.inner)
        return self.inner * self.outer * torch.where(z.isinf(), 0, 1 - (z / self.outer) ** 2)


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


class Samples(NamedTuple):
    """Entries of rows of a sampled matrix [R, V], in the order of the columns, each column once; all contiguous.

    At and beyond counts[r] a row has column −1 and value 0.
    """

    columns: Tensor  # [R, capacity] int32: columns of the whole vocabulary
    values: Tensor  # [R, capacity] float32 (float64 for float64 tiles)
    counts: Tensor  # [R] int32

    @classmethod
    def start(cls, rows: int, vocab: int, floor: float, dtype: torch.dtype, device: torch.device) -> Samples:
        shape = rows, cls.capacity(floor, vocab)
        columns = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(columns, columns.new_zeros(shape, dtype=dtype), columns.new_zeros(rows))

    @staticmethod
    def capacity(floor: float, vocab: int) -> int:
        """Room for ⌈1/floor⌉ entries, the target and what rounding may add; kernels write nothing beyond it."""
        return min(vocab, int((1 + SPARE) / floor) + 3)


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

    def fold_sample(
        self,
        tile: Tile,  # rows of negative target get no entry
        lse: Tensor,  # [R] float64, contiguous
        running: Tensor,  # [R] float64, contiguous: `uniform`, a multiple of GRID, before a row's first tile; in place
        floor: float,
        samples: Samples,
    ) -> None:
        """Append the entries of q · dz/dlogit, tile by tile in the order of the columns."""

    def sample_hidden(self, samples: Samples, weight: Tensor, out: Tensor) -> None:
        """out[r] ← Σ_j values[r, j] · weight[columns[r, j]], all of out [R, H].

        Summed in the dtype of the values and rounded once to that of out: weight's, or the values' own for a sum that
        goes on elsewhere. Weight [V, H] and out are row-major, rows any stride apart.
        """

    def sample_weight(self, samples: Samples, hidden: Tensor, out: Tensor) -> None:
        """out[v] ← Σ_{r, j: columns[r, j] = v} values[r, j] · hidden[r], all of out [V, H].

        Summed, rounded and laid out as in `sample_hidden`. On a CPU, and on a GPU where torch is deterministic, each
        column is summed in the order of the rows.
        """
