"""The examples of the README and of docs/inputs.md must run as they stand."""

import re
from pathlib import Path

import torch

README, INPUTS = ((Path(__file__).parents[1] / name).read_text() for name in ("README.md", "docs/inputs.md"))


def test_the_plain_loop_runs():
    torch.manual_seed(1)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    loop, log_probs = (next(b for b in blocks if call in b) for call in ("mopo_loss(", "linear_logprob("))
    scope = {}
    exec(loop, scope)
    assert scope["head"].weight.grad.abs().sum() > 0
    exec(log_probs, scope)
    logits = scope["head"](scope["hidden"]).float()
    torch.testing.assert_close(scope["nll"], -scope["logp"].mean())
    torch.testing.assert_close(scope["entropy"], torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(scope["hit"], logits.argmax(-1) == scope["target"])
    (z_loss,) = re.findall(r"```python\n(.*?)```", INPUTS, re.S)
    exec(z_loss, scope)
    torch.testing.assert_close(scope["loss"], scope["nll"] + 1e-4 * logits.logsumexp(-1).square().mean())
    assert scope["loss"].requires_grad
    assert torch.allclose(scope["dual"].multipliers[0], torch.tensor(1.0, dtype=torch.float64))
