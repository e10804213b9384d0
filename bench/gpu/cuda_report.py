"""What nvcc makes of the CUDA kernels: registers, shared memory and spills, as a Markdown table. Needs no GPU.

python bench/gpu/cuda_report.py
"""

from __future__ import annotations

import re
import runpy
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build_options")


class Resources(NamedTuple):
    """Of one kernel on one architecture, per thread and, shared memory, per block."""

    kernel: str  # as in "statistics_kernel<bfloat16>"
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def kernel_resources(architectures: list[str]) -> list[Resources]:
    """Compile every .cu file for these compute capabilities and read ptxas' report."""
    return [found for source in BUILD["CUDA_SOURCES"] for found in _read(_compile(source, architectures))]


def resource_table(resources: list[Resources]) -> str:
    """A row per kernel, a column of registers per architecture."""
    architectures = list(dict.fromkeys(found.architecture for found in resources))
    header = ["kernel", *(f"registers, {x}" for x in architectures), "shared memory, bytes", "spills and stack, bytes"]
    lines = [header, ["---"] + ["--:"] * (len(header) - 1)]
    for kernel in sorted({found.kernel for found in resources}):
        on = {found.architecture: found for found in resources if found.kernel == kernel}
        shared = max(found.shared_bytes for found in on.values())
        spilled = sum(found.spill_bytes + found.stack_bytes for found in on.values())
        lines.append([kernel, *(str(on[x].registers) for x in architectures), str(shared), str(spilled)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _compile(source: str, architectures: list[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        options = [*BUILD["NVCC_FLAGS"], *BUILD["code_generation"](architectures), "-Xptxas", "-v"]
        command = [BUILD["find_nvcc"](), "-c", *options, source, "-o", f"{folder}/kernels.o"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"nvcc could not compile {source}:\n{result.stderr}")
    return result.stderr


def _read(report: str) -> list[Resources]:
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        re.DOTALL,
    )
    return [
        Resources(
            kernel=_readable(match["name"]),
            architecture=match["architecture"],
            registers=int(match["registers"]),
            stack_bytes=int(match["stack"]),
            spill_bytes=int(match["stores"]) + int(match["loads"]),
            shared_bytes=int(match["shared"] or 0),
        )
        for match in pattern.finditer(report)
    ]


def _readable(mangled: str) -> str:
    """The kernel of a mangled name, with its element type if it is a template, that of its results if it is another,
    and whether it computes more."""
    types = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
    match = re.search(rf"\d([a-z_]+_kernel)(?:I({'|'.join(types)})([fd]|S\d*_)?(Lb[01])?E)?", mangled)
    if match is None:
        raise ValueError(f"no kernel in {mangled!r}")
    if match[2] is None:
        return match[1]
    elements = dict.fromkeys(types[x] for x in match.groups()[1:3] if x in types)
    return f"{match[1]}<{', '.join([*elements, *(['more'] if match[4] == 'Lb1' else [])])}>"


if __name__ == "__main__":
    print(resource_table(kernel_resources(BUILD["CUDA_ARCHS"].split())))
