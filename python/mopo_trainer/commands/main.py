"""The command `mopo`: train, solve, compare, pareto, demo, doctor, profile.

Every subcommand imports what it needs when it runs, so that `mopo --help` answers at once and `mopo solve` never loads
a model library. Wrong input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mopo_trainer.names import ADAPTER_NAMES, did_you_mean
from mopo_trainer.thresholds import parse_thresholds

DESCRIPTION = "Align language models with several preferences at once: maximise one, hold thresholds on the others."

MAIN_EXAMPLES = """\
a first session:
  mopo doctor                                  what is installed, which backend runs here and why
  mopo solve labels.jsonl --primary helpful    which thresholds the labels allow, what each costs
  mopo solve labels.jsonl --primary helpful --threshold harmless=0.6
  mopo train config.yaml --max_steps 300       train under these thresholds
  mopo compare runs/first held_out.jsonl --scorer brevity --threshold brevity=0.6
                                               does what the model writes hold them?
  mopo demo                                    all of this on a small real model, within ten minutes
  mopo profile                                 where the time of the fused LM head goes on this machine

`mopo COMMAND --help` explains each with examples.  A traceback instead of one line: --debug or MOPO_DEBUG=1.
"""

SOLVE_EXAMPLES = """\
examples:
  mopo solve labels.jsonl                       what each objective can reach, a sweep of each threshold
  mopo solve labels.jsonl --primary specificity --scorer brevity
                                                the same, with an objective computed from the text
  mopo solve labels.jsonl --primary specificity --scorer brevity \\
      --threshold fluency=0.5 --threshold brevity=0.7
                                                multipliers and win rates under these thresholds
  mopo solve labels.jsonl --scorer short=brevity --scorer polite=my_scorers:politeness

reading the table: `corr.` is the rank correlation with the primary's win rates; `free` what comes without asking (a
lower threshold costs nothing); `best` the largest threshold that can be asked for alone; `gets` what all thresholds
together give; `cost` the primary's win rate given up for this threshold, the others kept; the multiplier its price at
the margin.  All are win rates of the ideal policy over the labelled responses: what training aims at.

reading what follows it: `conflict`, what the primary alone does to the others; `binding`, which thresholds have a price
(if none has, one objective would do); `labels`, how sure the win rates are that hold them, and the eps that makes them
hold on other prompts of the kind; `eps`, how large a radius they allow, and why the paper's 0.15 is too large for most
data; `gain`, why a threshold can raise the primary: what is maximised is its win rate less tau times the KL divergence
from the reference.  The intervals are 95%, by bootstrap over prompts.  They know nothing of noise in the labels: where
each response met few others, the ideal policy picks luck as well as merit, and its win rates are too high.

data: JSON Lines, JSON, Parquet or Arrow, compressed or not, a directory or a name on the hub, one prompt a row:
  {"prompt": "..", "chosen": "..", "rejected": "..", "preference": {"helpful": 1, "harmless": 0.5}}
  {"prompt": "..", "responses": ["..", ".."], "ratings": {"helpful": [4, 2], "harmless": [1, 5]}}
  {"prompt": "..", "responses": ["..", ".."], "comparisons": {"helpful": [[0, 1, 0.8]]}}
"""

PARETO_EXAMPLES = """\
examples:
  mopo pareto                                   a small built-in problem with a conflict between two objectives
  mopo pareto --example cycle                   preferences that no reward model represents (rock, paper, scissors)
  mopo pareto problem.json --points 40          a tabular problem of your own
  mopo pareto labels.jsonl --primary specificity --scorer brevity --objective fluency --objective brevity
                                                the front that labelled data allow

a tabular problem is one JSON object: P[K][Y][Y] (P[k][i][j]: how probably response i beats j on objective k), and
optionally mu[Y] (who it is compared with; default uniform), pi_ref[Y] (default mu), tau, primary (an index or a name),
objectives[K] and responses[Y] (names), thresholds {objective: win rate} (marked in the figure).
The hypervolume is measured from the reference point 0.
"""

COMPARE_EXAMPLES = """\
examples:
  mopo compare runs/first held_out.jsonl --scorer brevity --threshold brevity=0.6
                                an adapter against its base, on the prompts of these rows
  mopo compare runs/full held_out.jsonl --base path/to/model --scorer polite=my_scorers:politeness --output runs/polite
                                a whole model; every scorer is an objective
  mopo compare runs/second held_out.jsonl --scorer brevity --threshold brevity=0.6 --asked brevity=0.7 \\
      --before runs/compare/compare.json --output runs/compare-2
                                training asked the labels for 0.7; what should it ask next?

