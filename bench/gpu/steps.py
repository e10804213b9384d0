"""The measurements of the GPU report, one step a process: python -m bench.gpu.steps STEP --results FILE [--dry-run]

Every result is a JSON line of FILE the moment it is known. A dry run takes tiny sizes on CPU tensors.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch

from bench import harness, peers
from mopo_kernels import backends
from mopo_kernels.backends.fold import Transform
from mopo_kernels.backends.triton import cut, cut_tile
from mopo_kernels.head.plan import default_workspace
from mopo_kernels.head.rates import architecture
from mopo_kernels.measure.roofline import Run, copy_rate, gemm_rate, seconds_of, steady_seconds
from mopo_kernels.measure.timeline import lines_of, trace
from mopo_kernels.measure.workloads import WORKLOADS, Sizes, backward_alone, labels_of

DTYPE = torch.bfloat16
PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "trl", "pytest")
TOLERANCE = 1e-2  # relative, between block sizes: they differ by roundings of 16 bits


class Extent(NamedTuple):
    """How large the measurements are."""

    heads: dict[str, tuple[int, int]]  # step → H, V
    rows: tuple[int, ...]  # of an LM head, the most telling first
    logit_rows: int
    responses: int
    tile_rows: int  # what the tile engine multiplies at once
    tune: tuple[int, int, int]  # N, H, V
    candidates: int | None  # block sizes to try of each cut kernel; None: all
    square: int
    copy: int
    rounds: int
    compiler: str  # torch.compile's backend


REAL = Extent(
    heads={"heads-4096": (4096, 128256), "heads-2048": (2048, 32768), "heads-5120": (5120, 151936)},
    rows=(16384, 4096, 65536),
    logit_rows=8192,
    responses=64,
    tile_rows=2048,
    tune=(8192, 4096, 32768),
    candidates=None,
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
    candidates=2,
    square=64,
    copy=2**16,
    rounds=1,
    compiler="eager",
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
    found: dict[str, Any] = {"kind": "environment", "gpu": None, "cuda": torch.version.cuda}
    found["workspace"] = default_workspace(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
    """Copies, a large square product, and the three products of an LM head with nothing between them, each steadily."""
    yield {"kind": "copy", "bytes_per_second": copy_rate(extent.copy, device)}
    rate = gemm_rate(extent.square, extent.square, extent.square, DTYPE, device)
    yield {"kind": "gemm", "name": f"{extent.square}³", "flops_per_second": rate}
    for h, v in extent.heads.values():
        rates = []
        for name, call in _products(extent.tile_rows, h, v, device).items():
            rates.append(2.0 * extent.tile_rows * h * v / steady_seconds(call, device))
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


# ---------------------------------------------------------------------------------------------------------- contests


class Contestant(NamedTuple):
    """Who does the work of a workload, and how."""

    name: str
    workload: str
    bind: Callable[..., Run]  # of the workload's inputs


def ours(workload: str, *names: str | None) -> list[Contestant]:
    """Ours by the table's choice (None) and by backends of these names."""
    bind = WORKLOADS[workload].bind
    return [Contestant(f"{workload}, {name}" if name else workload, workload, partial(bind, name)) for name in names]


def contest(contestants: list[Contestant], sizes: Sizes, extent: Extent) -> Iterator[dict[str, Any]]:
    """Time contestants of workloads that have the same inputs."""
    inputs = WORKLOADS[contestants[0].workload].inputs(sizes)
    limits = harness.ON_GPU._replace(rounds=extent.rounds)
    results = harness.hold({x.name: x.bind for x in contestants}, inputs, sizes.device, limits)
    for name, workload, _ in contestants:
        result, work = results[name], WORKLOADS[workload].work(sizes)
        found = {"kind": "time", "name": name, "workload": workload, "sizes": list(sizes[:3]), **work._asdict()}
        found |= {"rounds": result.rounds, "peak_bytes": result.peak_bytes}
        found |= {"error": result.error} if result.error else {"seconds": result.seconds}
        yield found


