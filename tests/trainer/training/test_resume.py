"""A run killed with SIGKILL and resumed must be the run that was never interrupted: losses, multipliers, data order."""

import json
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mopo_trainer.training.resume import MANIFEST, STATE_FILE, RunState, newest_checkpoint, write_manifest

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


@pytest.fixture
def limits():
    """The size that a file may have, as it was."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def enough_disk():
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk_ends_the_run_which_resumes_from_the_checkpoint_before(
    tmp_path, run, uninterrupted, limits, enough_disk
):
    with pytest.raises((OSError, RuntimeError)):
        run(str(tmp_path), "full", 6)
    enough_disk()
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    assert not (tmp_path / "checkpoint-6").exists()
    run(str(tmp_path), resume=True)
    assert history(tmp_path) == uninterrupted


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, run):
    """A run's directory, whose newest checkpoint is that of step 4."""
    directory = tmp_path_factory.mktemp("stopped")
    killed_run(directory, "step", 4)
    return directory


def test_a_checkpoint_of_another_version_is_refused_by_name(stopped, run):
    checkpoint = newest_checkpoint(stopped)
    state, manifest = RunState.read(checkpoint), checkpoint / MANIFEST
    kept = {name: (checkpoint / name).read_bytes() for name in (STATE_FILE, MANIFEST)}
    older = {name.replace("chi", "temperature"): value for name, value in state.dual.items()}
    state._replace(dual=older).write(checkpoint)
    manifest.unlink()
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"another version of mopo-kernels wrote it \(chi, temperature"):
        run(str(stopped), resume=True)
    for name, content in kept.items():
        (checkpoint / name).write_bytes(content)


class Payload:
    """What runs where somebody unpickles it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_unpickled(stopped, tmp_path, run, name):
    checkpoint = newest_checkpoint(stopped)
    whole = (checkpoint / name).read_bytes()
    torch.save({"state": Payload(tmp_path / "ran")}, checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    try:
        with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
            run(str(stopped), resume=True)
    finally:
        (checkpoint / name).write_bytes(whole)
    assert not (tmp_path / "ran").exists()
