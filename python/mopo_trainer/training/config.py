"""MOPOConfig: the Hugging Face TrainingArguments plus what multi-objective preference optimisation needs."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments

from mopo_kernels.checks import check_grad_sampling
from mopo_trainer.thresholds import parse_thresholds
from mopo_trainer.training.elsewhere import whats_instead
from mopo_trainer.training.options import MOPOOptions
from mopo_trainer.training.refused import refuse_options, refuse_values


@dataclass
class MOPOConfig(MOPOOptions, TrainingArguments):
    """Arguments of MOPOTrainer: every TrainingArguments field, and those below.

    `per_device_train_batch_size` counts groups (prompts), each with all its responses. Three defaults differ from
    TrainingArguments: `logging_steps` is 1, `remove_unused_columns` is False, `per_device_train_batch_size` is 4.

    Raises:
        ValueError: a value out of its range, an option that would do nothing (`refused`), with the mend.
        TypeError: an option that does not exist, with what takes its place.
    """

    def __new__(cls, *args: Any, **options: Any) -> MOPOConfig:
        for name in options:
            if name not in cls.__dataclass_fields__:
                raise TypeError(f"MOPOConfig has no option {name!r}{whats_instead(name, cls.__dataclass_fields__)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _mend_types(self)
        refuse_options(self)
        super().__post_init__()
        refuse_values(self)
        for name in ("tau", "multiplier_lr", "chi_lr", "barrier_sigma", "barrier_delta", "lag_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.min_weight < 1:
            raise ValueError(f"min_weight={self.min_weight} must lie in [0, 1)")
        check_grad_sampling(self.grad_sampling)
        if not 0 < self.ratchet_beta <= 1:
            raise ValueError(f"ratchet_beta={self.ratchet_beta} must lie in (0, 1]")
        if self.lag_steps is not None and self.lag_steps < 1:
            raise ValueError(f"lag_steps={self.lag_steps} must be at least 1; leave it unset for no refresh")
        self.robust_radius()
        self.threshold_map()

    def threshold_map(self) -> dict[str, float]:
        """The thresholds as {objective: win rate}."""
        return parse_thresholds(self.thresholds)

    def robust_radius(self) -> float | Literal["auto"]:
        """`eps` as a number or "auto"."""
        if self.eps == "auto":
            return "auto"
        try:
            radius = float(self.eps)
        except ValueError:
            radius = math.nan
        if not 0 <= radius < math.inf:
            raise ValueError(f"eps={self.eps!r} must be a number ≥ 0 or 'auto'")
        return radius


def _mend_types(args: MOPOConfig) -> None:
    """What YAML 1.1 makes of a file is what its writer meant: 1e-5 as text is a number, False as a strategy is no.

    Raises:
        ValueError: text where a number is wanted, a value that is none of an option's choices.
    """
    for name, kind in typing.get_type_hints(MOPOConfig).items():
        value, kinds = getattr(args, name, None), typing.get_args(kind) or (kind,)
        if isinstance(value, str) and str not in kinds and (float in kinds or int in kinds):
            setattr(args, name, _number(name, value, int if int in kinds else float))
        elif typing.get_origin(kind) is Literal and value not in kinds:
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(str, kinds))}")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) is False:
            setattr(args, name, "no")
    for name in ("thresholds", "scorers"):
        if isinstance(value := getattr(args, name), str):
            setattr(args, name, [value])


def _number(name: str, text: str, kind: type) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not {'a whole number' if kind is int else 'a number'}") from None
