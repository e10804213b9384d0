"""Measure an op's steps, and print them against the machine's ceilings and kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from mopo_kernels.backends import choose
from mopo_kernels.head.call import HeadCall, HeadInputs
from mopo_kernels.head.engines import choose_backend
from mopo_kernels.head.plan import plan_for
from mopo_kernels.measure.roofline import Ceilings, Run, Work, ceilings_of, peak_bytes, time_once
from mopo_kernels.measure.workloads import WORKLOADS, Sizes, ranged

LINES = 15  # of the kernel table


class Line(NamedTuple):
    """A kernel, or an operator on a CPU: what it costs a step."""

    name: str
    calls: float
    seconds: float


def report(op: str, sizes: Sizes, backend: str | None, steps: int) -> torch.profiler.profile:
    """Measure, print, and return what the timeline is made of."""
    device = sizes.device
    inputs = WORKLOADS[op].inputs(sizes)
    how = _how(op, sizes, backend, inputs)
    call = WORKLOADS[op].bind(backend, *inputs)
    call()  # compiles kernels, chooses algorithms
    seconds = median(time_once(call, device) for _ in range(steps))
    peak = peak_bytes(call, device)
    profiler = trace(call, op, steps, device)
    print(_heading(op, sizes, how))
    print(against_ceilings(WORKLOADS[op].work(sizes), ceilings_of(device, sizes.dtype), seconds, peak))
    print(table(lines_of(profiler, steps, device)))
    return profiler


def trace(call: Run, name: str, steps: int, device: torch.device) -> torch.profiler.profile:
    """The profile of some steps, each a range."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        for step in range(steps):
            with ranged(f"{name}, step {step}"):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return profiler


def lines_of(profiler: torch.profiler.profile, steps: int, device: torch.device) -> list[Line]:
    """Kernels on a GPU, operators without their callees on a CPU; the longest first."""
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    lines = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == kind and not event.is_user_annotation and microseconds > 0:
            lines.append(Line(event.key, event.count / steps, microseconds / steps / 1e6))
    return sorted(lines, key=lambda line: -line.seconds)


def against_ceilings(work: Work, ceilings: Ceilings, seconds: float, peak: int | None) -> str:
    rows = [("needed", "ceiling", "time at it", "")]
    if work.flops:
        rows.append((f"{work.flops:.3g}", f"{ceilings.gemm:.3g}/s", milliseconds(work.flops / ceilings.gemm), "flops"))
    rows.append((f"{work.bytes:.3g}", f"{ceilings.copy:.3g}/s", milliseconds(work.bytes / ceilings.copy), "bytes"))
    step = f"a step takes {milliseconds(seconds)}, {ceilings.fraction(work, seconds):.0%} of the roofline"
    memory = "" if peak is None else f", and {peak / 2**20:.0f} MiB beside its inputs"
    return f"{_columns(rows)}\n{step}{memory}\n"


def table(lines: list[Line]) -> str:
    total = sum(line.seconds for line in lines)
    rows = [("share", "time a step", "calls", "kernel or operator")]
    rows += [
        (f"{line.seconds / total:.1%}", milliseconds(line.seconds), f"{line.calls:g}", line.name[:80])
        for line in lines[:LINES]
    ]
    rest = lines[LINES:]
    if rest:
        left = sum(line.seconds for line in rest)
        rows.append((f"{left / total:.1%}", milliseconds(left), "", f"{len(rest)} more"))
    return _columns(rows)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Numbers to the right, what stands last to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _heading(op: str, sizes: Sizes, how: str) -> str:
    n, h, v, dtype, device = sizes
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{op}: {n} rows, hidden size {h}, vocabulary {v}, {str(dtype).removeprefix('torch.')}, {machine}\n{how}\n"


def _how(name: str, sizes: Sizes, backend: str | None, inputs: tuple[Tensor, ...]) -> str:
    """Which backend runs it and, for the clone step, by which plan."""
    op = WORKLOADS[name].op
    if op != "linear_logprob":
        choice = choose(op, sizes.device.type, backend)
        return f"backend {choice.backend}: {choice.reason}"
    hidden, weight, target = inputs
    head, call = HeadInputs(hidden, weight, None, target), HeadCall.of(temperature=1.0, ignore_index=-100)
    chosen = choose_backend(head, call, backend)
    if name != "mopo_loss" or chosen in ("reference", "cut"):
        return f"backend {chosen}"
    return f"backend {chosen}: {plan_for(head, slice(0, sizes.rows), call.on(chosen, head.needs), 'fused').reason}"
