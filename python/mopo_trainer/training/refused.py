"""TrainingArguments that would do nothing, or something wrong, in MOPOTrainer: refused by name where they are set."""

from __future__ import annotations

from dataclasses import MISSING

from transformers import TrainingArguments

_EVALUATION = "evaluation reads the log-probs of whole responses and has its own metrics; leave it out"
_EVAL_TYPE = "evaluation runs in the type that training runs in; set bf16 or the model's dtype"
_ENGINE = "an engine that splits weights is chosen where processes start: accelerate launch --config_file FILE"
_LENGTHS = "a batch holds groups of several responses, which have no one length; leave it out"
_LIGER = "its fused head would stand beside ours, which is fused already; leave it out"
_RENAMED = "a checkpoint is renamed once it is whole, which its upload would not find; use every_save"

REFUSED = {
    "label_smoothing_factor": "labels are probabilities here: write 0.9 instead of 1 as the preference",
    "label_names": "labels are read from the rows' columns; leave it out",
    "average_tokens_across_devices": "the loss is a mean over groups, not over tokens; leave it out",
    "prediction_loss_only": _EVALUATION,
    "eval_do_concat_batches": _EVALUATION,
    "eval_use_gather_object": _EVALUATION,
    "eval_accumulation_steps": _EVALUATION,
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "bf16_full_eval": _EVAL_TYPE,
    "fp16_full_eval": _EVAL_TYPE,
    "length_column_name": _LENGTHS,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "auto_find_batch_size": "it starts over with weights that have moved, which are no reference any more; set "
    "per_device_train_batch_size",
    "parallelism_config": "sequences and weights split in its ways were never tried; leave it out",
    "fsdp": _ENGINE,
    "fsdp_config": _ENGINE,
    "deepspeed": _ENGINE,
    "do_predict": "nothing is predicted; leave it out",
    "remove_unused_columns": "it would drop the labels; leave it False",
}
REFUSED_VALUES = {
    ("train_sampling_strategy", "group_by_length"): _LENGTHS,
    ("train_sampling_strategy", "batch_rebalance"): _LENGTHS,
    ("hub_strategy", "checkpoint"): _RENAMED,
    ("hub_strategy", "all_checkpoints"): _RENAMED,
}


def refuse_options(args: TrainingArguments) -> None:
    """Raises ValueError for the first option of REFUSED that is set; called before transformers acts on any."""
    for name, reason in REFUSED.items():
        value, default = getattr(args, name), _default(args, name)
        if value != default and (value or default):  # "" and False are as good as None
            raise ValueError(f"{name}={value!r}: {reason}")


def refuse_values(args: TrainingArguments) -> None:
    """Raises ValueError for the first combination of values that would do nothing or something wrong."""
    for (name, value), reason in REFUSED_VALUES.items():
        if getattr(args, name) == value:
            raise ValueError(f"{name}={value}: {reason}")
    if args.do_eval and args.eval_strategy == "no":
        raise ValueError("do_eval=True says not when; set eval_strategy to steps or epoch")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=True does nothing on a CPU; set bf16, or leave it out")
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config: dispatch_batches=True cannot split groups; leave it out")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: the loss needs a process for each; start with torchrun "
            "--nproc-per-node, or show one with CUDA_VISIBLE_DEVICES"
        )


def _default(args: TrainingArguments, name: str) -> object:
    field = type(args).__dataclass_fields__[name]
    return field.default if field.default_factory is MISSING else field.default_factory()
