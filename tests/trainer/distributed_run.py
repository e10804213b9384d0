"""A few SGD steps by however many processes start it: `distributed_run.py DIRECTORY GROUPS_A_BATCH ACCUMULATION`.

Nine prompts of two or three responses, so that with eight a step the second step of an epoch has one: of two ranks one
has nothing to do.
"""

import json
import sys
from pathlib import Path

import torch
from tiny import make_tiny_model, make_tokenizer

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer


def rows():
    texts = ["Of course, my dear friend!", "No.", "Maybe so, who knows?"]
    return [
        {
            "prompt": f"Question {i}?",
            "responses": [text + "!" * i for text in texts[: 2 + i % 2]],
            "ratings": {"friendly": [5.0, 1.0, 3.0][: 2 + i % 2], "brief": [1.0 + i / 4, 2.5, 2.0][: 2 + i % 2]},
        }
        for i in range(9)
    ]


def train(directory, groups_a_batch, accumulation, **options):
    """The trainer, when it is done; what it logged is in history.json, and every rank's multipliers in dual-RANK."""
    tokenizer = make_tokenizer()
    settings = {
        "primary": "friendly",
        "thresholds": ["brief=0.4"],
        "dual_update": "sgd",
        "multiplier_lr": 0.5,
        "eps": "0.01",
        "policy_step": "contrast",
        "lag_steps": 2,
        "ratchet_beta": 0.9,
        "max_steps": 4,
        "save_strategy": "no",
        "optim": "sgd",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = MOPOConfig(
        output_dir=str(directory),
        per_device_train_batch_size=groups_a_batch,
        gradient_accumulation_steps=accumulation,
        **settings | options,
    )
    trainer = MOPOTrainer(make_tiny_model(tokenizer), args, rows(), rows()[:3], processing_class=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()
    state = {name: value.tolist() for name, value in trainer.dual.state_dict().items()}
    Path(directory, f"dual-{args.process_index}.json").write_text(json.dumps(state))
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(directory, "history.json").write_text(json.dumps({"steps": history, "eval": metrics}))
    return trainer


if __name__ == "__main__":
    train(sys.argv[1], *map(int, sys.argv[2:4]), **json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
