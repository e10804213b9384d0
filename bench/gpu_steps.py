"""The measurements of the GPU report, one step a process: python bench/gpu_steps.py STEP --results FILE [--dry-run]

Every result is a JSON line of FILE the moment it is known. A dry run takes tiny sizes on CPU tensors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_contest
import torch
from mopo_kernels.plan import GPU_WORKSPACE
from mopo_kernels.profile import lines_of, trace
from mopo_kernels.rates import architecture
from mopo_kernels.roofline import Run, copy_rate, gemm_rate, seconds_of
from mopo_kernels.workloads import TAU, WORKLOADS, Sizes

from mopo_kernels import backends
from mopo_kernels.backends import cut, cut_tile
from mopo_kernels.backends.fold import Transform

DTYPE = torch.bfloat16
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "pytest")
TOLERANCE = 1e-2  # relative, between block sizes: they differ by roundings of 16 bits


class Extent(NamedTuple):
    """How large the measurements are."""

    heads: dict[str, tuple[int, int]]  # step → H, V
    rows: tuple[int, ...]  # of an LM head, the most telling first
    logit_rows: int
    responses: int
    tile_rows: int  # what the tile engine multiplies at once
    tune: tuple[int, int, int]  # N, H, V
    square: int
    copy: int
    rounds: int
    compiler: str  # torch.compile's backend


REAL = Extent(
    heads={"heads-4096": (4096, 128256), "heads-2048": (2048, 32768), "heads-5120": (5120, 151936)},
    rows=(16384, 65536, 4096),
    logit_rows=8192,
    responses=64,
    tile_rows=2048,
    tune=(8192, 4096, 32768),
    square=8192,
    copy=2**30,
    rounds=5,
    compiler="inductor",
)
DRY = Extent(
    heads={"heads-32": (32, 100)},
    rows=(6,),
    logit_rows=5,
    responses=64,
    tile_rows=4,
    tune=(6, 32, 100),
    square=64,
    copy=2**16,
    rounds=1,
    compiler="aot_eager",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["environment", "ceilings", "ops", "tune", *REAL.heads, *DRY.heads])
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    device, extent = (torch.device("cpu"), DRY) if options.dry_run else (torch.device("cuda"), REAL)
    measure: dict[str, Callable[[torch.device, Extent], Iterator[dict[str, Any]]]] = {
        "environment": environment,
        "ceilings": ceilings,
        "ops": ops,
        "tune": tune,
        **{name: partial(heads, name) for name in extent.heads},
    }
    with options.results.open("a") as file:
        for result in measure[options.step](device, extent):
            file.write(json.dumps(result) + "\n")
            file.flush()


def environment(_: torch.device, __: Extent) -> Iterator[dict[str, Any]]:
    """Software, and the GPU if there is one."""
    found: dict[str, Any] = {"kind": "environment", "gpu": None, "cuda": torch.version.cuda, "workspace": GPU_WORKSPACE}
    found["packages"] = {name: _version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "architecture": architecture(torch.device("cuda"))}
        found |= {"memory": properties.total_memory, "l2": properties.L2_cache_size}
        found["multiprocessors"] = properties.multi_processor_count
    found["backends"] = {
        f"{choice.op} on {choice.device}": f"{choice.backend}: {choice.reason}" for choice in backends.describe()
    }
    yield found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---------------------------------------------------------------------------------------------------------- ceilings


def ceilings(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Copies, a large square product, and the three products of an LM head with nothing between them."""
    yield {"kind": "copy", "bytes_per_second": copy_rate(extent.copy, device)}
    rate = gemm_rate(extent.square, extent.square, extent.square, DTYPE, device)
    yield {"kind": "gemm", "name": f"{extent.square}³", "flops_per_second": rate}
    for h, v in extent.heads.values():
        rates = []
        for name, call in _products(extent.tile_rows, h, v, device).items():
            rates.append(2.0 * extent.tile_rows * h * v / seconds_of(call, device))
            yield {"kind": "gemm", "name": f"{name}, H={h} V={v}", "flops_per_second": rates[-1]}
        yield {"kind": "products", "sizes": [h, v], "flops_per_second": 3 / sum(1 / rate for rate in rates)}


def _products(rows: int, h: int, v: int, device: torch.device) -> dict[str, Run]:
    hidden, weight = (torch.randn(n, h, device=device).to(DTYPE) for n in (rows, v))
    tile = torch.randn(rows, v, device=device).to(DTYPE)
    return {
        "logits": lambda: torch.mm(hidden, weight.t()),
        "grad_hidden": lambda: torch.mm(tile, weight),
        "grad_weight": lambda: torch.mm(tile.t(), hidden),
    }


