"""The command `mopo profile`, or python -m mopo_kernels.measure.profile: where the time of an op goes on this machine.

Prints what the op must do at least, this machine's ceilings, how far the measured step is from them, and a table of
kernels (of operators on a CPU). On a GPU every step, its forward and its backward are NVTX ranges. Torch is imported
when there is something to measure, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

OPS = {  # of workloads.py
    "mopo_loss": "clone step of mopo_loss, forward and backward",
    "linear_logprob": "forward and backward of the sum",
    "linear_logprob_rows": "forward and backward of each row's",
    "linear_logprob_sampled": "forward and backward of the sum, gradients sampled at 2^-6",
    "mopo_loss_sampled": "clone step of mopo_loss, gradients sampled at 2^-6",
    "linear_logprob_forward": "no gradients, as for a reference model",
    "frozen_head": "linear_logprob where hidden alone needs a gradient (LoRA)",
    "token_logprob": "from logits, forward",
    "token_logprob_backward": "gradient of the logits",
    "sequence_sums": "sums of N log-probabilities over sequences",
    "label_statistics": "weights, win rates and bounds of N responses",
}
DTYPES = ("bfloat16", "float16", "float32")
DEFAULTS: dict[str, tuple[int | str, int | str]] = {  # on a GPU and on a CPU
    "rows": (4096, 256),
    "hidden_size": (4096, 512),
    "vocab": (128256, 32768),
    "dtype": ("bfloat16", "float32"),
}
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m mopo_kernels.measure.profile`; returns the exit code."""
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
    options = _parser().parse_args(arguments)
    if options.trace and not options.trace.parent.is_dir():
        raise ValueError(f"--trace {options.trace}: there is no directory {options.trace.parent}")

    import torch

    from mopo_kernels.measure import timeline
    from mopo_kernels.measure.workloads import Sizes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (on_gpu, on_cpu) in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, on_cpu if device.type == "cpu" else on_gpu)
    sizes = Sizes(options.rows, options.hidden_size, options.vocab, getattr(torch, options.dtype), device)
    try:
        profiler = timeline.report(options.op, sizes, options.backend, options.steps)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{options.op} at these sizes does not fit the memory of {device}: take fewer --rows"
        ) from error
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
        print(f"\nthe timeline is in {options.trace}: open it in chrome://tracing or perfetto.dev")
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are exceptions of one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="mopo profile",
        description="Where the time of an op goes on this machine, and how far it is from the machine's ceilings.",
        epilog=EXAMPLES.format(ops="\n".join(f"  {name:<24}{what}" for name, what in OPS.items())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--op", choices=OPS, default="mopo_loss", metavar="NAME", help="see below (default %(default)s)"
    )
    for name, what in (
        ("rows", "tokens that count; responses of label_statistics"),
        ("hidden_size", "H of the model"),
        ("vocab", "V of the model"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=_positive, metavar="N", help=f"{what} ({_default(name)})")
    parser.add_argument("--steps", type=_positive, default=5, metavar="N", help="steps to time and trace (default 5)")
    what = ", ".join(DTYPES)
    parser.add_argument("--dtype", choices=DTYPES, metavar="NAME", help=f"{what} ({_default('dtype')})")
    parser.add_argument("--backend", metavar="NAME", help="instead of the table's choice; `mopo doctor` lists them")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="where to write the timeline")
    return parser


def _default(name: str) -> str:
    return "default {} on a GPU, {} on a CPU".format(*DEFAULTS[name])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
