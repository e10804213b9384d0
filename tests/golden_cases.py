"""Reads the golden cases: see golden/README.md."""

import json
import math
from pathlib import Path

import pytest
import torch

CASES = json.loads((Path(__file__).parent / "golden" / "mopo_cases.json").read_text())


def golden(kind):
    """The cases of one kind as pytest parameters, named by their place in the file."""
    return [pytest.param(case, id=str(index)) for index, case in enumerate(CASES) if case["kind"] == kind]


def tensor(values):
    """A float64 tensor of nested lists, null read as NaN."""

    def filled(x):
        return [filled(item) for item in x] if isinstance(x, list) else math.nan if x is None else x

    return torch.tensor(filled(values), dtype=torch.float64)
