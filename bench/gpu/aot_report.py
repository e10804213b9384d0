"""Compile every Triton kernel ahead of time, for GPUs that this machine need not have, and write docs/aot.md.

python bench/gpu/aot_report.py
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from aot_configurations import Configuration, of_batch, of_fold, of_sample, of_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

PAGE = Path(__file__).parents[2] / "docs" / "aot.md"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}  # in PTX

TEXT = """# What Triton makes of the kernels

Every configuration that the launchers can choose compiles for A100 (sm_80), H100 (sm_90) and B200 (sm_100), without a
GPU. The lists below show that

- the kernels of folds and samples and the cut kernels spill no registers (stack 0) and fit the shared memory of their
  GPU,
- products of 16 bits run on tensor cores: `mma` on sm_80, `wgmma` on sm_90, `tcgen05` on sm_100; float32 is multiplied
  as float32 (unless torch may use TF32),
- the kernel of label statistics, one program for a whole batch, has its stack where a batch has a thousand responses or
  more.

They say nothing about speed, nor about rows of hidden and weight that are not a multiple of 16 elements long: these
work, and may spill. tests/backends/test_aot.py asserts what stands here, and the same of all blocks that
bench/gpu_report.py times.

Written by `python bench/gpu/aot_report.py` with Triton {version}. A line holds the largest numbers of all
configurations that differ in options only (softcap, bias, gradients needed, alignment of a fold's rows). The cut
kernels' blocks are those of mopo_kernels/backends/triton/cut_blocks.json for that architecture; its "default" stands
for all other GPUs; they need for float16 what they need for bfloat16. Registers and bytes of stack are per thread,
bytes of shared memory per block.
"""


class Resources(NamedTuple):
    """Of one configuration on one architecture."""

    name: str
    label: str  # of configurations that differ in options and alignment only
    warps: int
    registers: int  # per thread
    stack_bytes: int  # per thread: spilled registers are here
    shared_bytes: int  # per block
    product: str  # the instruction that multiplies matrices, "" if there is none
    ttir: str  # Triton's representation before anything depends on the architecture
    ptx: str


def resources(configuration: Configuration, architecture: str) -> Resources:
    """Compile for an architecture and read what the program needs."""
    source = ASTSource(configuration.kernel, configuration.signature, configuration.constexprs, configuration.attrs)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=configuration.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack_bytes = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK"))
    return Resources(
        name=configuration.name,
        label=_label(configuration),
        warps=compiled.metadata.num_warps,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        product=next((name for name, instruction in PRODUCTS.items() if instruction in compiled.asm["ptx"]), ""),
        ttir=compiled.asm["ttir"],
        ptx=compiled.asm["ptx"],
    )


def all_resources(configurations: Iterable[Configuration], architecture: str) -> list[Resources]:
    """In this many threads: what takes the time, Triton's passes and ptxas, lets others run."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda x: resources(x, architecture), configurations))


def _page() -> str:
    sections = [TEXT.format(version=triton.__version__)]
    for architecture in ARCHITECTURES:
        dtypes = torch.bfloat16, torch.float32
        configurations = {f"Cut kernels, {x}": list(of_table(x, dtypes)) for x in (architecture, "default")}
        configurations["Fold, samples and batch"] = [*of_fold(), *of_sample(), *of_batch()]
        for name, found in configurations.items():
            sections.append(f"## {architecture}: {name}\n\n{_table(all_resources(found, architecture))}\n")
    return "\n".join(sections)


def _table(found: list[Resources]) -> str:
    """The largest numbers of all configurations that differ in options and alignment only."""
    header = ["kernel", "configurations", "warps", "registers", "stack", "shared memory", "product"]
    lines = [header, ["---", *["--:"] * 5, "---"]]
    for label in dict.fromkeys(x.label for x in found):
        alike = [x for x in found if x.label == label]
        largest = [max(column) for column in zip(*(x[2:6] for x in alike), strict=True)]
        products = " ".join(sorted({x.product for x in alike}))
        lines.append([label, str(len(alike)), *map(str, largest), products])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _label(configuration: Configuration) -> str:
    """Kernel, what its programs own, dtype and block sizes."""
    constants = configuration.constexprs
    dtype = configuration.signature[next(iter(configuration.signature))].removeprefix("*")
    sizes = [f"{name}={constants[name]}" for name in constants if name.startswith("BLOCK")]
    owner = [f"owner of {constants['OWNER']}"] if "OWNER" in constants else []
    return ", ".join([configuration.kernel.__name__, *owner, dtype, *sizes])


if __name__ == "__main__":
    PAGE.write_text(_page())
