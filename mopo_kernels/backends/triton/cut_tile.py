"""What launchers of cut kernels share: inputs, their arguments of the kernels, and the block sizes.

cut_blocks.json holds, per architecture, dtype and kernel, what bench/gpu_report.py found fastest on that GPU, or,
where it has not run yet, what compiles without spills (docs/aot.md). "default" suits GPUs with 99 KB of shared memory.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopo_kernels.backends.fold import Transform

KERNELS = ("statistics", "gradients", "grad_hidden", "grad_weight")
GROUP = 8  # blocks of rows whose programs run side by side, so that they find each other's blocks of weight in L2
ENOUGH_PROGRAMS = 1024  # for the largest GPU to be busy to the end of its last wave


class Blocks(NamedTuple):
    """A program's tile, its step along H, and how Triton is to compile it: keywords of a launch."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_H: int
    num_warps: int
    num_stages: int

    def along(self, rows: int, vocab: int) -> tuple[int, int]:
        """How many cover the rows, and the vocabulary."""
        return -(-rows // self.BLOCK_N), -(-vocab // self.BLOCK_V)


class CutInputs(NamedTuple):
    """What the statistics of an LM head are computed from."""

    hidden: Tensor  # [N, H] float16, bfloat16 or float32; any strides
    weight: Tensor  # [V, H] likewise
    target: Tensor  # [N] int64, contiguous
    transform: Transform
    bias: Tensor | None = None  # [V] float32, contiguous

    @property
    def sizes(self) -> tuple[int, int, int]:  # N, V, H
        return len(self.hidden), len(self.weight), self.hidden.shape[1]

    def arguments(self, blocks: Blocks) -> dict[str, Any]:
        """What all cut kernels take."""
        hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.hidden, self.weight))
        rows, vocab, hidden_size = self.sizes
        return {
            "hidden": hidden,
            "weight": weight,
            "target": self.target,
            "bias": self.bias,
            "hidden_row_stride": hidden.stride(0),
            "weight_row_stride": weight.stride(0),
            "rows": rows,
            "vocab": vocab,
            "hidden_size": hidden_size,
            "inner": self.transform.inner,
            "outer": self.transform.outer,
            "SOFTCAP": self.transform.softcap,
            "PRECISION": dot_precision(hidden.dtype),
            "GROUP": GROUP,
            **blocks._asdict(),
        }


# BLOCK_N, BLOCK_V, BLOCK_H and num_warps that spill on no architecture of docs/aot.md.
TILES_OF_16_BITS = {
    "statistics": [(128, 128, 64, 8), (64, 256, 64, 8), (128, 128, 32, 8), (128, 64, 64, 4), (64, 128, 64, 4)],
    "gradients": [(128, 64, 64, 8), (64, 128, 64, 8), (128, 64, 32, 8), (64, 64, 64, 4)],
    "grad_hidden": [(128, 64, 64, 8), (64, 128, 64, 8), (128, 64, 32, 8), (64, 128, 32, 4), (64, 64, 32, 4)],
    "grad_weight": [(128, 64, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)],
}
TILES_OF_32_BITS = {
    "statistics": [(128, 128, 16, 8), (128, 64, 32, 8), (64, 64, 32, 4), (64, 64, 16, 4)],
    "gradients": [(64, 128, 32, 8), (64, 64, 16, 4)],
    "grad_hidden": [(64, 32, 32, 4), (32, 64, 32, 4)],
    "grad_weight": [(64, 32, 32, 4), (32, 64, 32, 4)],
}


TABLE: dict[str, dict[str, dict[str, Blocks]]] = {  # architecture → dtype → kernel → blocks
    architecture: {
        dtype: {kernel: Blocks(**blocks) for kernel, blocks in kernels.items()} for dtype, kernels in dtypes.items()
    }
    for architecture, dtypes in json.loads(Path(__file__).with_name("cut_blocks.json").read_text()).items()
}


def blocks_for(kernel: str, hidden: Tensor) -> Blocks:
    """The table's entry for a kernel on these inputs' device and dtype.

    Raises:
        ValueError: these are float64.
    """
    if hidden.dtype == torch.float64:
        raise ValueError("hidden is float64, which the cut kernels do not multiply: convert it, or use the tile engine")
    architecture = "default"
    if hidden.is_cuda:
        architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(hidden.device))
    return TABLE.get(architecture, TABLE["default"])[str(hidden.dtype).removeprefix("torch.")][kernel]


def candidates(kernel: str, dtype: torch.dtype) -> list[Blocks]:
    """What is worth timing on any GPU beside the table's entry."""
    tiles, stages = (TILES_OF_32_BITS, (2,)) if dtype == torch.float32 else (TILES_OF_16_BITS, (3, 4))
    return [Blocks(*tile, stage) for stage, tile in itertools.product(stages, tiles[kernel])]


def dot_precision(dtype: torch.dtype) -> str:
    """What tl.dot multiplies float32 in; 16 bits are multiplied exactly."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def parts_of(column_blocks: int, wanted: int) -> tuple[int, int]:
    """Parts of the vocabulary, one or as many as wanted or fewer but none empty, and column blocks of each.

    Shapes alone decide how many are wanted, so that sums run in the same order on any GPU.
    """
    part_blocks = max(1, -(-column_blocks // max(1, wanted)))
    return max(1, -(-column_blocks // part_blocks)), part_blocks
