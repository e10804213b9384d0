"""Three steps of a trainer of TRL's, by however many processes torchrun starts: `trl_run.py dpo|grpo DIRECTORY`."""

import json
import os
import sys
from pathlib import Path

from datasets import Dataset
from distributed_run import engines_on_cpus
from tiny import make_pairs, make_tokenizer
from trl import DPOConfig, GRPOConfig

from mopo_trainer.integrations.trl import MOPODPOTrainer, MOPOGRPOTrainer

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def letters(completions, **_):
    return [float(sum(c.isalpha() for c in text)) for text in completions]


def digits(completions, **_):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def main(kind, directory):
    model, tokenizer = Path(directory, "model"), make_tokenizer()
    shared = {"output_dir": directory, "max_steps": 3, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    shared |= {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    if kind == "dpo":
        rows = [
            {**row, "preference": {"friendly": 1 - 0.1 * i, "brief": 0.1 * i}} for i, row in enumerate(make_pairs())
        ]
        batch = {"per_device_train_batch_size": 4 // PROCESSES, "per_device_eval_batch_size": 4 // PROCESSES}
        trainer = MOPODPOTrainer(
            str(model),
            args=DPOConfig(**shared, **batch),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(make_pairs()[:5]),
            primary="friendly",
            thresholds={"brief": 0.4},
            dual_update="sgd",
        )
    else:
        sampling = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 2}
        rows = [{"prompt": f"Question {i}?", "opponents": ["abc", "1 2"]} for i in range(8)]
        trainer = MOPOGRPOTrainer(
            str(model),
            reward_funcs=[letters, digits],
            args=GRPOConfig(**shared, **sampling),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows),
            primary="letters",
            thresholds={"digits": 0.6},
        )
    trainer.train()
    found = {
        "multipliers": trainer.dual.multipliers.tolist(),
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval": trainer.evaluate() if kind == "dpo" else {},
    }
    Path(directory, f"{RANK}of{PROCESSES}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    engines_on_cpus()
    main(*sys.argv[1:])
