"""What Triton makes of every kernel for A100, H100 and B200, compiled here: spills, shared memory, tensor cores."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench" / "gpu"
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
SHARED_BYTES_ANYWHERE = 99 * 1024
REGISTERS = 65536  # of a multiprocessor
PRODUCT = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}  # of 16 bits
# The kernel of label statistics holds a whole batch, of which a thread has several responses.
STACK_BYTES = {"BLOCK_B=1024": 64, "BLOCK_B=8192": 4096}

# Configurations by names in bench/gpu/aot_configurations.py. With all options, those of most work.
CUT = "[of_cut(kernel, torch.bfloat16, TABLE['{architecture}']['bfloat16'][kernel])[0] for kernel in {kernels}]"
FOLD = "[x for x in of_fold() if 'row_stride=50257' in x.name and 'ALIGN=16' in x.name and 'bias=None' not in x.name]"
HALF = f"[x for x in {FOLD} if 'bf16' in x.name and 'SOFTCAP=True' in x.name]"
SAMPLE = "list({x.kernel.__name__: x for x in of_sample() if 'bf16' in x.name and 'stride' in x.name}.values())"
BATCH = "[x for x in of_batch() if 'BLOCK_L' in x.name or 'BLOCK_B=1024' in x.name][::2]"

COMPILE = """
import json, sys
from aot_configurations import *
from aot_report import all_resources
json.dump([x._asdict() for x in all_resources(list({expression}), {architecture!r})], sys.stdout)
"""


def has_tools():
    try:
        return bool(triton.knobs.nvidia.ptxas.path and triton.knobs.nvidia.cuobjdump.path)
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(
    not has_tools(), reason="needs ptxas and cuobjdump, which Triton's wheel for Linux brings"
)
on_all = pytest.mark.parametrize("architecture", SHARED_BYTES)


def compiled(expression, architecture):
    """Resources of the configurations that a Python expression gives, in a process of its own: this one's Triton may be
    the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCH), environment.get("PYTHONPATH", "")])
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


def check_vectors(found):
    """Rows that begin anywhere are read and written 16 bytes at a time."""
    for x in found:
        bits, block = (int(re.search(pattern, x["name"])[1]) for pattern in (r"fp?(\d\d)", r"BLOCK_V=(\d+)"))
        vectors = block * bits // 8 // 16 // 256  # that each of 256 threads has
        loads, stores = (len(re.findall(y + r"\.global\S*\.v(4\.b32|2\.b64)", x["ptx"])) for y in ("ld", "st"))
        assert 1 <= vectors <= loads, x["name"]
        assert stores >= (vectors if x["name"].startswith("gradient") else 0), x["name"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_a_kernel_of_each_kind(architecture):
    cut = CUT.format(architecture=architecture, kernels=("statistics", "gradients"))
    found = compiled(f"{cut} + {HALF} + {SAMPLE}", architecture)
    assert len(found) == 8
    check(found, architecture)


def test_all_kernels_on_h100():
    """What Triton does before it knows the architecture shows here for all: atomics, barriers, vectors."""
    cut = CUT.format(architecture="sm_90", kernels="KERNELS")
    found = compiled(f"{cut} + {HALF} + {SAMPLE} + {BATCH}", "sm_90")
    assert [x["name"].split("(")[0] for x in found] == [
        "cut_statistics_kernel",
        *["cut_gradients_kernel"] * 3,
        *["statistics_kernel", "gradient_kernel"] * 2,
        "sample_kernel",
        "sum_rows_kernel",
        "sequence_sums_kernel",
        "label_statistics_kernel",
    ]
    check(found, "sm_90")
    check_owners(found)
    check_vectors(found[4:8])


@pytest.mark.slow
def test_rows_that_begin_anywhere_are_read_and_written_16_bytes_at_a_time():
    found = compiled(FOLD, "sm_90")
    assert len(found) == 32  # of four dtypes, with a softcap and without, with entropies and slopes of lse and without
    check_vectors(found)


@pytest.mark.slow
@on_all
def test_all_that_the_cut_kernels_launch(architecture):
    found = compiled(f"of_table({architecture!r})", architecture)
    check(found, architecture)
    check_owners(found)


@pytest.mark.slow
@on_all
def test_blocks_for_any_gpu(architecture):
    check(compiled("of_table('default')", architecture), architecture, SHARED_BYTES_ANYWHERE)


@pytest.mark.slow
@on_all
def test_blocks_worth_timing(architecture):
    check(compiled("of_candidates()", architecture), architecture)


@pytest.mark.slow
@on_all
def test_all_fold_sample_and_batch_kernels(architecture):
    check(compiled("[*of_fold(), *of_sample(), *of_batch()]", architecture), architecture)
