"""The command as a user meets it: help, files, exit codes, and one line for whatever is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mopo_trainer.commands.main import main

SUMMEVAL = Path(__file__).parents[3] / "examples" / "data" / "summeval-op" / "summeval-op.jsonl"
COMMANDS = ("train", "solve", "compare", "pareto", "demo", "doctor", "profile")


def pair(**preference):
    return json.dumps({"prompt": "p", "chosen": "a b", "rejected": "c", "preference": preference}) + "\n"


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one call."""
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_no_command_prints_the_help_with_examples(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert "mopo solve labels.jsonl" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: mopo {command}")
    assert f"examples:\n  mopo {command}" in out


def test_solve_writes_what_it_prints(capsys, tmp_path):
    code, out, err = run(
        capsys, "solve", SUMMEVAL, "--primary", "specificity", "--scorer", "brevity", "--objective", "fluency",
        "--objective", "brevity", "--threshold", "brevity=0.7", "--points", 5, "--output", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "out" / "solve.json").read_text())
    rows = {row["objective"]: row for row in found["objectives"]}
    assert rows["brevity"]["multiplier"] == pytest.approx(1.016, abs=1e-3)
    assert rows["specificity"]["win_rate"] == pytest.approx(0.675, abs=1e-3)
    assert [line["objective"] for line in found["sweeps"]] == ["fluency", "brevity"]
    assert (tmp_path / "out" / "solve.png").read_bytes().startswith(b"\x89PNG")
    assert {"0.700", "1.016", "0.675"} <= set(out.split())
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["solve.json", "solve.png"]


def test_pareto_without_a_file_shows_the_example(capsys, tmp_path):
    code, out, _ = run(capsys, "pareto", "--points", 4, "--output", tmp_path)
    assert code == 0
    assert "example conflict" in out
    assert "Hypervolume" in out


def test_pareto_reads_tabular_problems_and_labels(capsys, tmp_path):
    problem = tmp_path / "problem.json"
    problem.write_text(json.dumps({"P": [[[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.2], [0.8, 0.5]]], "thresholds": [0.5]}))
    code, out, _ = run(capsys, "pareto", problem, "--points", 3, "--tau", "0.5", "--output", tmp_path / "a")
    assert (code, "problem.json: 2 responses, primary objective 0, τ = 0.5" in out) == (0, True)
    assert json.loads((tmp_path / "a" / "pareto.json").read_text())["chosen"]["thresholds"] == {"objective 1": 0.5}

    labels = tmp_path / "labels.jsonl"
    labels.write_text(pair(x=1, y=0) + pair(x=0.2, y=0.9))
    code, out, _ = run(capsys, "pareto", labels, "--points", 3, "--output", tmp_path / "b")
    assert (code, "labels.jsonl: 2 groups" in out) == (0, True)


