"""The trainer's packages import downwards only, and no function of theirs takes a crowd of arguments."""

import ast
from pathlib import Path

import mopo_trainer

PACKAGE = Path(mopo_trainer.__file__).parent
SOURCES = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FLOORS = {"data": 0, "report": 1, "training": 2, "commands": 3, "integrations": 3}  # training evaluates with report


def test_imports_point_downwards():
    upwards = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("mopo_trainer."):
                here, there = path.parts[0], node.module.split(".")[1]
                if path.name != "__init__.py" and FLOORS.get(there, -1) > FLOORS.get(here, -1):
                    upwards.append((str(path), node.module))
    assert not upwards
    assert len(SOURCES) > 25


def test_no_function_has_more_than_eight_parameters():
    too_many = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = [x.arg for x in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"]))
                too_many += [(str(path), node.name, count)] if count > 8 else []
    assert not too_many
