"""The GPU report: the dry run whole, steps that fail, and the arithmetic of its verdicts on hand-made numbers."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import peers
from bench.gpu import report as gpu_report
from bench.gpu import verdict as gpu_verdict
from bench.gpu.markdown import markdown
from bench.gpu.report import Step, run_step
from mopo_kernels.backends.triton import cut_tile
from mopo_kernels.head import rates

ROOT = Path(__file__).parents[1]
SECTIONS = [
    "Goals",
    "Steps",
    "Ceilings",
    "Times",
    "Sampled gradients",
    "Label statistics",
    "Block sizes of the cut kernels",
]


def python(code, name="step", seconds=20.0, **options):
    return Step(name, [sys.executable, "-c", code, gpu_report.RESULTS_FILE], seconds, **options)


def run(step, work, *, left=60.0, dry_run=False):
    return run_step(step, time.monotonic() + left, work, dry_run=dry_run)


# ----------------------------------------------------------------------------------------------------------- dry run


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A dry run in a copy of the repository: its report and the Markdown. It writes its output and nothing else."""
    copy, output = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("output") / "report"
    for part in ("bench", "mopo_kernels", "csrc"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "results", "*.tmp"))
    shutil.copy(ROOT / "setup.py", copy)
    before = files_of(copy)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # the script sets it
    command = [sys.executable, str(copy / "bench" / "gpu_report.py"), "--dry-run", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files_of(copy) == before
    assert {path.name for path in output.iterdir()} == {"report.json", "report.md", "trace.json"}
    assert [path.name for path in output.parent.iterdir()] == ["report"]
    return json.loads((output / "report.json").read_text()), (output / "report.md").read_text()


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_goes_through_every_step(dry_run):
    report, text = dry_run
    states = {step["name"]: step["state"] for step in report["steps"]}
    only_on_gpu = {"build", "tests", "ncu"}
    assert {name for name, state in states.items() if state == "skipped"} == only_on_gpu
    assert {state for name, state in states.items() if name not in only_on_gpu} == {"done"}
    assert [section for section in [*SECTIONS, "Output of trace"] if f"## {section}\n" not in text] == []
    assert "Nothing below is a measurement of a GPU" in text


def test_a_dry_run_has_times_and_no_verdicts(dry_run):
    report, _ = dry_run
    results = [result for step in report["steps"] for result in step["results"]]
    timed = {result["name"] for result in results if "seconds" in result and result["kind"] == "time"}
    assert timed >= {"mopo_loss", "mopo_loss, triton", "linear_logprob, cut", "linear_logprob_forward, cut", "eager"}
    assert timed >= {"frozen_head", "token_logprob", "token_logprob_backward, triton", "label_statistics, triton"}
    assert {result["kernel"] for result in results if result["kind"] == "blocks" and "seconds" in result} == {
        *cut_tile.KERNELS
    }
    assert {(goal[1], goal[2]) for goal in report["goals"]} == {("dry run", "dry run")}
    (cuda,) = (result for result in results if result.get("name") == "token_logprob, cuda")
    assert "backend='cuda' cannot run token_logprob" in cuda["error"]


def test_a_python_that_cannot_measure_is_an_error_and_no_dry_run(monkeypatch, tmp_path):
    failing = [sys.executable, "-c", "raise ImportError('no triton')"]
    monkeypatch.setattr(gpu_report, "_measure", lambda *_, **__: failing)
    with pytest.raises(SystemExit, match="cannot run the measurements: ImportError: no triton"):
        gpu_report.begin(gpu_report._parser().parse_args([]), time.monotonic() + 60, tmp_path)


# ------------------------------------------------------------------------------------------------------------- steps

ENVIRONMENT = {"kind": "environment", "gpu": None, "packages": {}, "backends": {}, "cuda": None, "workspace": 1}


@pytest.fixture
def call(monkeypatch):
    """A dry run of these steps, on an environment that needs no torch to be looked at."""

    def of(steps, *arguments):
        write = f"import sys; print('{json.dumps(ENVIRONMENT)}', file=open(sys.argv[1], 'w'))"
        monkeypatch.setattr(gpu_report, "_measure", lambda *_, **__: python(write).command)
        monkeypatch.setattr(gpu_report, "steps_of", lambda *_, **__: steps)
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--dry-run", *arguments])
        gpu_report.main()

    return of


def test_without_output_a_dry_run_prints_the_report(call, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    call([python("")])
    assert "# GPU report: dry run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_does_not_stop_the_rest(call, tmp_path):
    steps = [
        python("import sys; print('before'); sys.exit('no such luck')", "bad"),
        python("import os; os.abort()", "crash"),
        Step("absent", ["/no/such/program"], 10.0),
        python("import sys; open(sys.argv[1], 'w').write('{\"kind\": \"mark\"}\\n')", "good"),
    ]
    call(steps, "--output", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(step["name"], step["state"]) for step in report["steps"][1:]] == [
        ("bad", "failed"),
        ("crash", "failed"),
        ("absent", "failed"),
        ("good", "done"),
    ]
    text = (tmp_path / "report.md").read_text()
    assert "| bad | failed | 0 | no such luck |" in text
    assert "before\nno such luck" in text
    assert "No such file or directory: '/no/such/program'" in text
    assert report["steps"][-1]["results"] == [{"kind": "mark"}]


def test_the_report_is_there_after_every_step(call, tmp_path):
    look = "import json, sys; print(len(json.load(open(sys.argv[2]))['steps']))"
    step = Step("look", [sys.executable, "-c", look, "-", str(tmp_path / "report.json")], 20.0)
    call([python(""), step], "--output", str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"][-1]["output"] == "2\n"


def test_a_step_that_hangs_is_killed_with_its_children_and_keeps_its_results(tmp_path):
    code = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
pathlib.Path(sys.argv[1]).write_text('{"kind": "mark", "pid": %d}\\n{"kind": "half' % child.pid)
time.sleep(60)
"""
    start = time.monotonic()
    outcome = run(python(code, seconds=2.0), tmp_path)
    assert (outcome["state"], outcome["error"]) == ("stopped", "after 2 seconds")
    assert time.monotonic() - start < 10
    (result,) = outcome["results"]
    time.sleep(0.2)
    status = Path(f"/proc/{result['pid']}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_step_gets_what_is_left_of_the_time(tmp_path):
    assert run(python("import time; time.sleep(60)"), tmp_path, left=1.0)["state"] == "stopped"
    late = run(python(""), tmp_path, left=-1.0)
    assert (late["state"], late["error"]) == ("not run", "the time was up")


def test_steps_that_need_a_gpu_are_named_in_a_dry_run(tmp_path):
    step = Step("build", ["false", "--really"], 10.0, only_on_gpu=True)
    assert run(step, tmp_path, dry_run=True)["error"] == "on a GPU: false --really"
    assert run(step, tmp_path)["state"] == "failed"


def test_the_steps_on_a_gpu(tmp_path):
    steps = {step.name: step for step in gpu_report.steps_of("sm_90", tmp_path, dry_run=False)}
    assert "MOPO_CUDA_ARCHS=9.0a" in steps["build"].command
    assert [Path(file).stem for file in gpu_report.test_files()] == [f"test_{name}" for name in gpu_report.TESTS]
    assert "--dry-run" not in [word for step in steps.values() for word in step.command]
    assert gpu_report._compute_capability("sm_100") == "10.0"
    with pytest.raises(SystemExit, match="--only frob: no such step; choose from build, ceilings"):
        gpu_report.chosen(list(steps.values()), ["tune", "frob"])
    assert [step.name for step in gpu_report.chosen(list(steps.values()), ["tune", "build"])] == ["build", "tune"]


# ---------------------------------------------------------------------------------------------------------- verdicts

GEMM, COPY, MIB = 100e12, 2e12, 2**20


def timed(name, seconds, *, workload=None, sizes=(1000, 100, 5000), flops=0.0, num_bytes=0.0, peak=None):
    return {
        **{"kind": "time", "name": name, "workload": workload or name, "sizes": [*sizes], "seconds": seconds},
        **{"flops": flops, "bytes": num_bytes, "peak_bytes": peak},
    }


def blocks(kernel, seconds, block_n, rate=1.0):
    shape = {"BLOCK_N": block_n, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    return {"kind": "blocks", "kernel": kernel, "blocks": shape, "seconds": seconds, "flops_per_second": rate}


CEILINGS = [
    {"kind": "environment", "workspace": 512 * MIB, "packages": {}, "backends": {}, "cuda": "13.0", "gpu": "X"},
    {"kind": "copy", "bytes_per_second": COPY},
    {"kind": "gemm", "name": "8192³", "flops_per_second": GEMM},
    {"kind": "gemm", "name": "logits", "flops_per_second": 0.9 * GEMM},
    {"kind": "products", "sizes": [100, 5000], "flops_per_second": 0.8 * GEMM},
]
OTHER = (2000, 100, 5000)


def verdict(goal_start, *results):
    (goal,) = [goal for goal in gpu_verdict.goals([*CEILINGS, *results], dry_run=False) if goal_start in goal.goal]
    return goal.verdict, goal.measured


def test_nothing_is_met_before_it_is_measured():
    assert {goal.verdict for goal in gpu_verdict.goals([], dry_run=False)} == {"not measured"}
    assert {goal.verdict for goal in gpu_verdict.goals(CEILINGS, dry_run=False)} == {"not measured"}
    failed = timed("mopo_loss", 1.0) | {"error": "out of memory"}
    del failed["seconds"]
    assert verdict("clone step", failed)[0] == "not measured"


@pytest.mark.parametrize(
    ("goal", "name", "seconds", "expected"),
    [  # 1e12 flops take 10 ms at the ceiling, 12.5 ms by the three products; 2e9 bytes 1 ms
        ("clone step", "mopo_loss", 0.0131, "met"),
        ("clone step", "mopo_loss", 0.0132, "missed"),
        ("cut forward", "linear_logprob_forward, cut", 0.0124, "met"),
        ("cut forward", "linear_logprob_forward, cut", 0.0126, "missed"),
        ("token_logprob", "token_logprob", 0.00110, "met"),
        ("token_logprob", "token_logprob", 0.00112, "missed"),
    ],
)
def test_shares_of_the_ceilings(goal, name, seconds, expected):
    num_bytes = 2e9 if goal == "token_logprob" else 1.0
    assert verdict(goal, timed(name, seconds, flops=1e12, num_bytes=num_bytes))[0] == expected


def test_the_worst_size_decides():
    fast, slow = (
        timed("linear_logprob_forward, cut", seconds, flops=1e12, sizes=sizes)
        for seconds, sizes in ((0.0101, (1000, 100, 5000)), (0.0200, OTHER))
    )
    measured = "50.0% at N=2000 H=100 V=5000; at best 99.0% at N=1000 H=100 V=5000"
    assert verdict("cut forward", fast, slow) == ("missed", measured)


@pytest.mark.parametrize(
    ("launches", "seconds", "expected"), [(1, 14e-6, "met"), (1, 16e-6, "missed"), (2, 9e-6, "missed")]
)
def test_label_statistics(launches, seconds, expected):
    result = {"kind": "launches", "backend": "cuda", "launches": launches, "device_seconds": seconds}
    assert verdict("label_statistics", result)[0] == expected


def test_label_statistics_by_the_first_backend_that_runs():
    absent = {"kind": "launches", "backend": "cuda", "error": "not built"}
    triton = {"kind": "launches", "backend": "triton", "launches": 1.0, "device_seconds": 9e-6}
    result = verdict("label_statistics", absent, triton, timed("label_statistics", 40e-6))
    assert result == ("met", "triton: 1 launches, 9.0 µs; the whole call 40.0 µs")


@pytest.mark.parametrize(("beyond", "expected"), [(512, "met"), (513, "missed")])
def test_memory_beside_the_gradients(beyond, expected):
    gradients = (1000 + 5000) * 100 * 2 + 5000 * 100 * 4
    result = timed("linear_logprob", 1.0, peak=gradients + beyond * MIB)
    assert verdict("memory", result) == (
        expected,
        f"{beyond} of 512 MiB by linear_logprob at N=1000 H=100 V=5000",
    )


@pytest.mark.parametrize(
    ("goal", "name", "seconds", "expected"),
    [
        ("linear_logprob never slower", "linear_logprob", 0.9, "met"),
        ("linear_logprob never slower", "linear_logprob", 1.1, "missed"),
        ("sampled", "linear_logprob_sampled", 0.49, "met"),
        ("sampled", "linear_logprob_sampled", 0.51, "missed"),
    ],
)
def test_the_fastest_peer_at_any_size_decides(goal, name, seconds, expected):
    results = [
        timed(name, seconds),
        timed(name, 1.0, sizes=OTHER),
        timed("CCE", 1.0, workload="linear_logprob"),
        timed("QuACK", 3.0, workload="linear_logprob", sizes=OTHER),
        timed("Liger", 9.0, workload="linear_logprob", sizes=OTHER),
        timed("eager, backward", 0.1, workload="token_logprob_backward"),
        timed("torch.compile", 0.1, workload="token_logprob"),
    ]
    state, measured = verdict(goal, *results)
    assert state == expected
    assert f"{seconds:.2f} × the time of CCE at N=1000 H=100 V=5000; without CCE, all gradients, Liger SM90" in measured


def test_peers_are_asked_by_names_that_they_have():
    """Read from the installed sources, since most cannot be imported without a GPU."""
    calls = [x for x in ast.walk(ast.parse(Path(peers.__file__).read_text())) if isinstance(x, ast.ImportFrom)]
    theirs = [x for x in calls if x.module.split(".")[0] in ("liger_kernel", "cut_cross_entropy", "trl", "quack")]
    found = 0
    for call in theirs:
        package, *path = call.module.split(".")
        spec = importlib.util.find_spec(package)
        if spec is None:
            continue
        place = Path(spec.submodule_search_locations[0]).joinpath(*path)
        source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
        for name in call.names:
            assert re.search(rf"\b{name.name}\b", source) or (place / name.name).exists(), f"{call.module}: {name.name}"
            found += 1
    assert found > 0 or not importlib.util.find_spec("liger_kernel")
    assert len(theirs) >= 6


def test_every_peer_is_a_contestant():
    contestants = {**peers.GPU_HEADS, **peers.heads(compiler="eager")}
    assert set(contestants) == set(gpu_verdict.PEERS)


def test_the_sampled_step_is_one_product_and_what_it_reads():
    terms = gpu_verdict.sampled_terms((1000, 100, 5000), GEMM, COPY, entries=10)
    assert terms.logits == pytest.approx(1e9 / GEMM)
    assert terms.folds == pytest.approx(3 * 1e7 / COPY)
    assert terms.grad_hidden == pytest.approx((1000 * 10 * 200 + 1000 * 200) / COPY)
    assert terms.grad_weight == pytest.approx((1000 * 10 * 200 + 5000 * 200) / COPY)


def test_the_derived_times_of_the_page():
    """At an H100's data sheet."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = re.findall(r"^\| (\d+) rows, H (\d+), V (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    for n, h, v, times in rows:
        terms = gpu_verdict.sampled_terms((int(n), int(h), int(v)), 989e12, 3.35e12)
        exact = 6.0 * int(n) * int(h) * int(v) / 989e12
        assert times == " | ".join(f"{1e3 * x:.2f}" for x in (*terms, sum(terms), exact))


def test_the_roofline_fraction_takes_the_longer_floor():
    by_flops = timed("x", 0.02, flops=1e12, num_bytes=2e9)  # 10 ms and 1 ms
    by_bytes = timed("x", 0.02, flops=1e11, num_bytes=1e10)  # 1 ms and 5 ms
    assert gpu_verdict.roofline_fraction(by_flops, CEILINGS) == pytest.approx(0.5)
    assert gpu_verdict.roofline_fraction(by_bytes, CEILINGS) == pytest.approx(0.25)
    assert gpu_verdict.roofline_fraction(by_flops, []) is None


# ------------------------------------------------------------------------------------------------------------ tables

TUNED = [blocks("statistics", 2.0, 64), blocks("statistics", 1.0, 32, rate=7.0), blocks("gradients", 3.0, 16, rate=9.0)]


def test_rates_are_whole_or_absent():
    assert gpu_verdict.rates_entry([*CEILINGS, *TUNED]) == rates.Rates(0.8 * GEMM, COPY, 7.0, 9.0)._asdict()
    assert gpu_verdict.rates_entry([*CEILINGS, *TUNED[:2]]) is None
    assert gpu_verdict.rates_entry(TUNED) is None


def test_a_new_architecture_starts_from_the_default():
    table = json.loads(gpu_report.BLOCKS.read_text())
    before = json.dumps(table)
    updated = gpu_verdict.with_blocks(table, "sm_77", "bfloat16", TUNED)
    assert json.dumps(table) == before
    assert updated["sm_77"]["bfloat16"]["statistics"]["BLOCK_N"] == 32
    assert updated["sm_77"]["bfloat16"]["grad_weight"] == table["default"]["bfloat16"]["grad_weight"]
    assert updated["sm_77"]["float32"] == table["default"]["float32"]
    assert {name: updated[name] for name in table} == table


def test_the_package_reads_the_tables(monkeypatch, tmp_path):
    assert gpu_report.RATES == rates.TABLE
    assert Path(cut_tile.__file__).with_name("cut_blocks.json") == gpu_report.BLOCKS
    shutil.copy(gpu_report.BLOCKS, tmp_path)
    monkeypatch.setattr(gpu_report, "BLOCKS", tmp_path / "cut_blocks.json")
    monkeypatch.setattr(gpu_report, "RATES", tmp_path / "gpu_rates.json")
    (tmp_path / "gpu_rates.json").write_text('{"sm_77": {"float16": {"gemm": 1.0}}}')
    report = {"architecture": "sm_77", "steps": [{"results": [*CEILINGS, *TUNED]}]}
    gpu_report.write_tables(report)
    table = json.loads((tmp_path / "gpu_rates.json").read_text())
    assert table["sm_77"]["float16"] == {"gemm": 1.0}
    assert rates.Rates(**table["sm_77"]["bfloat16"]).cut_gradients == 9.0
    entry = json.loads((tmp_path / "cut_blocks.json").read_text())["sm_77"]["bfloat16"]
    assert cut_tile.Blocks(**entry["statistics"]).BLOCK_N == 32
    assert {path.name for path in tmp_path.iterdir()} == {"cut_blocks.json", "gpu_rates.json"}


def test_the_markdown_of_a_gpu():
    results = [*CEILINGS, timed("mopo_loss", 0.0125, flops=1e12, num_bytes=1.0, peak=10 * MIB), *TUNED]
    results += [
        timed("linear_logprob_sampled", 5e-3),
        timed("linear_logprob", 8e-3),
        timed("QuACK", 9e-3, workload="linear_logprob"),
    ]
    for result in TUNED:
        result["current"] = result is TUNED[0]
    step = {"name": "all", "state": "done", "seconds": 3.0, "error": "", "output": "", "results": results}
    report = {"dry_run": False, "gpu": "NVIDIA X", "started": "today", "minutes": 9.0, "steps": [step]}
    gpu_report.finish(report, seconds=3.0)
    text = markdown(report)
    assert "# GPU report: NVIDIA X" in text
    assert "dry run" not in text
    assert "| mopo_loss | mopo_loss | 12.5 | 80.0% | 10 | 7 |  |" in text  # 3.2 MB of gradients
    assert "| clone step ≥ 95% of the three products together | 100.0% at N=1000 H=100 V=5000" in text
    assert "| 1000, 100, 5000 | 5 | 0.0386 | 8 | 9 | QuACK |" in text  # 65 entries a row
    assert "| statistics | 32 × 64 × 32, 4 warps, 2 stages | 1e+03 | 0 | **fastest** |" in text
    assert "| statistics | 64 × 64 × 32, 4 warps, 2 stages | 2e+03 | 0 | the table's |" in text
