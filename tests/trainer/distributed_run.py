"""A few SGD steps by however many processes start it: `distributed_run.py DIRECTORY GROUPS_A_BATCH ACCUMULATION`.

Nine prompts of two or three responses, so that with eight a step the second step of an epoch has one: of two ranks one
has nothing to do.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig
from tiny import make_tiny_model, make_tokenizer
from transformers import TrainerCallback

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer


def engines_on_cpus():
    """Accelerate leaves FSDP and DeepSpeed to accelerators and would run DDP; told otherwise, the rest is real."""
    start = AcceleratorState.__init__

    def told(self, *arguments, fsdp_plugin=None, deepspeed_plugin=None, **options):
        is_new = not AcceleratorState._shared_state
        start(self, *arguments, fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin, **options)
        if is_new and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        if is_new and deepspeed_plugin is not None:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, deepspeed_plugin
            deepspeed_plugin.set_mixed_precision(self._mixed_precision)
            deepspeed_plugin.select(_from_accelerator_state=True)
            zero = deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = 0  # else a tiny model's weights stay whole
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = told


def forget_engine():
    """The next trainer of this process asks again."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    AcceleratorState._reset_state()


class Fault(TrainerCallback):
    """Kills the rank `kill_rank` at the start of a step, or puts NaN into the weights of `nan_rank` alone."""

    def __init__(self, *, kill_rank=None, kill_step=None, nan_rank=None):
        self.kill_rank, self.kill_step, self.nan_rank = kill_rank, kill_step, nan_rank

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if (args.process_index, state.global_step) == (self.kill_rank, self.kill_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if args.process_index == self.nan_rank:
            with torch.no_grad():
                model.model.norm.weight[0] = torch.nan


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


def train(
    directory,
    groups_a_batch,
    accumulation,
    *,
    model=None,
    resume=None,
    fault=None,
    lora_r=0,
    evaluate_first=False,
    **options,
):
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
    model, callbacks = model or make_tiny_model(tokenizer), [Fault(**fault)] if fault else []
    adapter = LoraConfig(r=lora_r, target_modules="all-linear", init_lora_weights=False) if lora_r else None
    trainer = MOPOTrainer(
        model, args, rows(), rows()[:3], processing_class=tokenizer, peft_config=adapter, callbacks=callbacks
    )
    was_split = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
    before = [trainer.evaluate()] if evaluate_first else []
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    state = {name: value.tolist() for name, value in trainer.dual.state_dict().items()}
    state["was_split"] = was_split  # before training
    state["model"] = type(trainer.model_wrapped).__name__
    Path(directory, f"dual-{args.process_index}.json").write_text(json.dumps(state))
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        Path(directory, "history.json").write_text(json.dumps({"steps": before + history, "eval": metrics}))
    return trainer


if __name__ == "__main__":
    engines_on_cpus()
    train(sys.argv[1], *map(int, sys.argv[2:4]), **json.loads(sys.argv[4] if len(sys.argv) > 4 else "{}"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
