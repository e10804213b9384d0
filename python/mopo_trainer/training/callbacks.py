"""What happens between steps: the multipliers move, a line is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mopo_trainer.training.step import StepRecord


class MovesDual(Protocol):
    """What of the trainer moves the multipliers."""

    record: StepRecord

    def start_dual(self) -> None: ...
    def step_dual(self) -> None: ...


class DualCallback(TrainerCallback):
    """Moves the multipliers: solved before the first step, updated after every step, refreshed at every lag."""

    def __init__(self, trainer: MovesDual) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_dual()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.record.start_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.step_dual()


class Bar(ProgressCallback):
    """The progress bar alone; StepLines prints the logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class StepLines(TrainerCallback):
    """One readable line per log instead of a dictionary."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and (line := step_line(logs)):
            tqdm.write(f"{state.global_step:5d}  {line}")


def step_line(logs: Mapping[str, float]) -> str | None:
    """Loss, each objective's win rate (its threshold and multiplier), tokens; None for logs that hold neither."""
    prefix = next((key.removesuffix("loss") for key in logs if re.fullmatch(r"eval_(.+_)?loss", key)), "")
    if f"{prefix}loss" not in logs:
        return None
    one = prefix.removeprefix("eval_").removesuffix("_")  # of several held-out sets
    title = " ".join(filter(None, ("held-out" if prefix else "", one, "loss")))
    parts = [f"{title} {logs[f'{prefix}loss']:.4f}"]
    for name in _objectives_in(logs, prefix):
        part = f"{name} {logs[f'{prefix}win_rate/{name}']:.3f}"
        if f"threshold/{name}" in logs:
            part += f" (≥ {logs[f'threshold/{name}']:.3f}, λ {logs[f'multiplier/{name}']:.3f})"
        parts.append(part)
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tok/s, {logs['skipped_tokens']:.0f} tokens skipped")
    return "  ".join(parts)


def _objectives_in(logs: Mapping[str, float], prefix: str) -> list[str]:
    start = f"{prefix}win_rate/"
    return [key.removeprefix(start) for key in logs if key.startswith(start)]
