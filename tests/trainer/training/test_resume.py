"""A run killed with SIGKILL and resumed must be the run that was never interrupted: losses, multipliers, data order."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mopo_trainer.training.resume import newest_checkpoint

RUN = Path(__file__).parents[1] / "resume_run.py"


def killed_run(directory, kill, step):
    """A process of its own, which must die."""
    command = [sys.executable, str(RUN), str(directory), kill, str(step)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.fixture(scope="module")
def run():
    """The same run in this process."""
    return runpy.run_path(str(RUN))["main"]


def history(directory):
    """Per step everything that was logged but for clocks."""
    clocks = {"tokens_per_second"}
    entries = json.loads((directory / "history.json").read_text())
    return [{k: v for k, v in entry.items() if k not in clocks} for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run):
    directory = tmp_path_factory.mktemp("whole")
    run(str(directory))
    return history(directory)


def test_the_run_exercises_what_it_should(uninterrupted):
    multipliers = [entry["multiplier/brief"] for entry in uninterrupted]
    thresholds = [entry["threshold/brief"] for entry in uninterrupted]
    assert len(uninterrupted) == 8
    assert len(set(multipliers)) > 4
    assert len(set(thresholds)) > 1


@pytest.mark.parametrize(
    ("kill", "step", "resumes_at"),
    [
        ("save", 6, 4),  # while the checkpoint of step 6 (a refresh) is half written
        pytest.param("step", 5, 4, marks=pytest.mark.slow),  # between checkpoints, after the first refresh
        pytest.param("step", 2, 2, marks=pytest.mark.slow),  # just after a checkpoint
        pytest.param("step", 7, 6, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_is_the_same_run(tmp_path, run, uninterrupted, kill, step, resumes_at):
    killed_run(tmp_path, kill, step)
    assert newest_checkpoint(tmp_path).name == f"checkpoint-{resumes_at}"
    run(str(tmp_path), resume=True)
    assert history(tmp_path) == uninterrupted
