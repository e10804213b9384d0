"""MOPOConfig: the Hugging Face TrainingArguments plus what multi-objective preference optimisation needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments

from mopo_trainer.thresholds import parse_thresholds
from mopo_trainer.training.options import MOPOOptions


@dataclass
class MOPOConfig(MOPOOptions, TrainingArguments):
    """Arguments of MOPOTrainer: every TrainingArguments field, and those below.

    `per_device_train_batch_size` counts groups (prompts), each with all its responses. Three defaults differ from
    TrainingArguments: `logging_steps` is 1, `remove_unused_columns` is False, `per_device_train_batch_size` is 4.

    Raises:
        ValueError: a value out of its range, with the mend.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "multiplier_lr", "chi_lr", "barrier_sigma", "barrier_delta", "lag_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 <= self.min_weight < 1:
            raise ValueError(f"min_weight={self.min_weight} must lie in [0, 1)")
        if not 0 < self.ratchet_beta <= 1:
            raise ValueError(f"ratchet_beta={self.ratchet_beta} must lie in (0, 1]")
        if self.lag_steps is not None and self.lag_steps < 1:
            raise ValueError(f"lag_steps={self.lag_steps} must be at least 1; leave it unset for no refresh")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the labels; leave it False")
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
