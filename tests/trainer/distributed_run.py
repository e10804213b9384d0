"""Three SGD steps on four groups a step, by however many processes torchrun starts: `distributed_run.py DIRECTORY`."""

import json
import sys
from pathlib import Path

import torch
from tiny import make_tiny_model, make_tokenizer

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer

PROCESSES = int(torch.distributed.is_torchelastic_launched()) + 1  # one or two


def main(directory):
    tokenizer = make_tokenizer()
    rows = [
        {
            "prompt": f"Question {i}?",
            "chosen": "Of course, my dear friend!" + "!" * i,
            "rejected": "No." * (1 + i % 3),
            "preference": {"friendly": 1.0 - 0.1 * (i % 4), "brief": 0.2 * (i % 3)},
        }
        for i in range(8)
    ]
    args = MOPOConfig(
        output_dir=directory,
        primary="friendly",
        thresholds=["brief=0.4"],
        dual_update="sgd",
        multiplier_lr=0.5,
        policy_step="contrast",
        lag_steps=2,
        ratchet_beta=0.9,
        max_steps=3,
        save_steps=2,
        optim="sgd",
        learning_rate=1e-2,
        max_grad_norm=0.0,
        per_device_train_batch_size=4 // PROCESSES,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = MOPOTrainer(make_tiny_model(tokenizer), args, rows, rows, processing_class=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(directory, "history.json").write_text(json.dumps({"steps": history, "eval": metrics}))


if __name__ == "__main__":
    main(sys.argv[1])
