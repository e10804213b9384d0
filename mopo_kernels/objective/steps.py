"""Policy steps: losses that pull the policy towards the target, each with its gradient beside it.

With w the target's weights, h_i = log pi(y_i | x) - log pi_ref(y_i | x), n a group's size and G the number of groups:

    clone     -mean_groups sum_i w_i log pi(y_i | x)
    contrast  -mean_groups sum_i w_i log softmax_group(h)_i
    regress    mean_groups mean_{i<j} (h_i - h_j - (n-1)/n (s_i - s_j) / tau)^2

All three have the same optimum in the tabular limit. The factor (n-1)/n makes `regress` unbiased when labels are single
draws; without it pairs would overshoot twofold, which is IPO's 1/(2 tau). `clone` and `contrast` see the exp of an
estimated win rate, which is no estimate of the exp: with few opponents contrast aims sharper than the optimum. Clone
cannot: a group's weights sum to 1, so its optimum gives no response more than n times its share (KL at most log n).

Under a lag the optimum is pi_lag exp(s / tau). The weights of clone and contrast carry omega = pi_lag / pi_ref0, so
contrast compares with pi_ref0, whom the responses are from; regress knows scores only and compares with pi_lag.

Source: arXiv 2505.10892, Eq. 7 (clone); contrast is DPO's and regress is IPO's loss with several objectives (ours).
A step is float64 arithmetic on [B]: what costs is the LM head, so no step has a kernel of its own.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from mopo_kernels.objective.target import Groups, LabelStatistics

PolicyStep = Literal["clone", "contrast", "regress"]


class StepTarget(NamedTuple):
    """What a step needs of the labels, per sequence."""

    slot: Tensor  # [S] int64, dense id of the sequence's group
    size: Tensor  # [S] float64, as all below: n of the group
    weights: Tensor  # [S] w
    shift: Tensor  # [S] what logp is compared with
    num_groups: Tensor  # [] G

    @staticmethod
    def packed_one(weight: float, device: torch.device) -> Tensor:  # [5]
        """One sequence in a group of its own, packed."""
        return torch.tensor([0, 1, weight, 0, 1], dtype=torch.float64, device=device)

    @property
    def groups(self) -> Groups:
        return Groups(self.slot, self.size, self.num_groups)

    def take(self, index: Tensor) -> StepTarget:
        """The sequences at `index`, in a batch of as many groups."""
        slot, size, weights, shift = (x[index] for x in self[:4])
        return StepTarget(slot, size, weights, shift, self.num_groups)

    def packed(self) -> Tensor:  # [4 S + 1] float64
        """One tensor, as an operator takes it."""
        return torch.cat([self.slot.double(), self.size, self.weights, self.shift, self.num_groups[None]])

    @classmethod
    def unpacked(cls, packed: Tensor) -> StepTarget:
        sequences = packed.shape[0] // 4
        slot, size, weights, shift, num_groups = packed.split([*(sequences,) * 4, 1])
        return cls(slot.long(), size, weights, shift, num_groups[0])


class Step(Protocol):
    """A policy step."""

    NEEDS_GROUP: ClassVar[bool]  # the gradient depends on the log-probabilities of the whole group

    def shift(self, labels: LabelStatistics, ref_logp: Tensor | None) -> Tensor:  # [B] float64
        """What the log-probabilities are compared with."""

    def loss(self, logp: Tensor, target: StepTarget) -> Tensor:  # [S] float64 → []
        """The loss, differentiable in logp any number of times."""

    def gradient(self, logp: Tensor, target: StepTarget) -> Tensor:  # [S]
        """∂loss/∂logp of every sequence whose group is complete in `logp`."""


class Clone:
    """Weighted log-likelihood: gradient -w / G, known before the model has run."""

    NEEDS_GROUP: ClassVar[bool] = False

    def shift(self, labels: LabelStatistics, ref_logp: Tensor | None) -> Tensor:
        return torch.zeros_like(labels.weights)

    def loss(self, logp: Tensor, target: StepTarget) -> Tensor:
        return -target.groups.mean_of_sums(target.weights * logp)

    def gradient(self, logp: Tensor, target: StepTarget) -> Tensor:
        return -target.weights / target.num_groups


class Contrast:
    """Cross-entropy from w to softmax_group(h): gradient (softmax_group(h) - w) / G."""

    NEEDS_GROUP: ClassVar[bool] = True

    def shift(self, labels: LabelStatistics, ref_logp: Tensor | None) -> Tensor:
        return _given(ref_logp)

    def loss(self, logp: Tensor, target: StepTarget) -> Tensor:
        groups = target.groups
        return -groups.mean_of_sums(target.weights * groups.log_softmax(logp - target.shift))

    def gradient(self, logp: Tensor, target: StepTarget) -> Tensor:
        policy = target.groups.log_softmax(logp - target.shift).exp()
        return (policy - target.weights) / target.num_groups


class Regress:
    """Squared differences; with e = h - (n-1)/n s/tau, gradient 4 / ((n-1) G) (e - mean_group e)."""

    NEEDS_GROUP: ClassVar[bool] = True

    def shift(self, labels: LabelStatistics, ref_logp: Tensor | None) -> Tensor:
        size = labels.values.size
        return _given(ref_logp) + (size - 1) / size * labels.values.score

    def loss(self, logp: Tensor, target: StepTarget) -> Tensor:
        # The mean over the n(n-1)/2 pairs of squared differences is 2/(n-1) times the sum of squared deviations.
        return target.groups.mean_of_sums(2 / (target.size - 1) * self._centred(logp, target) ** 2)

    def gradient(self, logp: Tensor, target: StepTarget) -> Tensor:
        return 4 / ((target.size - 1) * target.num_groups) * self._centred(logp, target)

    def _centred(self, logp: Tensor, target: StepTarget) -> Tensor:
        error = logp - target.shift
        return error - target.groups.sum(error) / target.size


STEPS: dict[str, Step] = {"clone": Clone(), "contrast": Contrast(), "regress": Regress()}


def step_target(step: str, labels: LabelStatistics, ref_logp: Tensor | None) -> StepTarget:
    """What this step needs of a batch; differentiable in ref_logp."""
    groups = labels.groups
    return StepTarget(groups.slot, groups.size, labels.weights, STEPS[step].shift(labels, ref_logp), groups.num_groups)


def _given(ref_logp: Tensor | None) -> Tensor:
    if ref_logp is None:
        raise TypeError("the step needs ref_logp, and the door lets none pass without")
    return ref_logp.double()
