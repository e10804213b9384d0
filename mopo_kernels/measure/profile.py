"""Where the time of an op goes on this machine: mopo profile, or python -m mopo_kernels.profile.

Prints what the op must do at least, this machine's ceilings, how far the measured step is from them, and a table of
kernels (of operators on a CPU). On a GPU every step, its forward and its backward are NVTX ranges.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from mopo_kernels.backends import choose
from mopo_kernels.head_ops import backend_for, plan_for
from mopo_kernels.plan import default_workspace
from mopo_kernels.roofline import Ceilings, Run, Work, ceilings_of, peak_bytes, time_once
from mopo_kernels.workloads import WORKLOADS, Sizes, ranged

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULTS = {"cuda": (4096, 4096, 128256, "bfloat16"), "cpu": (256, 512, 32768, "float32")}  # rows, H, V, dtype
LINES = 15  # of the kernel table

EXAMPLES = """\
ops:
{ops}

examples:
  mopo profile                                                 the clone step of mopo_loss at a common size
  mopo profile --rows 16384 --hidden-size 5120 --vocab 151936  at your model's
  mopo profile --op frozen_head                                a LoRA step: the head takes no gradient
  mopo profile --op token_logprob --trace trace.json           and a timeline for chrome://tracing or perfetto.dev
  mopo profile --backend cut                                   another backend than the table's choice
  nsys profile -t cuda,nvtx mopo profile --steps 3             the same ranges in Nsight Systems

reading it: `needed` is what no implementation of the op can avoid, `ceiling` what matrix products and copies reach on
this machine, measured just now.  The larger of the two times is the floor: "74% of the roofline" means that a perfect
kernel would take 0.74 of the measured time.
"""


class Line(NamedTuple):
    """A kernel, or an operator on a CPU: what it costs a step."""

    name: str
    calls: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m mopo_kernels.profile`; returns the exit code."""
    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except (ValueError, OSError) as error:
        print(f"mopo profile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(arguments: Sequence[str]) -> int:
    """The same with exceptions instead of messages.

    Raises:
        ValueError: an option that makes no sense, sizes that do not fit, or a backend that cannot run the op here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = _parser(device).parse_args(arguments)
    if options.trace and not options.trace.parent.is_dir():
        raise ValueError(f"--trace {options.trace}: there is no directory {options.trace.parent}")
    sizes = Sizes(options.rows, options.hidden_size, options.vocab, DTYPES[options.dtype], device)
    try:
        profiler = _report(options.op, sizes, options.backend, options.steps)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{options.op} at these sizes does not fit the memory of {device}: take fewer --rows"
        ) from error
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
        print(f"\nthe timeline is in {options.trace}: open it in chrome://tracing or perfetto.dev")
    return 0


def _report(op: str, sizes: Sizes, backend: str | None, steps: int) -> torch.profiler.profile:
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
    hidden, weight, _ = inputs
    chosen = backend_for(hidden, weight, backend, None)
    if chosen == "reference" or name != "mopo_loss":
        return f"backend {chosen}"
    plan = plan_for(slice(0, sizes.rows), weight, chosen, default_workspace(sizes.device), "fused")
    return f"backend {chosen}: {plan.reason}"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are exceptions of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser(device: torch.device) -> _Parser:
    ops = "\n".join(f"  {name:<24}{workload.help}" for name, workload in WORKLOADS.items())
    rows, hidden_size, vocab, dtype = DEFAULTS[device.type]
    parser = _Parser(
        prog="mopo profile",
        description="Where the time of an op goes on this machine, and how far it is from the machine's ceilings.",
        epilog=EXAMPLES.format(ops=ops),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--op", choices=WORKLOADS, default="mopo_loss", metavar="NAME", help="see below (default %(default)s)"
    )
    for name, default, what in (
        ("--rows", rows, "tokens that count; responses of objective"),
        ("--hidden-size", hidden_size, "H of the model"),
        ("--vocab", vocab, "V of the model"),
        ("--steps", 5, "steps to time and trace"),
    ):
        parser.add_argument(name, type=_positive, default=default, metavar="N", help=f"{what} (default {default})")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype, metavar="NAME", help=f"{', '.join(DTYPES)} (default {dtype})"
    )
    parser.add_argument("--backend", metavar="NAME", help="instead of the table's choice; `mopo doctor` lists them")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="where to write the timeline")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
