"""Everything that is to be known of the kernels on this GPU, in one command of less than ten minutes:

    python bench/gpu_report.py                     JSON, Markdown and a timeline under bench/results/<gpu name>
    python bench/gpu_report.py --dry-run           the same script on CPU tensors, Triton interpreted: does it work?

Builds the CUDA kernels, runs the GPU tests, measures ceilings, times every op against its peers (steps.py), tunes
block sizes, traces. Needs the repository, torch and Triton; peers enter where they are installed. Where there is no GPU
it is a dry run. Steps are processes, the most telling first: one that fails, hangs or crashes is reported with its
output and the rest goes on; what --minutes cuts off is named. The report is written anew after each step, and so are
the tables that the package reads, head/gpu_rates.json and backends/triton/cut_blocks.json, once their rates are
measured; a dry run writes nothing but --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import verdict
from bench.gpu.markdown import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
RATES = ROOT / "mopo_kernels" / "head" / "gpu_rates.json"
BLOCKS = ROOT / "mopo_kernels" / "backends" / "triton" / "cut_blocks.json"
DTYPE = "bfloat16"  # of steps.py
RESULTS_FILE = "<results>"  # stands in a command for the file of a step's results
OUTPUT = 8000  # characters of a step's output that the report keeps, the last ones

TESTS = ["gpu", "cuda_gpu", "gpu_backends", "triton", "cut", "batch"]  # test_….py, in whatever folder; slowest first
PROFILE = [sys.executable, "-m", "mopo_kernels.measure.profile"]
NCU = ["ncu", "--clock-control", "none", "--section", "SpeedOfLight", "--section", "LaunchStats", "--launch-count", "8"]
NCU_KERNELS = ["--kernel-name", "regex:statistics|gradient|sums|cut"]


class Step(NamedTuple):
    """A process, and what it may cost."""

    name: str
    command: list[str]
    seconds: float  # at most
    only_on_gpu: bool = False


def main() -> None:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the step that runs is ended too
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        report = begin(options, deadline, work)
        output = options.output or (None if report["dry_run"] else RESULTS / _slug(report["gpu"]))
        for step in chosen(steps_of(report["architecture"], work, dry_run=report["dry_run"]), options.only):
            report["steps"].append(run_step(step, deadline, work, dry_run=report["dry_run"]))
            if step.name == "build" and not report["dry_run"]:  # now the kernels are there that the others will use
                report["steps"][0] = environment(options, deadline, work)
            finish(report, seconds=time.monotonic() - started)
            if output is not None:
                write(report, output, work)
            if not report["dry_run"]:
                write_tables(report)
    print(markdown(report) if output is None else f"the report is in {output}/report.md")


def begin(options: argparse.Namespace, deadline: float, work: Path) -> dict[str, Any]:
    """A report that holds the first step: on what machine the others are to run."""
    outcome = environment(options, deadline, work)
    if not outcome["results"]:
        print(outcome["output"], file=sys.stderr)
        sys.exit(f"gpu_report: error: this Python cannot run the measurements: {outcome['error']}")
    found = outcome["results"][0]
    if found["gpu"] is None and not options.dry_run:
        print("no GPU that torch can use: a dry run", flush=True)
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "minutes": options.minutes,
        "dry_run": found["gpu"] is None,
        "gpu": found["gpu"],
        "architecture": found.get("architecture", ""),
        "steps": [outcome],
    }


def environment(options: argparse.Namespace, deadline: float, work: Path) -> dict[str, Any]:
    (work / "environment.jsonl").unlink(missing_ok=True)
    step = Step("environment", _measure("environment", dry_run=options.dry_run), 120)
    return run_step(step, deadline, work, dry_run=options.dry_run)


def steps_of(architecture: str, work: Path, *, dry_run: bool) -> list[Step]:
    """The most telling first."""
    rows, hidden_size, vocab = ("8", "32", "100") if dry_run else ("16384", "4096", "128256")
    clone_step = [*PROFILE, "--op", "mopo_loss", "--rows", rows, "--hidden-size", hidden_size, "--vocab", vocab]
    traced = [*clone_step, "--dtype", DTYPE, "--steps", "3", "--trace", str(work / "trace.json")]
    measure = partial(_measure, dry_run=dry_run)
    first_heads, *other_heads = ["heads-32"] if dry_run else ["heads-4096", "heads-2048", "heads-5120"]
    target = f"MOPO_CUDA_ARCHS={_compute_capability(architecture)}"
    build = ["env", "MOPO_BUILD_CUDA=1", target, sys.executable, "setup.py", "build_ext", "--inplace"]
    tests = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest", *test_files(), "-m", "not slow"]
    tests += ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [
        Step("build", build, 150, True),
        Step("ceilings", measure("ceilings"), 60),
        Step("tests", tests, 150, True),
        Step("ops", measure("ops"), 60),
        Step("tune", measure("tune"), 100),
        Step(first_heads, measure(first_heads), 200),
        Step("trace", traced, 40),
        Step("ncu", [*NCU, *NCU_KERNELS, *clone_step, "--dtype", DTYPE, "--steps", "1"], 40, True),
        *(Step(name, measure(name), 100) for name in other_heads),
    ]


def test_files() -> list[str]:
    return [str(path.relative_to(ROOT)) for name in TESTS for path in ROOT.glob(f"tests/**/test_{name}.py")]


def chosen(steps: list[Step], names: list[str] | None) -> list[Step]:
    """All of them, or those that --only names."""
    known = [step.name for step in steps]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        sys.exit(f"gpu_report: error: --only {unknown[0]}: no such step; choose from {', '.join(known)}")
    return [step for step in steps if names is None or step.name in names]


def run_step(step: Step, deadline: float, work: Path, *, dry_run: bool) -> dict[str, Any]:
    """Run a step's process and say how it went: done, failed, stopped, not run or skipped."""
    outcome: dict[str, Any] = {"name": step.name, "state": "done", "seconds": 0.0, "error": ""}
    outcome |= {"output": "", "results": []}
    seconds = min(step.seconds, deadline - time.monotonic())
    if dry_run and step.only_on_gpu:
        return outcome | {"state": "skipped", "error": f"on a GPU: {' '.join(step.command)}"}
    if seconds <= 0:
        return outcome | {"state": "not run", "error": "the time was up"}
    print(f"{step.name} ... ", end="", flush=True)
    start, log, results = time.monotonic(), work / f"{step.name}.log", work / f"{step.name}.jsonl"
    results.touch()
    command = [str(results) if word == RESULTS_FILE else word for word in step.command]
    try:
        with log.open("w") as output:
            _wait(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **_surroundings(dry_run)), seconds)
    except subprocess.TimeoutExpired:
        outcome |= {"state": "stopped", "error": f"after {seconds:.0f} seconds"}
    except OSError as error:
        outcome |= {"state": "failed", "error": str(error)}
    except subprocess.CalledProcessError:
        outcome |= {"state": "failed", "error": _last_line(log)}
    outcome |= {
        "seconds": time.monotonic() - start,
        "output": log.read_text(errors="replace")[-OUTPUT:],
        "results": [json.loads(line) for line in results.read_text().split("\n")[:-1]],  # whole lines
    }
    print(f"{outcome['state']}, {outcome['seconds']:.0f} s {outcome['error']}", flush=True)
    return outcome