Both models answer every prompt; a scorer compares each text of one with each text of the other.  The win rate of a
prompt is the share won, ties 1/2; the interval is 95%, by bootstrap over prompts.  Give prompts that training has not
seen, drawn as the labelled responses were (--temperature, --top-p): against other opponents a threshold means something
else.  Objectives that only people can judge have no scorer: `mopo train --eval_fraction` says of them what the
model's log-probabilities imply.

A threshold that was missed is asked again: two trials give a line from what was asked to what was written, and the
line says what to ask for a standard error above the threshold.
"""

DEMO_EXAMPLES = """\
examples:
  mopo demo                        SmolLM2-135M-Instruct, three conflicting objectives, within 10 minutes
  mopo demo --minutes 3            fewer steps, prompts and texts
  mopo demo --minutes 60 --steps 100
                                   longer training
  mopo demo --tiny                 a random tiny model, seconds: does everything run?

A few tokens and training steps are timed first; steps, prompts and texts are then as many as fit.  The command given
again after a demo was stopped goes on where it was, with the sizes that it chose.
"""

DOCTOR_EXAMPLES = """\
examples:
  mopo doctor                      exit code 0: ready; 1: a package that training needs is missing or too old
  mopo doctor --json > doctor.json
"""


class UsageError(ValueError):
    """Arguments that argparse refuses."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("MOPO_DEBUG", "") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if debug:
            raise
        print(f"mopo: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("mopo: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["train"]:  # its options come from dataclasses that take seconds to import
        if {"-h", "--help"} & set(arguments):
            from mopo_trainer.commands.options import print_help

            print_help()
            raise SystemExit(0)
        from mopo_trainer.commands.train import run_train

        return run_train(arguments[1:])
    if arguments[:1] == ["profile"]:  # what it offers depends on the device, which torch has to be asked for
        from mopo_kernels.measure import profile

        return profile.run(arguments[1:])
    parser = build_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        command = " ".join(["mopo", *arguments[: args.run is not None]])
        near = did_you_mean(unknown[0].split("=")[0], _option_names(parser, arguments[0]))
        raise UsageError(f"unknown argument {unknown[0]!r}{near} (see {command} --help)")
    if args.run is None:
        parser.print_help()
        return 0
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def build_parser() -> Parser:
    """The parser of every subcommand but `train` and `profile`, which have their own."""
    parser = Parser(prog="mopo", description=DESCRIPTION, epilog=MAIN_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"mopo {_version()}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("train", help="train a language model under thresholds (HF arguments or a YAML file)")
    _add_solve(commands)
    _add_compare(commands)
    _add_pareto(commands)
    _add_demo(commands)
    _add_doctor(commands)
    commands.add_parser("profile", help="where the time of an op goes here, against the machine's ceilings")
    return parser


def _option_names(parser: Parser, command: str) -> list[str]:
    """The options of a command, or of `mopo` itself."""
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    chosen = commands.choices.get(command, parser)
    return [name for action in chosen._actions for name in action.option_strings]


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], **texts: str) -> Parser:
    parser: Parser = commands.add_parser(name, **texts)
    parser.set_defaults(run=run)
    return parser


