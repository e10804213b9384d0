"""The benchmarks of the CPU, half an hour (`make bench`), or the questions named:

    python -m bench.cpu.run runs/bench                  results.json, report.md and plots
    python -m bench.cpu.run runs/bench head loss
    python -m bench.cpu.run runs/bench sampled loss     sampled gradients against all others, at larger sizes too

They measure and assert nothing about time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cpu import head, loss, report, sampled, scaling, solve_dual

QUESTIONS = {"head": head, "loss": loss, "scaling": scaling, "solve_dual": solve_dual, "sampled": sampled}
BY_DEFAULT = ("head", "loss", "scaling", "solve_dual")  # sampled takes longer than all of these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the results")
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], metavar="QUESTION", help=", ".join(QUESTIONS))
    options = parser.parse_args()
    torch.manual_seed(0)
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"machine_info": machine(), "datetime": datetime.now(timezone.utc).isoformat(), "benchmarks": []}
    for question in options.questions or BY_DEFAULT:
        for entry in QUESTIONS[question].entries():
            results["benchmarks"].append(entry)
            (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.write([results], options.output)


def machine() -> dict[str, Any]:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": {"brand_raw": [*models, platform.processor()][0], "count": os.cpu_count()}}


if __name__ == "__main__":
    main()
