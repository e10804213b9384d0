"""Objectives computed from the text: a scorer gives each response a number, higher is better.

Compared within a group the numbers become preferences, ties 1/2, so only their order matters.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from mopo_trainer.data.sources import DataError, one_line

Scorer = Callable[[str, str], float]  # (prompt, response), both as plain text -> score


def brevity(prompt: str, response: str) -> float:
    """Fewer words are better: minus the number of whitespace-separated words."""
    return -len(response.split())


def friendliness(prompt: str, response: str) -> float:
    """Friendlier is better: VADER's compound sentiment in [-1, 1] (Hutto and Gilbert, 2014)."""
    return _vader().polarity_scores(response)["compound"]


def plain_language(prompt: str, response: str) -> float:
    """Easier to read is better: minus the automated readability index, a school grade (Senter and Smith, 1967).

    4.71 letters/word + 0.5 words/sentence - 21.43. Not Flesch: textstat downloads a dictionary to count syllables.
    """
    import textstat  # loads scipy.stats and nltk: a third of the start-up of `mopo solve`, for this scorer only

    return -textstat.automated_readability_index(response)


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


BUILT_IN: dict[str, Scorer] = {scorer.__name__: scorer for scorer in (brevity, friendliness, plain_language)}


def checked(name: str, scorer: Scorer) -> Scorer:
    """A scorer whose failures and whose values that are no finite numbers are DataErrors that name it."""

    def score(prompt: str, response: str) -> float:
        try:
            value = float(scorer(prompt, response))
        except Exception as error:  # the scorer is the user's code, which may raise anything
            raise DataError(f"scorer {name!r} failed ({type(error).__name__}: {one_line(error)})") from error
        if not math.isfinite(value):
            raise DataError(f"scorer {name!r} returned {value}; return a finite number")
        return value

    return score


def scorer(spec: str) -> tuple[str, Scorer]:
    """Resolve one scorer: `brevity`, `short=brevity` (a built-in under a name of yours) or `name=module:function`.

    The function takes (prompt, response) as plain text and returns a float, higher is better.

    Raises:
        DataError: the spec is malformed, or the module or function cannot be imported.
    """
    match = re.fullmatch(r"(?:(?P<name>[^=:]+)=)?(?P<target>[^=:]+(?P<function>:[\w.]+)?)", spec)
    name, target = (match["name"] or match["target"], match["target"]) if match else ("", "")
    if target in BUILT_IN:
        return name, BUILT_IN[target]
    if not match or not match["name"] or not match["function"]:
        raise DataError(
            f"scorer {spec!r}: no such scorer; give one of {', '.join(BUILT_IN)}, or name=module:function for your own"
        )
    return name, _import(spec, *target.split(":"))


def _import(spec: str, module: str, attribute: str) -> Scorer:
    if os.getcwd() not in sys.path:  # a console script, unlike `python -m`, does not see the user's own directory
        sys.path.append(os.getcwd())
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise DataError(
            f"scorer {spec!r}: cannot be imported ({type(error).__name__}: {one_line(error)}); "
            f"check both names, and that {module} is installed or lies in this directory"
        ) from error
    if not callable(function):
        raise DataError(f"scorer {spec!r}: {attribute} is no function; name one that takes (prompt, response)")
    return cast(Scorer, function)


def load_scorers(specs: Iterable[str]) -> dict[str, Scorer]:
    """Resolve several scorers (see `scorer`) into {objective: function}; two of one name are an error."""
    scorers: dict[str, Scorer] = {}
    for name, function in map(scorer, specs):
        if name in scorers:
            raise DataError(f"duplicate objective names: two scorers are called {name!r}; write other_name=... for one")
        scorers[name] = function
    return scorers
