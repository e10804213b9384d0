"""What Triton makes of every kernel for A100, H100 and B200, compiled here: spills, shared memory, tensor cores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

BENCH = Path(__file__).parents[1] / "bench"
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SHARED_BYTES_ANYWHERE = 99 * 1024
REGISTERS = 65536  # of a multiprocessor
PRODUCT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}  # of 16 bits
# The objective's kernel holds a whole batch, of which a thread has several responses.
STACK_BYTES = {"BLOCK_B=1024": 64, "BLOCK_B=8192": 4096}

COMPILE = """
import json, sys
import torch
from aot_report import *
found = all_resources(list({expression}), {architecture!r})
json.dump([x._asdict() for x in found], sys.stdout)
"""


def has_tools():
    try:
        return bool(triton.knobs.nvidia.ptxas.path and triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        return False


pytestmark = [
    pytest.mark.skipif(not has_tools(), reason="needs ptxas and cuobjdump, which Triton's wheel for Linux brings"),
    pytest.mark.parametrize("architecture", SHARED_BYTES),
]


def compiled(expression, architecture):
    """Resources of the configurations that a Python expression in bench/aot_report.py gives, in a process of its own:
    this one's Triton may be the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(BENCH)
    script = COMPILE.format(expression=expression, architecture=architecture)
    command = [sys.executable, "-W", "ignore", "-c", script]
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    assert found
    return found


def check(found, architecture, shared_bytes=None):
    for x in found:
        stack = [limit for size, limit in STACK_BYTES.items() if size in x["label"]]
        assert x["stack_bytes"] <= sum(stack), x["name"]
        assert x["shared_bytes"] <= (shared_bytes or SHARED_BYTES[architecture]), x["name"]
        assert x["registers"] * 32 * x["warps"] <= REGISTERS, x["name"]
        multiplies = re.match(r"cut_\w+\((fp16|bf16)", x["name"])
        assert x["product"] == (PRODUCT[architecture] if multiplies else ""), x["name"]


def check_owners(found):
    """A program that owns its sums adds to them without atomics, and waits before other threads read what it wrote."""
    for x in found:
        if "OWNER=nothing" in x["name"]:
            assert "tt.atomic_rmw" in x["ttir"], x["name"]
        elif "OWNER=" in x["name"]:
            assert "atomic" not in x["ttir"], x["name"]
            assert re.search(r"\b(ttg|gpu)\.barrier", x["ttir"][x["ttir"].rindex("tt.store") :]), x["name"]


def test_cut_kernels_in_bfloat16(architecture):
    table = f"cut_tile.TABLE[{architecture!r}]['bfloat16']"
    expression = f"(cut.configurations(kernel, torch.bfloat16, blocks)[0] for kernel, blocks in {table}.items())"
    found = compiled(expression, architecture)
    assert len(found) == 4
    check(found, architecture)
    check_owners(found)


def test_some_fold_and_batch_kernels(architecture):
    check(compiled("fold_and_batch_configurations()[::17]", architecture), architecture)


@pytest.mark.slow
def test_all_that_the_cut_kernels_launch(architecture):
    found = compiled(f"table_configurations({architecture!r})", architecture)
    check(found, architecture)
    check_owners(found)


@pytest.mark.slow
def test_blocks_for_any_gpu(architecture):
    check(compiled("table_configurations('default')", architecture), architecture, SHARED_BYTES_ANYWHERE)


@pytest.mark.slow
def test_blocks_worth_timing(architecture):
    check(compiled("candidate_configurations()", architecture), architecture)


@pytest.mark.slow
def test_all_fold_and_batch_kernels(architecture):
    check(compiled("fold_and_batch_configurations()", architecture), architecture)
