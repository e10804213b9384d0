"""Fused, memory-flat operations for multi-objective preference optimisation (MOPO, arXiv 2505.10892).

Names load on first use, so that the command's help does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopo_kernels.logprob import linear_logprob, sequence_logprob, token_logprob
    from mopo_kernels.loss import MOPOOutput, mopo_loss, mopo_objective, mopo_weights, policy_loss
    from mopo_kernels.objective.dual import DualSolution, InfeasibleThresholds, solve_dual
    from mopo_kernels.objective.labels import win_rate_from_comparisons, win_rate_from_pairs
    from mopo_kernels.objective.multipliers import MOPODual, barrier_multipliers
    from mopo_kernels.objective.robust import robust_bound
    from mopo_kernels.objective.tabular import TabularSolution, solve_tabular
    from mopo_kernels.objective.target import LabelStatistics, label_statistics

_MODULES = {
    "mopo_kernels.logprob": ("linear_logprob", "sequence_logprob", "token_logprob"),
    "mopo_kernels.loss": ("MOPOOutput", "mopo_loss", "mopo_objective", "mopo_weights", "policy_loss"),
    "mopo_kernels.objective.dual": ("DualSolution", "InfeasibleThresholds", "solve_dual"),
    "mopo_kernels.objective.labels": ("win_rate_from_comparisons", "win_rate_from_pairs"),
    "mopo_kernels.objective.multipliers": ("MOPODual", "barrier_multipliers"),
    "mopo_kernels.objective.robust": ("robust_bound",),
    "mopo_kernels.objective.tabular": ("TabularSolution", "solve_tabular"),
    "mopo_kernels.objective.target": ("LabelStatistics", "label_statistics"),
}

__all__ = [
    "DualSolution",
    "InfeasibleThresholds",
    "LabelStatistics",
    "MOPODual",
    "MOPOOutput",
    "TabularSolution",
    "barrier_multipliers",
    "label_statistics",
    "linear_logprob",
    "mopo_loss",
    "mopo_objective",
    "mopo_weights",
    "policy_loss",
    "robust_bound",
    "sequence_logprob",
    "solve_dual",
    "solve_tabular",
    "token_logprob",
    "win_rate_from_comparisons",
    "win_rate_from_pairs",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'mopo_kernels' has no attribute {name!r}")