def heads(step: str, device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Ours by each backend, then the peers' forward and backward."""
    h, v = extent.heads[step]
    for rows in extent.rows:
        losses = peers.GPU_HEADS | peers.heads(compiler=extent.compiler)
        contestants = [
            *ours("mopo_loss", None, "triton", "cut"),
            *ours("linear_logprob", None, "triton", "cut"),
            *ours("linear_logprob_rows", None),
            *ours("mopo_loss_sampled", None, "triton"),
            *ours("linear_logprob_sampled", None, "triton"),
            *ours("linear_logprob_forward", None, "cut"),
            *ours("frozen_head", None, "cut"),
            *(Contestant(name, "linear_logprob", harness.pass_of(loss)) for name, loss in losses.items()),
        ]
        yield from contest(contestants, Sizes(rows, h, v, DTYPE, device), extent)


def ops(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """What has no LM head in it."""
    for h, v in extent.heads.values():
        yield from contest(token_ops(extent.compiler), Sizes(extent.logit_rows, h, v, DTYPE, device), extent)
    for workload, rows in (("sequence_sums", 16 * extent.logit_rows), ("label_statistics", extent.responses)):
        contestants = ours(workload, None, "cuda", "triton", "reference")
        yield from contest(contestants, Sizes(rows, 1, 1, DTYPE, device), extent)
    for name in ("cuda", "triton"):
        yield {"kind": "launches", "backend": name, "responses": extent.responses} | _launches(name, device, extent)


def token_ops(compiler: str) -> list[Contestant]:
    functorch.donated_buffer = False  # a graph's backward is timed again and again
    rows = {"eager": peers.token_rows, "torch.compile": peers.compiled(peers.token_rows, compiler, dynamic=True)}

    def backward(rows: peers.Loss, logits: Tensor, target: Tensor) -> Run:
        return backward_alone(rows(logits, target), logits)

    return [
        *ours("token_logprob", None, "cuda", "triton"),
        *ours("token_logprob_backward", None, "cuda", "triton"),
        *(Contestant(name, "token_logprob", _forward_of(peer)) for name, peer in rows.items()),
        *(
            Contestant(f"{name}, backward", "token_logprob_backward", partial(backward, peer))
            for name, peer in rows.items()
        ),
    ]


def _forward_of(rows: peers.Loss) -> Callable[..., Run]:
    return lambda logits, target: partial(rows, logits.detach(), target)


def _launches(backend: str, device: torch.device, extent: Extent) -> dict[str, Any]:
    """Kernels of one call of the batch contract's `label_statistics`, and their time on the device."""
    if device.type != "cuda":
        return {"error": "a CPU launches nothing"}
    sizes, calls = Sizes(extent.responses, 1, 1, DTYPE, device), 10
    try:
        backends.choose("label_statistics", device.type, backend)
        labels = labels_of(*WORKLOADS["label_statistics"].inputs(sizes))
        call = partial(backends.batch(backend).label_statistics, labels)
        call()
        kernels = lines_of(trace(call, "label_statistics", calls, device), calls, device)
    except Exception as error:
        return {"error": harness.reason(error)}
    return {"launches": sum(kernel.calls for kernel in kernels), "device_seconds": sum(k.seconds for k in kernels)}


# -------------------------------------------------------------------------------------------------------------- tune


class Tuned(NamedTuple):
    """A cut kernel to be tuned."""

    run: Callable[..., list[Tensor]]  # of its block sizes
    products: int  # that it forms
    owned: bool  # whether sums have owners
    blocks: list[cut_tile.Blocks]  # to try, the table's first


def tune(device: torch.device, extent: Extent) -> Iterator[dict[str, Any]]:
    """Every candidate of every cut kernel, the table's own block sizes first: time, and whether the results agree."""
    kernels = _to_tune(Sizes(*extent.tune, DTYPE, device), extent.candidates)
    product = 2.0 * math.prod(extent.tune)
    expected: dict[str, list[Tensor]] = {}
    for turn in itertools.zip_longest(*(x.blocks for x in kernels.values())):  # each has had some when the time is up
        for (name, kernel), blocks in zip(kernels.items(), turn, strict=True):
            if blocks is None:
                continue
            result = {"kind": "blocks", "kernel": name, "blocks": blocks._asdict()}
            result["current"] = blocks == kernel.blocks[0]
            torch.use_deterministic_algorithms(kernel.owned)
            try:
                got = kernel.run(blocks)
                _check_same(got, expected.setdefault(name, got))
                seconds = seconds_of(partial(kernel.run, blocks), device, rounds=extent.rounds, warmup=0)
                yield result | {"seconds": seconds, "flops_per_second": kernel.products * product / seconds}
            except Exception as error:
                yield result | {"error": harness.reason(error)}


def _to_tune(sizes: Sizes, candidates: int | None) -> dict[str, Tuned]:
    hidden, weight, target = (x.detach() for x in WORKLOADS["linear_logprob"].inputs(sizes))
    inputs = cut.CutInputs(hidden, weight, target, Transform.of(1.0, None))
    lse = cut.cut_statistics(inputs).lse
    coefficient = torch.full_like(lse, 1 / len(lse))

    def statistics(blocks: cut_tile.Blocks) -> list[Tensor]:
        return [cut.cut_statistics(inputs, blocks=blocks).lse]

    def gradients(needs: tuple[bool, bool, bool], blocks: cut_tile.Blocks) -> list[Tensor]:
        return [x for x in cut.cut_gradients(inputs, lse, coefficient, needs, blocks=blocks) if x is not None]

    def tuned(kernel: str, run: Callable[..., list[Tensor]], products: int, owned: bool) -> Tuned:
        blocks = [cut_tile.blocks_for(kernel, hidden), *cut_tile.candidates(kernel, DTYPE)]
        return Tuned(run, products, owned, list(dict.fromkeys(blocks))[:candidates])

    return {
        "statistics": tuned("statistics", statistics, 1, False),
        "gradients": tuned("gradients", partial(gradients, (True, True, False)), 3, False),
        "grad_hidden": tuned("grad_hidden", partial(gradients, (True, False, False)), 2, True),
        "grad_weight": tuned("grad_weight", partial(gradients, (False, True, False)), 2, True),
    }


def _check_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, truth in zip(got, expected, strict=True):
        error = ((x - truth).norm() / truth.norm()).item()
        if not error <= TOLERANCE:
            raise ValueError(f"{error:.1e} from what the table's blocks give")


if __name__ == "__main__":
    main()
