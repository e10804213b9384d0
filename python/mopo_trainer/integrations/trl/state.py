"""The multipliers in TRL's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from mopo_kernels import MOPODual
from mopo_trainer.training.resume import STATE_FILE, RunState


class KeepsDual(Trainer):
    """Saves the multipliers beside every checkpoint of a trainer and takes them from the one that it resumes from."""

    dual: MOPODual
    resumed = False  # whether a checkpoint has brought the multipliers

    def stands_on(self) -> dict[str, str]:
        """What the multipliers belong to, by name; a checkpoint that differs is refused by that name."""
        return {"objectives": ", ".join(self.dual.objectives)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            RunState(self.dual.state_dict(), {}, {"model": "", **self.stands_on()}).write(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:  # under every engine, DeepSpeed's too
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not Path(checkpoint, STATE_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no multipliers ({STATE_FILE}); take an earlier one, or "
                "start a new run"
            )
        try:
            state = RunState.read(Path(checkpoint))
        except SafetensorError as error:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its {STATE_FILE} is damaged ({error}); take an earlier one"
            ) from None
        stands_on = self.stands_on()
        other = [name for name, value in stands_on.items() if state.identity.get(name) != value]
        if other:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its run had other {' and '.join(other)}; resume with the same"
            )
        state.check(self.dual, checkpoint, {"model": ""}, needs_reference=False, by_deepspeed=self.is_deepspeed_enabled)
        self.dual.load_state_dict(state.dual)
        self.resumed = True