def _add_solve(commands: Any) -> None:
    parser = _add(
        commands,
        "solve",
        _solve,
        help="from labels alone: which thresholds are attainable, what each costs, the multipliers",
        description="Which thresholds the labels allow, what each costs the primary objective, and the multipliers.",
        epilog=SOLVE_EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", help="label data (see below)")
    _add_label_options(parser)
    parser.add_argument("--points", type=_points, default=21, metavar="N", help="points per sweep (default 21)")
    _add_output(parser, "runs/solve", "solve.json and solve.png")


def _add_compare(commands: Any) -> None:
    parser = _add(
        commands,
        "compare",
        _compare,
        help="do the texts of a trained model hold the thresholds? against the model it began as",
        description="Win rates of a trained model's texts against those of the model that training began with.",
        epilog=COMPARE_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub name of a causal LM or a peft adapter")
    parser.add_argument("file", metavar="FILE", help="data with the prompts to answer, or a table of prompts alone")
    parser.add_argument("--base", metavar="MODEL", help="what training began with (default: what the adapter names)")
    _add_scorer(parser)
    _add_threshold(parser)
    parser.add_argument(
        "--asked",
        action="append",
        default=[],
        metavar="NAME=WIN_RATE",
        help="threshold that training asked the labels for, where it is not the one that is wanted",
    )
    parser.add_argument(
        "--before", action="append", default=[], type=Path, metavar="JSON", help="compare.json of an earlier trial"
    )
    _add_reading(parser)
    parser.add_argument("--max-prompts", "--max_prompts", type=_positive, metavar="N", help="the first so many prompts")
    parser.add_argument(
        "--as-chat", "--as_chat", action="store_true", help="plain prompts are a user's messages, as in training"
    )
    _add_number(parser, "max-prompt-length", _positive, 512, "tokens per prompt, cut from the left as in training")
    _add_number(parser, "samples", _positive, 4, "texts of each model a prompt")
    _add_number(parser, "max-new-tokens", _positive, 256, "tokens per text")
    _add_number(parser, "temperature", _above_zero, 1.0, "how texts are drawn")
    _add_number(parser, "top-k", _whole, 0, "from so many tokens; 0: from all")
    _add_number(parser, "top-p", _top_p, 1.0, "from the tokens of so much probability")
    _add_number(parser, "batch-size", _positive, 32, "texts drawn together")
    _add_number(parser, "seed", _whole, 0, "random seed")
    dtypes = ["float32", "bfloat16", "float16", "auto"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="type of the weights (default float32)")
    _add_output(parser, "runs/compare", "compare.json and texts.jsonl")


def _add_pareto(commands: Any) -> None:
    parser = _add(
        commands,
        "pareto",
        _pareto,
        help="sweep the thresholds: the front, a figure, its hypervolume",
        description="The Pareto front of a tabular problem or of label data.",
        epilog=PARETO_EXAMPLES,
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="tabular problem or label data; none: the example")
    parser.add_argument("--example", default="conflict", metavar="NAME", help="built-in problem: conflict or cycle")
    _add_label_options(parser)
    parser.add_argument("--points", type=_points, default=25, metavar="N", help="points per sweep (default 25)")
    _add_output(parser, "runs/pareto", "pareto.json and pareto.png")


def _add_demo(commands: Any) -> None:
    parser = _add(
        commands,
        "demo",
        _demo,
        help="the whole way on a small real model, ten minutes on a CPU",
        description="Train SmolLM2-135M-Instruct with and without thresholds and compare what it writes.",
        epilog=DEMO_EXAMPLES,
    )
    parser.add_argument(
        "--minutes",
        type=_above_zero,
        default=10.0,
        metavar="M",
        help="how long it may take on this machine (default 10)",
    )
    parser.add_argument("--steps", type=_positive, metavar="N", help="training steps of each run (default: what fits)")
    parser.add_argument("--tiny", action="store_true", help="a random tiny model, seconds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default 0)")
    _add_output(parser, "runs/demo", "tables, figures and texts")


def _add_doctor(commands: Any) -> None:
    parser = _add(
        commands,
        "doctor",
        _doctor,
        help="versions, devices, which backend runs and why",
        description="What is installed, on which hardware, and which backend each operation runs on.",
        epilog=DOCTOR_EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _add_label_options(parser: Parser) -> None:
    parser.add_argument("--primary", metavar="NAME", help="objective to maximise (default: the first in the data)")
    _add_threshold(parser)
    parser.add_argument(
        "--objective", action="append", default=[], metavar="NAME", help="keep only these secondaries; repeat for more"
    )
    _add_scorer(parser)
    parser.add_argument("--tau", type=float, metavar="T", help="temperature of the KL penalty (default 0.08)")
    parser.add_argument(
        "--eps", type=_eps, default=0.0, metavar="E", help="radius of the robust bound, or auto (default 0)"
    )
    parser.add_argument(
        "--rating-scale",
        "--rating_scale",
        type=float,
        metavar="S",
        help="P = sigmoid(rating difference / S) instead of 1, 1/2, 0",
    )
    _add_reading(parser)
    parser.add_argument(
        "--preferred",
        default="preferred",
        metavar="NAME",
        help="name of the objective that chosen wins in rows without preference (default preferred)",
    )


def _add_number(parser: Parser, name: str, kind: Callable[[str], Any], default: float, what: str) -> None:
    names = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
    parser.add_argument(*names, type=kind, default=default, metavar="N", help=f"{what} (default {default:g})")


def _add_reading(parser: Parser) -> None:
    parser.add_argument("--split", default="train", metavar="NAME", help="split of a directory or hub dataset")
    parser.add_argument(
        "--on-bad-row",
        "--on_bad_row",
        choices=["error", "skip"],
        default="error",
        help="rows that cannot be read: refuse them (default), or leave them out and count them",
    )
    known = f"read FILE as this public data set, not by its columns: {', '.join(ADAPTER_NAMES)}; none"
    parser.add_argument("--adapter", metavar="NAME", help=known)


def _add_threshold(parser: Parser) -> None:
    parser.add_argument(
        "--threshold",
        "--thresholds",
        action="append",
        default=[],
        metavar="NAME=WIN_RATE",
        help="win rate to hold for a secondary, for example brevity=0.6; repeat for more",
    )


def _add_scorer(parser: Parser) -> None:
    parser.add_argument(
        "--scorer",
        "--scorers",
        action="append",
        default=[],
        metavar="SPEC",
        help="objective from the text: brevity, friendliness, plain_language, name=BUILT_IN or name=module:function",
    )


def _add_output(parser: Parser, default: str, what: str) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="DIR", help=f"where {what} go (default {default})"
    )


def _points(text: str) -> int:
    number = _positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is too few for a sweep; give at least 2")
    return number


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^31 - 1")
    return int(text)


def _top_p(text: str) -> float:
    number = _above_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability in (0, 1]")
    return number


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _eps(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


# ------------------------------------------------------------------------------------------------------ subcommands


def _solve(args: argparse.Namespace) -> int:
    thresholds = parse_thresholds(args.threshold)
    from mopo_trainer.commands.solve import run_solve

    return run_solve(_label_problem(args), thresholds, points=args.points, output=args.output)


def _pareto(args: argparse.Namespace) -> int:
    thresholds = parse_thresholds(args.threshold)
    from mopo_trainer.commands import pareto

    if args.file is not None and not pareto.is_tabular(Path(args.file)):
        return pareto.run_pareto(_label_problem(args), thresholds, points=args.points, output=args.output)
    options = {"primary": args.primary, "tau": args.tau}
    problem = (
        pareto.example(args.example, **options)
        if args.file is None
        else pareto.load_tabular(Path(args.file), **options)
    )
    marked = {**problem.thresholds, **thresholds}
    return pareto.run_pareto(problem, marked, points=args.points, output=args.output)


def _label_problem(args: argparse.Namespace) -> Any:
    from mopo_trainer.commands.solve import load_problem

    return load_problem(
        args.file,
        primary=args.primary,
        objectives=args.objective,
        split=args.split,
        scorers=args.scorer,
        rating_scale=args.rating_scale,
        adapter=args.adapter,
        on_bad_row=args.on_bad_row,
        preferred=args.preferred,
        tau=0.08 if args.tau is None else args.tau,
        eps=args.eps,
    )


def _compare(args: argparse.Namespace) -> int:
    thresholds = parse_thresholds(args.threshold)
    try:
        asked = parse_thresholds(args.asked)
    except ValueError as error:
        raise ValueError(f"--asked: {error}") from None
    from mopo_trainer.commands.compare import Drawing, Models, Questions, Wanted, run_compare

    reading = (args.split, args.adapter, args.on_bad_row, args.max_prompts, args.as_chat, args.max_prompt_length)
    return run_compare(
        Models(args.model, args.base, args.dtype),
        Questions(args.file, *reading),
        Wanted(thresholds, asked, args.before),
        Drawing(args.samples, args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed),
        scorers=args.scorer,
        batch_size=args.batch_size,
        output=args.output,
    )


def _demo(args: argparse.Namespace) -> int:
    from mopo_trainer.commands.demo import run_demo

    return run_demo(minutes=args.minutes, steps=args.steps, tiny=args.tiny, seed=args.seed, output=args.output)


def _doctor(args: argparse.Namespace) -> int:
    from mopo_trainer.commands.doctor import run_doctor

    return run_doctor(as_json=args.json)


def _version() -> str:
    from importlib.metadata import version

    return version("mopo-kernels")


if __name__ == "__main__":
    sys.exit(main())