# --------------------------------------------------------------------------------------------------------------- ops


def heads(step: str, device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    h, v = extent.heads[step]
    for rows in extent.rows:
        contestants = gpu_contest.heads(compiler=extent.compiler)
        yield from gpu_contest.hold(contestants, Sizes(rows, h, v, DTYPE, device), rounds=extent.rounds)


def ops(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """What has no LM head in it."""
    for h, v in extent.heads.values():
        contestants = gpu_contest.token_ops(compiler=extent.compiler)
        yield from gpu_contest.hold(contestants, Sizes(extent.logit_rows, h, v, DTYPE, device), rounds=extent.rounds)
    kernels = ("cuda", "triton")
    for workload, rows in (("sequence_sums", 16 * extent.logit_rows), ("objective", extent.responses)):
        contestants = [gpu_contest.ours(workload, backend) for backend in (None, *kernels, "reference")]
        yield from gpu_contest.hold(contestants, Sizes(rows, 1, 1, DTYPE, device), rounds=extent.rounds)
    for name in kernels:
        yield {"kind": "launches", "backend": name, "responses": extent.responses} | _launches(name, device, extent)


def _launches(backend: str, device: torch.device, extent: Extent) -> dict[str, Any]:
    """Kernels of one call of the batch contract's `objective`, and their time on the device."""
    if device.type != "cuda":
        return {"error": "a CPU launches nothing"}
    inputs = WORKLOADS["objective"].inputs(Sizes(extent.responses, 1, 1, DTYPE, device))
    options = {"tau": TAU, "eps": 0.01, "policy_step": "clone", "normalize": "group", "primary": 0}
    calls = 10
    try:
        backends.choose("objective", device.type, backend)
        objective = partial(backends.batch(backend).objective, *inputs, None, None, None, **options)
        objective()
        kernels = lines_of(trace(objective, "objective", calls, device), calls, device)
    except Exception as error:
        return {"error": gpu_contest.reason(error)}
    return {"launches": sum(kernel.calls for kernel in kernels), "device_seconds": sum(k.seconds for k in kernels)}


# -------------------------------------------------------------------------------------------------------------- tune


def tune(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Every candidate of every cut kernel, the table's own block sizes first: time, and whether the results agree."""
    sizes = Sizes(*extent.tune, DTYPE, device)
    hidden, weight, target = (x.detach() for x in WORKLOADS["linear_logprob"].inputs(sizes))
    run_statistics = partial(cut.cut_statistics, hidden, weight, target, Transform.of(1.0, None))
    lse = run_statistics().lse
    coefficient = torch.full_like(lse, 1 / len(lse))
    run_gradients = partial(cut.cut_gradients, hidden, weight, target, lse, coefficient, Transform.of(1.0, None))
    product = 2.0 * hidden.numel() * len(weight)
    kernels = {  # what to run, products it forms, whether sums have owners
        "statistics": (run_statistics, 1, False),
        "gradients": (partial(run_gradients, needs=(True, True, False)), 3, False),
        "grad_hidden": (partial(run_gradients, needs=(True, False, False)), 2, True),
        "grad_weight": (partial(run_gradients, needs=(False, True, False)), 2, True),
    }
    to_try = {
        kernel: list(dict.fromkeys([cut_tile.blocks_for(kernel, hidden), *cut_tile.candidates(kernel, DTYPE)]))
        for kernel in cut_tile.KERNELS
    }
    expected: dict[str, list[torch.Tensor]] = {}
    for turn in itertools.zip_longest(*to_try.values()):  # so that each kernel has had some when the time is up
        for kernel, blocks in zip(to_try, turn, strict=True):
            if blocks is None:
                continue
            run, products, owned = kernels[kernel]
            result = {"kind": "blocks", "kernel": kernel, "blocks": blocks._asdict()}
            result["current"] = blocks == to_try[kernel][0]
            torch.use_deterministic_algorithms(owned)
            try:
                got = _tensors(run(blocks=blocks))
                _check_same(got, expected.setdefault(kernel, got))
                seconds = seconds_of(partial(run, blocks=blocks), device, rounds=extent.rounds, warmup=0)
                yield result | {"seconds": seconds, "flops_per_second": products * product / seconds}
            except Exception as error:
                yield result | {"error": gpu_contest.reason(error)}


def _check_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for x, truth in zip(got, expected, strict=True):
        error = ((x - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"{error:.1e} from what the table's blocks give")


def _tensors(result: Any) -> list[torch.Tensor]:
    """lse of statistics, or the gradients that were asked for."""
    return [result.lse] if hasattr(result, "lse") else [x for x in result if x is not None]


if __name__ == "__main__":
    main()
