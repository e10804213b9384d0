"""Engines that split weights over processes, as `accelerate launch` chooses them: which are refused, and why."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType

_ENGINES = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}


def check_engine(accelerator: Accelerator, *, has_adapter: bool) -> None:
    """Refuse what would split nothing without a word, or what the loss cannot read.

    Raises:
        ValueError: an engine that accelerate passes over; FSDP of version 1, an adapter under FSDP; DeepSpeed.
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
        raise ValueError(
            "DeepSpeed was never run with this loss, whose head ZeRO-3 takes away before it is read; "
            "examples/accelerate/fsdp2.yaml splits as much"
        )
