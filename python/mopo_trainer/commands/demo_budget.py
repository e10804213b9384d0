"""How much of the demo fits its minutes on this machine, a pure function of what was measured here, and its journal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mopo_trainer.files import write_json

MODELS = 3  # whose texts are drawn: base, primary alone, MOPO
MARGIN = 0.9  # of the time that is left; what was measured in seconds is a tenth off over minutes
LADDER = [share / 50 for share in range(50, 0, -1)]  # of the whole demo, in the order in which they are tried


@dataclass(frozen=True)
class Rates:
    """Seconds, measured on this machine."""

    spent: float  # since the demo began
    fixed: float  # what is still to come whatever the sizes: models loaded, trainers built, figures drawn
    steps: float  # one optimizer step of each run, together
    batch: float  # a batch of texts drawn, whatever their number, and
    text: float  # every text in it
    batch_size: int


@dataclass(frozen=True)
class Sizes:
    """What the demo does."""

    steps: int  # of each training run
    prompts: int  # held out, to compare texts on
    num_samples: int  # texts a prompt and model

    def seconds(self, rates: Rates) -> float:
        """How long they take, from the beginning."""
        texts = self.prompts * self.num_samples
        drawing = math.ceil(texts / rates.batch_size) * rates.batch + texts * rates.text
        return rates.spent + rates.fixed + self.steps * rates.steps + MODELS * drawing


def drawing_rates(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float, int]:
    """(batch, text, batch_size) of `Rates` from the seconds of two batches, given as (texts, seconds).

    The large batch is taken unless its texts cost more each.
    """
    (few, first), (many, second) = small, large
    text = (second - first) / (many - few) if many > few else 0.0
    batch = first - few * text
    if batch < 0:
        return 0.0, first / few, few
    return (batch, text, many) if text > 0 else (0.0, second / many, many)


def fit(rates: Rates, minutes: float, whole: Sizes, *, keep_steps: bool = False) -> Sizes:
    """The largest share of the whole demo that fits; the smallest if none does.

    Steps and texts shrink together, as a short training shows nothing on many texts nor a long one on few. Of the texts
    samples go first: an interval over prompts is narrowed more by another prompt than by another sample of one.

    Args:
        keep_steps: only the texts shrink.
    """
    budget = rates.spent + MARGIN * (60 * minutes - rates.spent)
    candidates = [_scaled(whole, share, keep_steps) for share in LADDER]
    return next((sizes for sizes in candidates if sizes.seconds(rates) <= budget), candidates[-1])


def _scaled(whole: Sizes, share: float, keep_steps: bool) -> Sizes:
    steps = whole.steps if keep_steps else max(1, round(share * whole.steps))
    texts = share * whole.prompts * whole.num_samples
    samples = max(2, int(texts // whole.prompts))
    return Sizes(steps, max(2, min(whole.prompts, int(texts / samples))), samples)


def minutes_of(rates: Rates, sizes: Sizes) -> int:
    """The least whole minutes in which `fit` takes these sizes."""
    return math.ceil((rates.spent + (sizes.seconds(rates) - rates.spent) / MARGIN) / 60)


def describe(rates: Rates, sizes: Sizes, minutes: float, whole: Sizes) -> str:
    """What was chosen, how long that takes, and what to ask for instead where a training is cut."""
    predicted = sizes.seconds(rates) / 60
    much = f", more than the {minutes:g} asked for and too few to show an effect" if predicted > minutes else ""
    few = ""
    if sizes.steps < whole.steps:
        few = (
            f" With fewer than {whole.steps} steps the policy may stop short of its thresholds: "
            f"--minutes {minutes_of(rates, whole)} does the whole demo."
        )
    return (
        f"{sizes.steps} steps a run; {sizes.prompts} prompts × {sizes.num_samples} texts a model, drawn "
        f"{rates.batch_size} at a time at most. About {predicted:.2g} minutes in all{much}.{few}"
    )


class Journal:
    """What a demo has decided and done, in a file that is written whole after each part."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def of(cls, path: Path, options: Mapping[str, Any]) -> Journal:
        """The one at `path` if a demo with the same options left it there, else an empty one."""
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["options"] == options:
                return cls(path, content)
        return cls(path, {"options": dict(options), "rates": None, "sizes": None, "done": {}})

    @property
    def decision(self) -> tuple[Rates, Sizes] | None:
        rates, sizes = self.content["rates"], self.content["sizes"]
        return (Rates(**rates), Sizes(**sizes)) if sizes else None

    def decide(self, rates: Rates, sizes: Sizes) -> None:
        self.content |= {"rates": asdict(rates), "sizes": asdict(sizes)}
        write_json(self.path, self.content)

    @property
    def done(self) -> dict[str, dict[str, Any]]:
        """Per model its texts, training log and seconds."""
        return self.content["done"]

    def finish(self, name: str, stage: Mapping[str, Any]) -> None:
        self.done[name] = dict(stage)
        write_json(self.path, self.content)
