"""The README's loss example must run as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plain_loop_runs():
    torch.manual_seed(1)
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "mopo_loss(" in block)
    scope = {}
    exec(code, scope)
    assert scope["head"].weight.grad.abs().sum() > 0
    assert torch.allclose(scope["dual"].multipliers[0], torch.tensor(1.0, dtype=torch.float64))
