"""What GPUs were measured to do: the rates that the cost model of plan.py compares tile engine and cut kernels by.

gpu_rates.json holds {"sm_90": {"bfloat16": {...}}}, written by bench/gpu_report.py on that architecture. Where an
architecture or dtype is missing, the tile engine runs: its speed is the vendor's GEMM's, not our tuning's.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("gpu_rates.json")


class Rates(NamedTuple):
    """Of one architecture and dtype, each at the sizes where it is best."""

    gemm: float  # flop/s of the tile engine's three products
    copy: float  # bytes/s, read and written
    cut_statistics: float  # flop/s at 2·N·H·V
    cut_gradients: float  # flop/s at 6·N·H·V, the logits formed again included


def architecture(device: torch.device) -> str:
    """Name of a GPU's architecture, as compilers spell it."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def rates_of(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """What was measured on this device's architecture in this dtype, if anything."""
    if device.type != "cuda":
        return None
    rates = _table().get(architecture(device), {}).get(str(dtype).removeprefix("torch."))
    return None if rates is None else Rates(**rates)


@cache
def _table() -> dict[str, dict[str, dict[str, float]]]:
    return dict(json.loads(TABLE.read_text()))
