"""For the tests of the dual: labels of a data set, and what a policy achieves on them by definition, in numpy."""

import math

import numpy as np
import torch
from scipy.optimize import brentq

from mopo_kernels.objective.dual import attainable_range, solve_dual

TAU = 0.1


def data(seed=0, groups=30, sizes=(2, 3, 5, 8), objectives=3, unlabelled=0.0, lag=False, hard=False):
    """Conflicting labels of a data set: the secondaries lean against the primary."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(sizes)[torch.randint(len(sizes), (groups,), generator=generator)]
    count = int(size.sum())
    quality = torch.randn(count, objectives, generator=generator, dtype=torch.float64)
    quality[:, 1:] -= 0.5 * quality[:, :1]
    group = torch.arange(groups).repeat_interleave(size)
    win_rate = quality.sigmoid()
    if hard:
        beats = (quality[:, None] > quality[None]).double() * (group[:, None] == group[None])[..., None]
        win_rate = beats.sum(1) / (size[group][:, None] - 1)
    missing = torch.rand(groups, objectives, generator=generator) < unlabelled
    win_rate[missing[group]] = math.nan
    order = torch.randperm(count, generator=generator)
    lag_log_ratio = torch.randn(count, generator=generator, dtype=torch.float64) if lag else None
    return win_rate[order], group[order] * 7 - 50, lag_log_ratio


class Oracle:
    """The same quantities from their definitions, group by group in numpy."""

    def __init__(self, win_rate, group, lag_log_ratio, primary=0):
        win_rate, group = win_rate.numpy(), group.numpy()
        lag = np.zeros(len(group)) if lag_log_ratio is None else lag_log_ratio.numpy()
        self.members = [np.flatnonzero(group == i) for i in np.unique(group)]
        self.values = [
            np.nan_to_num(win_rate[m]) for m in self.members
        ]  # here groups are labelled in full or not at all
        self.labelled = np.array([~np.isnan(win_rate[m]).any(0) for m in self.members])
        self.reference = [np.exp(lag[m]) / np.exp(lag[m]).sum() for m in self.members]
        self.primary = primary
        self.secondary = [k for k in range(win_rate.shape[1]) if k != primary]

    def weights(self, multipliers):
        full = np.insert(np.asarray(multipliers, float), self.primary, 1.0)
        weights = []
        for v, r in zip(self.values, self.reference, strict=True):
            unnormalised = r * np.exp((v @ full - (v @ full).max()) / TAU)
            weights.append(unnormalised / unnormalised.sum())
        return weights

    def win_rates(self, multipliers):
        means = np.array([w @ v for w, v in zip(self.weights(multipliers), self.values, strict=True)])
        return (means * self.labelled).sum(0) / self.labelled.sum(0)

    def dual(self, multipliers, thresholds):
        full = np.insert(np.asarray(multipliers, float), self.primary, 1.0)
        log_z = [np.log(r @ np.exp(v @ full / TAU)) for v, r in zip(self.values, self.reference, strict=True)]
        return TAU * np.mean(log_z) - (multipliers * self.labelled.mean(0)[self.secondary]) @ thresholds

    def lower_bounds(self, multipliers, eps):
        """By bisection on the radius of each tilted distribution."""
        bounds = []
        for k in self.secondary:
            x, q0 = [], []
            for w, v, r, labelled in zip(
                self.weights(multipliers), self.values, self.reference, self.labelled, strict=True
            ):
                if labelled[k]:
                    x.append(w / r * v[:, k])
                    q0.append(r / self.labelled[:, k].sum())
            x, q0 = np.concatenate(x), np.concatenate(q0)

            def tilted(t, x=x, q0=q0):
                q = q0 * np.exp(-t * (x - x.min()))
                return q / q.sum()

            def radius(t, q0=q0, tilted=tilted):
                q = tilted(t)
                return (q[q > 0] * np.log(q[q > 0] / q0[q > 0])).sum() - eps

            bounds.append(x @ tilted(brentq(radius, 1e-9, 1e4, xtol=1e-14, rtol=1e-14)))
        return np.array(bounds)


def between(labels, fraction, *, eps=0.0, primary=0):
    """Thresholds some way from what is free to what each objective could get alone, hence a conflict."""
    free, best = attainable_range(labels[0], labels[1], tau=TAU, eps=eps, primary=primary, lag_log_ratio=labels[2])
    thresholds = free + fraction * (best - free)
    return torch.cat([thresholds[:primary], thresholds[primary + 1 :]])


def solve(labels, thresholds, **options):
    return solve_dual(labels[0], labels[1], thresholds, tau=TAU, lag_log_ratio=labels[2], **options)
