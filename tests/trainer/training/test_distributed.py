"""Two processes must train as one: the same losses, multipliers, thresholds and evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "distributed_run.py"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    found = []
    launchers = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    for name, launcher in launchers.items():
        directory = tmp_path / name
        finished = subprocess.run([*launcher, str(RUN), str(directory)], capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
        found.append(json.loads((directory / "history.json").read_text()))
    one, two = found
    assert len(one["steps"]) == 3
    for a, b in zip(one["steps"], two["steps"], strict=True):
        for key in a.keys() - {"tokens_per_second", "grad_norm", "ess"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    assert two["eval"] == pytest.approx(one["eval"], rel=1e-4)
