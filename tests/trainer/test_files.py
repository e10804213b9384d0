"""Files appear whole or not at all."""

import pytest

from mopo_trainer.files import atomic_path, write_json


def test_write_json_makes_directories_and_leaves_nothing_else(tmp_path):
    path = write_json(tmp_path / "a" / "b.json", {"tau": 0.5, "τ": None})
    assert path.read_text(encoding="utf-8") == '{\n  "tau": 0.5,\n  "τ": null\n}\n'
    assert list(path.parent.iterdir()) == [path]


def write_half(path):
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_an_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "curve.png"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
