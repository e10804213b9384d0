"""Checkpoints count only when whole."""

import pytest

from mopo_trainer.training.resume import (
    MANIFEST,
    newest_checkpoint,
    resolve_checkpoint,
    what_is_missing,
    write_manifest,
)


def checkpoint(directory, step):
    path = directory / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"x" * 100)
    (path / "inner" / "state.json").write_text("{}")
    write_manifest(path)
    return path


def test_the_newest_whole_one_is_found_by_step(tmp_path):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest
    assert resolve_checkpoint(tmp_path, True) == newest
    (newest / "model.safetensors").write_bytes(b"x" * 99)
    assert resolve_checkpoint(tmp_path, True) == tmp_path / "checkpoint-9"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / MANIFEST).unlink(), "was not written to its end"),
        (lambda p: (p / MANIFEST).write_text('{"model'), "is cut short"),
        (lambda p: (p / "inner" / "state.json").unlink(), "inner/state.json is missing"),
        (lambda p: (p / "model.safetensors").write_bytes(b"x" * 40), "has 40 bytes instead of 100"),
    ],
)
def test_half_written_ones_are_refused_with_the_reason(tmp_path, damage, reason):
    whole, damaged = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(damaged)
    assert reason in what_is_missing(damaged)
    with pytest.raises(ValueError, match=reason) as error:
        resolve_checkpoint(tmp_path, str(damaged))
    assert f"the newest whole one is {whole}" in str(error.value)


def test_none_at_all(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint; start without it"):
        resolve_checkpoint(tmp_path, True)
    with pytest.raises(ValueError, match="there is no such directory"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-3"))
