"""Checkpoints that are whole or absent: a manifest written last says which files belong and how large they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

MANIFEST = "mopo_manifest.json"


def write_manifest(checkpoint: Path) -> None:
    """List every file of a finished checkpoint with its size, in bytes."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    (checkpoint / MANIFEST).write_text(json.dumps(sizes, indent=1))


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None for a whole one."""
    if not checkpoint.is_dir():
        return "there is no such directory"
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was not written to its end"
    except json.JSONDecodeError:
        return f"{MANIFEST} is cut short"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step, or None."""
    steps = {int(m[1]): p for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return next((steps[step] for step in sorted(steps, reverse=True) if what_is_missing(steps[step]) is None), None)


def resolve_checkpoint(output_dir: Path, wanted: str | Literal[True]) -> Path:
    """The checkpoint to resume from: a path as given, or the newest whole one for True.

    Raises:
        ValueError: the checkpoint is half written, or there is none; the newest whole one is named.
    """
    newest = newest_checkpoint(output_dir)
    if wanted is True:
        if newest is None:
            raise ValueError(f"resume_from_checkpoint: {output_dir} holds no whole checkpoint; start without it")
        return newest
    reason = what_is_missing(Path(wanted))
    if reason is not None:
        advice = f"the newest whole one is {newest}" if newest else "there is no whole one; start without it"
        raise ValueError(f"resume_from_checkpoint={wanted}: {reason}; {advice}")
    return Path(wanted)
