"""`mopo doctor`: what is installed, on which hardware, and which backend each op runs on, with the reason."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mopo_kernels import backends
from mopo_trainer.report.tables import new_table

DISTRIBUTION = "mopo-kernels"
REQUIRED_EXTRAS = ("", "trainer")  # what mopo solve and mopo train import
OPTIONAL_EXTRAS = ("demo",)
PURPOSES = {
    "torch": "everything",
    "transformers": "models, training",
    "datasets": "label data",
    "accelerate": "training",
    "peft": "LoRA adapters",
    "safetensors": "checkpoints",
    "pyyaml": "mopo train config.yaml",
    "rich": "tables",
    "matplotlib": "figures",
    "moocore": "Pareto fronts",
    "vaderSentiment": "scorer friendliness",
    "textstat": "scorer plain_language",
    "gguf": "converting the demo's model",
    "triton": "GPU kernels",
}


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None
    needed: str
    purpose: str
    required: bool

    @property
    def status(self) -> str:
        if self.version is None:
            return "missing"
        return "ok" if _release(self.version) >= _release(self.needed) else f"older than {self.needed}"


def packages() -> list[Package]:
    """What the distribution's own metadata asks for, and triton, which torch brings along on GPU machines."""
    wanted = [re.match(r"([\w.-]+)>=([\d.]+)(?:.*extra == ['\"](\w+))?", text) for text in _requirements()]
    found = [
        Package(name, _installed_version(name), needed, PURPOSES.get(name, ""), (extra or "") in REQUIRED_EXTRAS)
        for name, needed, extra in (match.groups() for match in wanted if match)
        if (extra or "") in (*REQUIRED_EXTRAS, *OPTIONAL_EXTRAS)
    ]
    return [*found, Package("triton", _installed_version("triton"), "3.5", PURPOSES["triton"], required=False)]


def _requirements() -> list[str]:
    return metadata.requires(DISTRIBUTION) or []


def devices() -> list[str]:
    """One line per accelerator that torch sees, or one that says why there is none."""
    if torch.cuda.is_available():
        lines = []
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}  {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        return lines
    built_with = torch.version.cuda or torch.version.hip
    reason = f"torch is built with CUDA/HIP {built_with} but sees no device" if built_with else "torch is a CPU build"
    return [f"no GPU: {reason}"]


def cpu() -> dict[str, Any]:
    flags = _cpu_flags()
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in known if flag in flags],
    }


def backend_table() -> list[dict[str, str]]:
    return [
        dict(zip(("op", "device", "backend", "reason"), map(str, row[:4]), strict=True)) for row in backends.describe()
    ]


def report() -> dict[str, Any]:
    checked = packages()
    return {
        "mopo_kernels": _installed_version(DISTRIBUTION),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": [{**asdict(package), "status": package.status} for package in checked],
        "cpu": cpu(),
        "devices": devices(),
        "backends": backend_table(),
        "problems": [
            f"{package.name} is {package.status} (needed for {package.purpose})"
            for package in checked
            if package.required and package.status != "ok"
        ],
    }


def run_doctor(*, as_json: bool = False) -> int:
    """Print the report; exit code 0 when `mopo train` can run, 1 when something that it needs is missing."""
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found, Console())
    return 1 if found["problems"] else 0


def _print(found: dict[str, Any], console: Console) -> None:
    console.print(f"mopo-kernels {found['mopo_kernels']}, Python {found['python']} ({sys.executable})")
    console.print(found["platform"], style="dim")
    table = new_table("Packages", "package", "installed", "needed", "status", "for", numbers=False)
    for package in found["packages"]:
        style = None if package["status"] == "ok" else ("red" if package["required"] else "yellow")
        version, needed = package["version"] or "–", f"≥ {package['needed']}"
        table.add_row(package["name"], version, needed, package["status"], package["purpose"], style=style)
    console.print(table)
    processor = found["cpu"]
    console.print("[bold]Devices")
    console.print(f"  cpu  {processor['model']}, {processor['cores']} cores, torch uses {processor['threads']} threads")
    console.print(f"       {' '.join(processor['features'])} (torch kernels: {processor['capability']})", style="dim")
    for line in found["devices"]:
        console.print(f"  {line}")
    console.print()
    table = new_table("Backends", "op", "device", "backend", "why", numbers=False)
    for row in found["backends"]:
        table.add_row(row["op"], row["device"], row["backend"], row["reason"])
    console.print(table)
    if found["problems"]:
        for problem in found["problems"]:
            console.print(f"[red]problem:[/red] {problem}")
        console.print("Mend: pip install 'mopo-kernels\\[trainer]'")
    else:
        console.print("[green]Ready:[/green] mopo solve, mopo pareto and mopo train can run here.")


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # torch and triton built from source may come without metadata.
        return "unknown" if importlib.util.find_spec(name.replace("-", "_")) else None


def _release(version: str) -> tuple[float, ...]:
    """Leading numbers of a version ("2.13.0+cpu" -> (2, 13, 0)); an unknown version counts as new enough."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(float(part))
    return tuple(numbers) or (float("inf"),)


def _cpu_flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpu_model() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