def finish(report: dict[str, Any], *, seconds: float) -> None:
    """What follows from the steps so far."""
    results = [result for step in report["steps"] for result in step["results"]]
    report["seconds"] = seconds
    report["goals"] = verdict.goals(results, dry_run=report["dry_run"])


def write(report: dict[str, Any], output: Path, work: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    replace(output / "report.json", json.dumps(report, indent=1))
    replace(output / "report.md", markdown(report))
    if (work / "trace.json").exists():
        replace(output / "trace.json", (work / "trace.json").read_text())


def write_tables(report: dict[str, Any]) -> None:
    """What was measured of this architecture, for the package to go by from now on."""
    results = [result for step in report["steps"] for result in step["results"]]
    architecture = report["architecture"]
    if verdict.best_blocks(results):
        table = verdict.with_blocks(json.loads(BLOCKS.read_text()), architecture, DTYPE, results)
        replace(BLOCKS, table_text(table))
    rates = verdict.rates_entry(results)
    if rates is not None:
        table = json.loads(RATES.read_text())
        table.setdefault(architecture, {})[DTYPE] = rates
        replace(RATES, table_text(table))


def table_text(table: dict[str, Any]) -> str:
    """JSON with the innermost objects on a line each, for people to compare."""
    text = json.dumps(table, indent=2)
    return (
        re.sub(
            r"\{[^{}]*\}", lambda match: re.sub(r"\s*\n\s*", " ", match[0]).replace("{ ", "{").replace(" }", "}"), text
        )
        + "\n"
    )


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _measure(step: str, *, dry_run: bool) -> list[str]:
    command = [sys.executable, "-m", "bench.gpu.steps", step, "--results", RESULTS_FILE]
    return [*command, "--dry-run"] if dry_run else command


def _surroundings(dry_run: bool) -> dict[str, Any]:
    """Where a step runs: in the repository, which need not be installed, and in a process group that can be ended."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    }
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # contestants leave no holes for each other
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"cwd": ROOT, "env": environment, "start_new_session": True}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        code = process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0:
        raise subprocess.CalledProcessError(code, process.args)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it ended without a word"


def _compute_capability(architecture: str) -> str:
    """sm_90 as setup.py spells it: Hopper's own instructions need the suffix."""
    name = re.sub(r"sm_(\d+)(\d)", r"\1.\2", architecture)
    return "9.0a" if name == "9.0" else name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny CPU tensors, Triton interpreted")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default bench/results/<gpu name>; dry run: the screen"
    )
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, for example build tune heads-4096")
    return parser


if __name__ == "__main__":
    main()
