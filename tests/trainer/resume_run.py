"""A training run that can kill itself with SIGKILL: `python resume_run.py DIRECTORY [step|save|full N] [resume]`.

Everything that carries state is on: dropout, sgd multipliers with a robust bound, a lag refresh with its ratchet.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

from peft import LoraConfig
from tiny import make_tiny_model, make_tokenizer
from transformers import TrainerCallback

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer


class KillAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class FaultWhileSaving(MOPOTrainer):
    """Dies, or may write no more, when the model is written but nothing after it."""

    fault, step = "never", -1

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == self.step and self.fault == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.state.global_step == self.step and self.fault == "full":  # as a disk without a free block
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        super()._save_optimizer_and_scheduler(output_dir)


def main(directory, kill="never", kill_step=-1, resume=False):
    tokenizer = make_tokenizer()
    rows = [
        {
            "prompt": f"Question {i}?",
            "chosen": f"Of course, my dear friend number {i}!",
            "rejected": "No." * (1 + i % 3),
            "preference": {"friendly": 1.0 - 0.1 * (i % 4), "brief": 0.2 * (i % 3)},
        }
        for i in range(10)
    ]
    args = MOPOConfig(
        output_dir=directory,
        primary="friendly",
        thresholds=["brief=0.4"],
        dual_update="sgd",
        eps="0.01",
        policy_step="contrast",
        grad_sampling=0.1,  # its random numbers are part of what is resumed
        lag_steps=3,
        ratchet_beta=0.9,
        max_steps=8,
        save_steps=2,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    FaultWhileSaving.fault, FaultWhileSaving.step = kill, kill_step
    trainer = FaultWhileSaving(
        make_tiny_model(tokenizer),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2),
        callbacks=[KillAtStep(kill_step)] if kill == "step" else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    Path(directory, "history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    directory, *rest = sys.argv[1:]
    if rest and rest[0] == "resume":
        main(directory, resume=True)
    elif rest:
        main(directory, kill=rest[0], kill_step=int(rest[1]))
    else:
        main(directory)
