"""Engines that split weights over processes, as `accelerate launch` chooses them: which are refused, and why."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from mopo_trainer.training.split import is_zero3

_ENGINES = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
_DEEPSPEED_KEYS = {  # of its configuration: what was run with this loss
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_allow_untested_optimizer", "bf16", "fp16", "steps_per_print"),
}
_PLAIN_ZERO: dict[str, int] = {  # of its zero_optimization: what rounds no weight or gradient, and splits them once
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
}
ADAPTER_UNDER_ZERO_3 = (
    "an adapter under ZeRO-3: its starting weights, which the reference needs, would be split too, and that was never "
    "tried; use examples/accelerate/deepspeed_zero2.yaml"
)


def check_engine(accelerator: Accelerator, *, has_adapter: bool) -> None:
    """Refuse what would split nothing without a word, or what the loss cannot read.

    Raises:
        ValueError: an engine that accelerate passes over; FSDP of version 1, an adapter under FSDP; of DeepSpeed what
            was never run with this loss.
    """
    kind = accelerator.distributed_type
    for variable, engine in _ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1") and kind != engine:
            raise ValueError(
                f"the configuration asks for {engine.value}, and accelerate made it {kind.value}: every process would "
                "hold all weights; say so with examples/accelerate/ddp.yaml"
            )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 flattens the head's weight into others; set fsdp_version: 2")
    if kind == DistributedType.FSDP and has_adapter:
        raise ValueError(
            "an adapter under FSDP: its starting weights, which the reference needs, would be split too, and that was "
            "never tried; use examples/accelerate/ddp.yaml"
        )
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, has_adapter=has_adapter)


def _check_deepspeed(config: Mapping[str, Any], *, has_adapter: bool) -> None:
    zero = config["zero_optimization"]
    if zero["stage"] not in (2, 3):
        raise ValueError(f"ZeRO stage {zero['stage']} was never run with this loss; set zero_stage to 2 or 3")
    unknown = sorted(key for key in config if key not in _DEEPSPEED_KEYS)
    if unknown:
        raise ValueError(
            f"DeepSpeed's configuration has {', '.join(unknown)}, never run with this loss; leave it out (optimizer, "
            "learning rate and schedule are options of MOPOConfig)"
        )
    rounded = [key for key, plain in _PLAIN_ZERO.items() if zero.get(key, plain) != plain]
    rounded += [f"bf16.{key}" for key in config.get("bf16", {}) if key != "enabled"]
    if rounded:
        raise ValueError(f"{rounded[0]} was never run with this loss; leave it out")
    offloaded = [part for part in ("offload_optimizer", "offload_param") if _is_offloaded(zero.get(part))]
    if offloaded:
        raise ValueError(f"{offloaded[0]} was never run with this loss; set its device to none")
    if config.get("fp16", {}).get("enabled") in (True, "auto"):
        raise ValueError("fp16 under DeepSpeed was never run with this loss; set mixed_precision to bf16 or no")
    if zero["stage"] == 3 and has_adapter:
        raise ValueError(ADAPTER_UNDER_ZERO_3)
    if zero["stage"] == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError("checkpoints would hold no model that can be loaded; set zero3_save_16bit_model: true")


def _is_offloaded(part: Mapping[str, Any] | None) -> bool:
    return (part or {}).get("device") not in (None, "none")


def check_loaded(model: nn.Module, *, has_adapter: bool) -> None:
    """Raise ValueError for an adapter on a model that ZeRO-3 has split already: it could not even be tried."""
    if has_adapter and any(map(is_zero3, model.parameters())):
        raise ValueError(ADAPTER_UNDER_ZERO_3)
