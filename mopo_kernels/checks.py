"""Validators of what several modules take, one per concept.

Values of tensors are looked at in eager mode only: under torch.compile there are none. `values=False` leaves them to a
kernel that looks at them anyway.
"""

import math

import torch
from torch import Tensor


def check_probabilities(name: str, x: Tensor, *, values: bool = True) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor [rows, objectives]; got {x.dtype} {tuple(x.shape)}")
    if not values or torch.compiler.is_compiling():
        return
    wrong = (x < 0) | (x > 1)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must lie in [0, 1], or be NaN where unlabelled; got {x[row, column].item():g} "
            f"in row {row}, objective {column}"
        )


def check_group_ids(group: Tensor, num_responses: int) -> None:
    if group.shape != (num_responses,) or group.dtype != torch.int64 or num_responses == 0:
        raise ValueError(
            f"group must be an int64 tensor with one id for each of the {num_responses} (at least 2) responses; "
            f"got {group.dtype} {tuple(group.shape)}"
        )


def check_group_sizes(group: Tensor, size: Tensor) -> None:
    alone = size < 2
    if alone.any():
        raise ValueError(
            f"group {group[alone][0].item()} has one response: a preference needs two; "
            "drop the prompt or add a response"
        )


def check_lag(lag_log_ratio: Tensor | None, num_responses: int, *, values: bool = True) -> None:
    if lag_log_ratio is None:
        return
    if lag_log_ratio.shape != (num_responses,):
        raise ValueError(
            f"lag_log_ratio must have one entry for each of the {num_responses} responses; "
            f"got {tuple(lag_log_ratio.shape)}"
        )
    if values and not torch.compiler.is_compiling() and not lag_log_ratio.isfinite().all():
        raise ValueError("lag_log_ratio must be finite: clip it where a log-probability is -inf or NaN")


def check_tau(tau: float) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be a positive number; got {tau}")


def check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a number >= 0 (0 switches the robust bound off); got {eps}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number; got {value}")