def test_doctor_and_version(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    with pytest.raises(SystemExit):
        main(["--version"])
    assert json.loads(out)["mopo_kernels"] in capsys.readouterr().out


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    from mopo_trainer.commands import demo

    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda **options: calls.append(options) or 0)
    assert main(["demo", "--tiny", "--steps", "3", "--seed", "7", "--output", str(tmp_path)]) == 0
    assert main(["demo", "--minutes", "2.5"]) == 0
    assert calls[0] == {"minutes": 10, "steps": 3, "tiny": True, "seed": 7, "output": tmp_path}
    assert calls[1]["minutes"] == 2.5


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Label files with one thing wrong in each; the working directory is theirs."""
    monkeypatch.chdir(tmp_path)
    contents = {
        "good.jsonl": pair(x=1, y=0) + pair(x=0, y=0.75),
        "cut.jsonl": pair(x=1, y=0) + pair(x=0, y=1)[:40],
        "empty.jsonl": "",
        "above.jsonl": pair(x=1.5),
        "unlabelled.jsonl": pair(x=1, y=None),
        "alone.jsonl": json.dumps({"prompt": "p", "responses": ["a"], "ratings": {"x": [1]}}),
        "twice.jsonl": '{"prompt": "p", "chosen": "a", "rejected": "b", "preference": {"x": 1, "x": 0}}',
        "problem.json": '{"P": [[[0.5]]]}',
    }
    for name, content in contents.items():
        Path(name).write_text(content)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("solve missing.jsonl", "missing.jsonl: no such file or directory"),
        ("solve .", "."),
        ("solve cut.jsonl", "cut.jsonl, line 2: not valid JSON"),
        ("solve empty.jsonl", "empty.jsonl: the dataset is empty"),
        ("solve above.jsonl", "preference of 'x': got 1.5"),
        ("solve unlabelled.jsonl", "'y' is labelled in no group"),
        ("solve alone.jsonl", "a group needs a list of at least two responses"),
        ("solve twice.jsonl", "'x' stands twice"),
        ("solve good.jsonl --primary z", "no objective 'z'; it has: x, y"),
        ("solve good.jsonl --objective z", "no objective 'z'; it has: x, y"),
        ("solve good.jsonl --threshold y", "'y' is not of the form objective=value"),
        ("solve good.jsonl --threshold y=high", "y=high is not a win rate"),
        ("solve good.jsonl --threshold y=1.1", "y=1.1 is not a win rate"),
        ("solve good.jsonl --threshold z=.5", "unknown objective 'z'; the secondaries here are: y"),
        ("solve good.jsonl --threshold x=.5", "'x': it is the primary"),
        ("solve good.jsonl --threshold y=.1 --threshold y=.2", "name 'y' twice"),
        ("solve good.jsonl --threshold y=.95", "'y' must reach 0.95, but at most 0.875"),
        ("solve good.jsonl --scorer nonsense", "scorer 'nonsense'"),
        ("solve good.jsonl --scorer x=brevity", "duplicate objective names"),
        ("solve good.jsonl --tau 0", "tau must be a positive number"),
        ("solve good.jsonl --tau warm", "argument --tau: invalid float value: 'warm' (see mopo solve --help)"),
        ("solve good.jsonl --eps -1", "eps must be a number >= 0"),
        ("solve good.jsonl --eps some", "'some' is neither a number nor auto"),
        ("solve good.jsonl --points 1", "1 is too few"),
        ("solve good.jsonl --points many", "'many' is not a positive whole number"),
        ("solve good.jsonl --output good.jsonl/x", "good.jsonl"),
        ("solve good.jsonl --frobnicate", "unknown argument '--frobnicate' (see mopo solve --help)"),
        ("solve", "required: FILE (see mopo solve --help)"),
        ("pareto missing.jsonl", "missing.jsonl: no such file or directory"),
        ("pareto problem.json", "problem.json: P must hold K ≥ 2 matrices"),
        ("pareto above.jsonl", "preference of 'x': got 1.5"),
        ("pareto --example circle", "no example 'circle'; choose one of conflict, cycle"),
        ("pareto --threshold harmless=0.99", "'harmless' must reach 0.99, but at most 0.78"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
        ("--frobnicate", "unknown argument '--frobnicate' (see mopo --help)"),
        ("profile --rows 0", "'0' is not a positive whole number"),
        ("demo --minutes 0", "'0' is not a positive number"),
        ("demo --minutes long", "'long' is not a positive number"),
        ("demo --steps 0", "'0' is not a positive whole number"),
        ("train missing.yaml", "missing.yaml: No such file or directory"),
    ],
)
def test_wrong_input_gets_one_line(files, capsys, arguments, message):
    before = {path.name for path in files.iterdir()}
    code, _, err = run(capsys, *arguments.split())
    assert code == 2
    assert err.startswith("mopo: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert {path.name for path in files.iterdir()} == before


def test_debug_shows_the_traceback(files, monkeypatch):
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        main(["solve", "missing.jsonl", "--debug"])
    monkeypatch.setenv("MOPO_DEBUG", "1")
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        main(["solve", "missing.jsonl"])


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mopo_trainer.commands.doctor.run_doctor", interrupt)
    assert run(capsys, "doctor") == (130, "", "mopo: interrupted\n")


HEAVY = ["torch", "transformers", "datasets", "matplotlib", "mopo_kernels.head"]


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        ([], HEAVY),
        (["train", "--help"], HEAVY),
        (["profile", "--help"], HEAVY),
        (["solve", "--help"], HEAVY),
        (["doctor"], ["triton", "transformers", "datasets", "matplotlib"]),
        (
            ["solve", str(SUMMEVAL), "--threshold", "relevance=0.9", "--output", "OUT", "--points", "2"],
            ["transformers", "peft", "textstat"],
        ),
    ],
)
def test_start_up_imports_only_what_the_command_needs(tmp_path, arguments, unwanted):
    arguments = [str(tmp_path) if argument == "OUT" else argument for argument in arguments]
    code = (
        "import sys; from mopo_trainer.commands.main import main\n"
        "try: assert main(sys.argv[1:]) == 0\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"sys.exit(f'imported {{found}}' if (found := set(sys.modules) & set({unwanted})) else 0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
