"""`mopo profile`: floors of hand-made sizes, workloads that do the work they claim, tables and the timeline."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from mopo_kernels.measure import profile, timeline
from mopo_kernels.measure.roofline import Ceilings, Work, copy_rate, gemm_rate, seconds_of, steady_seconds
from mopo_kernels.measure.workloads import WORKLOADS, Sizes

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
H100 = Ceilings(gemm=989e12, copy=3.35e12)  # its data sheet, as the page says
CPU = torch.device("cpu")
SIZES = Sizes(rows=10, hidden_size=3, vocab=7, dtype=torch.bfloat16, device=CPU)
PRODUCT = 2 * 10 * 3 * 7


def prepare(name, sizes, backend=None):
    """A call of an op on fresh inputs."""
    return WORKLOADS[name].bind(backend, *WORKLOADS[name].inputs(sizes))


@pytest.mark.parametrize(
    ("name", "flops", "num_bytes"),
    [
        ("mopo_loss", 3 * PRODUCT, 2 * (2 * 30 + 2 * 21) + 12 * 10),
        ("linear_logprob", 3 * PRODUCT, 2 * (2 * 30 + 2 * 21) + 12 * 10),
        ("linear_logprob_rows", 3 * PRODUCT, 2 * (2 * 30 + 2 * 21) + 12 * 10),
        ("linear_logprob_sampled", PRODUCT, 2 * (2 * 30 + 2 * 21) + 12 * 10),
        ("mopo_loss_sampled", PRODUCT, 2 * (2 * 30 + 2 * 21) + 12 * 10),
        ("frozen_head", 2 * PRODUCT, 2 * (2 * 30 + 21) + 12 * 10),
        ("linear_logprob_forward", PRODUCT, 2 * (30 + 21) + 12 * 10),
        ("token_logprob", 0, 2 * 70 + 12 * 10),
        ("token_logprob_backward", 0, 2 * 2 * 70 + 12 * 10),
        ("sequence_sums", 0, 12 * 10),
        ("label_statistics", 0, 10 * (4 * 4 + 8) + 8 * (4 + 3 * 10 + 3 * 4) + 8 * 10),
    ],
)
def test_floors(name, flops, num_bytes):
    assert WORKLOADS[name].work(SIZES) == (flops, num_bytes)


def test_every_floor_is_tested():
    (mark,) = (mark for mark in test_floors.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in mark.args[1]} == set(WORKLOADS)


@pytest.mark.parametrize(
    "name", ["mopo_loss", "linear_logprob", "linear_logprob_rows", "frozen_head", "linear_logprob_forward"]
)
def test_torch_counts_the_same_flops(name):
    sizes = SIZES._replace(dtype=torch.float32)
    run = prepare(name, sizes, "reference")
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == WORKLOADS[name].work(sizes).flops


def test_the_derived_times_of_the_page():
    rows = re.findall(r"^\| (\d{4}) \| (\d+) \| (\d+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 9
    for *sizes, times in rows:
        h, v, n = map(int, sizes)
        at = Sizes(n, h, v, torch.bfloat16, CPU)
        forward, frozen, clone = (
            WORKLOADS[name].work(at) for name in ("linear_logprob_forward", "frozen_head", "mopo_loss")
        )
        flops = [forward.flops, frozen.flops, clone.flops, 4 * forward.flops]
        derived = [*(1e3 * x / H100.gemm for x in flops), 1e3 * clone.bytes / H100.copy]
        assert times == " | ".join(f"{x:.2f}" for x in derived)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_repeats(name):
    run = prepare(name, Sizes(12, 8, 40, torch.float32, CPU))
    run()
    run()


def test_the_longer_of_flops_and_bytes_is_the_floor():
    ceilings = Ceilings(gemm=100.0, copy=10.0)
    assert ceilings.floor(Work(flops=200.0, bytes=10.0)) == 2.0
    assert ceilings.floor(Work(flops=200.0, bytes=40.0)) == 4.0
    assert ceilings.fraction(Work(flops=200.0, bytes=40.0), seconds=8.0) == 0.5


def test_the_median_of_the_rounds_after_the_warm_up(monkeypatch):
    calls = []
    clock = iter([0, 1, 10, 15, 20, 22])  # rounds of 1, 5 and 2 seconds
    monkeypatch.setattr("mopo_kernels.measure.roofline.time.perf_counter", lambda: next(clock))
    assert seconds_of(lambda: calls.append(None), CPU, rounds=3, warmup=2) == 2
    assert len(calls) == 5


def test_rates_are_work_over_time(monkeypatch):
    monkeypatch.setattr("mopo_kernels.measure.roofline.seconds_of", lambda run, device: run() is None or 0.5)
    assert copy_rate(1000, CPU) == 2 * 1000 / 0.5
    assert gemm_rate(2, 3, 5, torch.float32, CPU) == 2 * 2 * 3 * 5 / 0.5


def test_steady_is_the_mean_of_many_calls_after_as_many(monkeypatch):
    calls = []
    monkeypatch.setattr("mopo_kernels.measure.roofline.time_once", lambda run, device: run() or 0.1)
    assert steady_seconds(lambda: calls.append(None), torch.device("cuda")) == 0.1 / 5  # of the last one, of five calls
    assert len(calls) == 6 + 2 * 5


def test_against_ceilings():
    text = timeline.against_ceilings(Work(3e9, 2e6), Ceilings(1e12, 1e9), seconds=0.006, peak=5 * 2**20)
    assert text.splitlines() == [
        "needed  ceiling  time at it",
        " 3e+09  1e+12/s        3 ms  flops",
        " 2e+06  1e+09/s        2 ms  bytes",
        "a step takes 6 ms, 50% of the roofline, and 5 MiB beside its inputs",
    ]


def event(name, count, *, kind, cpu=0.0, device=0.0, annotation=False):
    times = {"self_cpu_time_total": cpu, "self_device_time_total": device}
    return SimpleNamespace(key=name, count=count, device_type=kind, is_user_annotation=annotation, **times)


def test_kernels_on_a_gpu_and_operators_on_a_cpu():
    events = [
        event("aten::mm", 6, kind=DeviceType.CPU, cpu=30.0, device=90.0),
        event("step", 3, kind=DeviceType.CPU, cpu=300.0, annotation=True),
        event("gemm", 6, kind=DeviceType.CUDA, device=60.0),
        event("fold", 3, kind=DeviceType.CUDA, device=90.0),
        event("step", 3, kind=DeviceType.CUDA, device=300.0, annotation=True),
    ]
    profiler = SimpleNamespace(key_averages=lambda: events)
    assert timeline.lines_of(profiler, 3, CPU) == [("aten::mm", 2.0, 1e-5)]
    assert timeline.lines_of(profiler, 3, torch.device("cuda")) == [("fold", 1.0, 3e-5), ("gemm", 2.0, 2e-5)]


def test_the_table_ends_with_what_is_left_over():
    lines = [timeline.Line(f"kernel {i}", 2, 0.001) for i in range(20)]
    text = timeline.table(lines).splitlines()
    assert text[1].split() == ["5.0%", "1", "ms", "2", "kernel", "0"]
    assert len(text) == 1 + 15 + 1
    assert text[-1].split() == ["25.0%", "5", "ms", "5", "more"]


@pytest.mark.parametrize("name", ["mopo_loss", "label_statistics"])
def test_the_command(name, capfd, tmp_path):
    path = tmp_path / "trace.json"
    sizes = ["--rows", "12", "--hidden-size", "8", "--vocab", "300", "--steps", "2"]
    assert profile.main(["--op", name, *sizes, "--trace", str(path)]) == 0
    printed = capfd.readouterr().out
    assert f"{name}: 12 rows, hidden size 8, vocabulary 300, float32" in printed
    assert "of the roofline" in printed
    assert f"mopo_kernels::{'linear_policy_loss' if name == 'mopo_loss' else name}" in printed
    assert str(path) in printed
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {f"{name}, step 0", f"{name}, step 1"} <= names
    assert {"forward", "backward"} <= names or name != "mopo_loss"


def test_what_runs_and_why():
    def how(name, backend=None, vocab=7):
        sizes = SIZES._replace(vocab=vocab, dtype=torch.float32)
        return timeline._how(name, sizes, backend, WORKLOADS[name].inputs(sizes))

    assert "one pass, 6·N·H·V: 10 rows" in how("mopo_loss")
    assert how("mopo_loss", "reference") == "backend reference"
    assert how("frozen_head", "reference") == "backend reference"
    assert how("token_logprob", "reference") == "backend reference: asked for by backend"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--op frob", "invalid choice: 'frob'"),
        ("--rows 0", "'0' is not a positive whole number"),
        ("--vocab many", "'many' is not a positive whole number"),
        ("--dtype int8", "invalid choice: 'int8'"),
        ("--backend frob", "backend='frob' cannot run linear_logprob"),
        ("--op label_statistics --rows 1", "at least two responses; got rows=1"),
        ("--rows 7 --vocab 9", "even number of rows, two responses of as many tokens; got 7"),
        ("--trace nowhere/trace.json", "there is no directory nowhere"),
        ("--frob", "unrecognized arguments: --frob (see mopo profile --help)"),
    ],
)
def test_wrong_input_gets_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert profile.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mopo profile: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_sizes_that_do_not_fit(monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(timeline, "report", out_of_memory)
    assert profile.main([]) == 2
    assert "take fewer --rows" in capsys.readouterr().err


def test_the_help_names_every_op_and_waits_for_no_torch(capsys):
    assert set(profile.OPS) == set(WORKLOADS)
    with pytest.raises(SystemExit):
        profile.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in WORKLOADS)
    script = "import sys; sys.modules['torch'] = None; from mopo_kernels.measure.profile import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, cwd=PAGE.parents[1])
