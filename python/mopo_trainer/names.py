"""What is said of a name that does not exist: all there are, and the nearest one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Public data sets that the readers know, here too for the help, which does not wait for the readers.
ADAPTER_NAMES = (
    "hh-rlhf",
    "pku-saferlhf",
    "ultrafeedback-binarized",
    "sharegpt-pairs",
    "instruction-pairs",
    "dialogue-pairs",
    "pku-saferlhf-single-dimension",
    "beavertails-v",
    "align-anything",
    "helpsteer2-preference",
    "helpsteer3",
    "shp",
    "arena",
    "arena-responses",
    "webgpt",
    "summarize-from-feedback",
    "ultrafeedback",
    "distilabel",
    "nectar",
    "helpsteer",
    "beavertails",
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?", or nothing where no known name is near; hyphens are as good as underscores."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def it_has(name: str, known: Iterable[str]) -> str:
    """ "it has: A, B; did you mean B?" for a name that is not among `known`."""
    known = list(known)
    return f"it has: {', '.join(known)}{did_you_mean(name, known)}"
