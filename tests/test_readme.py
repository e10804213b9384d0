"""The README's loss example must run as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plain_loop_runs():
    torch.manual_seed(1)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    loop, log_probs = (next(b for b in blocks if call in b) for call in ("mopo_loss(", "linear_logprob("))
    scope = {}
    exec(loop, scope)
    assert scope["head"].weight.grad.abs().sum() > 0
    exec(log_probs, scope)
    torch.testing.assert_close(scope["nll"], -scope["logp"].mean())
    assert torch.allclose(scope["dual"].multipliers[0], torch.tensor(1.0, dtype=torch.float64))
