"""Checkpoints that are whole or absent, and what a resumed run takes from them.

A manifest written last says which files belong and how large they are; multipliers and reference log-probs stand in a
file of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import SCHEDULER_NAME

from mopo_kernels import MOPODual

MANIFEST = "mopo_manifest.json"
STATE_FILE = "mopo_state.safetensors"


class RunState(NamedTuple):
    """What a run knows beside model and optimizer."""

    dual: dict[str, Tensor]
    reference: dict[str, Tensor]  # log-probs [M]: train, eval.FINGERPRINT of π_ref0; lag of π_lag; now, the next lag
    identity: dict[str, str]  # hashes of what the run stands on: model (what is frozen), train (its tokens)

    def write(self, checkpoint: Path) -> None:
        named = {f"dual.{name}": value for name, value in self.dual.items()}
        named |= {f"reference.{name}": value for name, value in self.reference.items()}
        own = {name: value.clone() for name, value in named.items()}  # no shared storage
        save_file(own, checkpoint / STATE_FILE, metadata=self.identity)

    @classmethod
    def read(cls, checkpoint: Path) -> RunState:
        named = load_file(checkpoint / STATE_FILE)
        with safe_open(checkpoint / STATE_FILE, "pt") as file:
            identity = file.metadata() or {}
        return cls(_under("dual.", named), _under("reference.", named), identity)

    def check(
        self,
        dual: MOPODual,
        checkpoint: str,
        identity: Mapping[str, str],
        *,
        needs_reference: bool,
        by_deepspeed: bool,  # whether DeepSpeed runs now
    ) -> None:
        """Raises ValueError where the arguments have changed as the state cannot follow, or half of it is absent."""
        if not Path(checkpoint, SCHEDULER_NAME).is_file():
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no state of the optimizer (save_only_model); start a "
                "new run from its model"
            )
        if not by_deepspeed and not any(Path(checkpoint).glob("optimizer*")):  # transformers would start it anew
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: DeepSpeed wrote its state of the optimizer, which only "
                "DeepSpeed reads; resume under the configuration that it had, or start a new run from its model"
            )
        if self.dual.keys() != dual.state_dict().keys():
            unknown = ", ".join(sorted(self.dual.keys() ^ dual.state_dict().keys()))
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: another version of mopo-kernels wrote it ({unknown} is in one "
                "state of the multipliers only); resume with that version, or start a new run from its model"
            )
        saved = dict(zip(dual.secondaries, self.dual["floors"].tolist(), strict=True))
        wanted = dict(zip(dual.secondaries, dual.floors.tolist(), strict=True))
        changed = [f"{name} {saved[name]:g} → {wanted[name]:g}" for name in saved if saved[name] != wanted[name]]
        if changed:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its run had other thresholds ({', '.join(changed)}); "
                "resume with the same, or start a new run from its model"
            )
        if needs_reference and "train" not in self.reference:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no reference log-probs, which policy_step or lag_steps "
                "of this run need; resume with the options it was written with"
            )
        stands_on = {"model": "frozen weights or configuration", "train": "training data (tokens)"}
        if "train" not in self.reference:
            del stands_on["train"]
        other = [what for name, what in stands_on.items() if self.identity.get(name) != identity[name]]
        if other:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its run had other {' and '.join(other)}; "
                "resume with the same, or start a new run from its model"
            )


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


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
