"""bench: contestants take turns and fail alone, peers compute what we compute, two trees are timed in turn."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import harness, peers
from bench.cpu import in_turn, report, sampled
from bench.gpu import steps
from mopo_kernels.measure.workloads import WORKLOADS, Sizes

TREE = Path(in_turn.__file__).parents[2]
CPU = torch.device("cpu")
SIZES = Sizes(6, 16, 40, torch.float32, CPU)
ROUNDS = harness.Limits(rounds=3)


def of(*runs):
    return {f"{i}": lambda run=run: run for i, run in enumerate(runs)}


def test_contestants_take_turns_in_orders_of_their_own():
    order = []
    harness.hold({name: lambda name=name: lambda: order.append(name) for name in "abcd"}, limits=ROUNDS)
    assert order[:8] == [*"aabbccdd"]  # warm-up and memory
    rounds = ["".join(order[first : first + 4]) for first in (8, 12, 16)]
    assert all(sorted(played) == [*"abcd"] for played in rounds)
    assert len(set(rounds)) > 1
    assert len(order) == 20


def test_a_contestant_that_fails_is_reported_and_leaves_the_rest_alone():
    calls = []

    def late():
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("CUDA error: misaligned\naddress")

    def large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    contestants = of(late, large, lambda: None) | {"missing": lambda: __import__("no_such_peer")}
    late, large, good, missing = harness.hold(contestants, limits=ROUNDS).values()
    assert (late.error, len(late.rounds), late.seconds) == ("RuntimeError: CUDA error: misaligned", 1, None)
    assert len(calls) == 4  # none of them in the last round
    assert large.error == "out of memory"
    assert missing.error == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert good.seconds == sorted(good.rounds)[1]


def test_a_long_contest_has_fewer_rounds():
    (result,) = harness.hold(of(lambda: None), limits=harness.Limits(rounds=5, seconds=0.0)).values()
    assert len(result.rounds) == harness.MIN_ROUNDS


def test_a_contestant_that_takes_all_patience_runs_once():
    calls = []
    (result,) = harness.hold(of(lambda: calls.append(None)), limits=harness.Limits(rounds=5, patience=0.0)).values()
    assert (len(calls), len(result.rounds)) == (1, 1)


def test_memory_is_the_peak_above_the_start():
    before = torch.ones(1000)

    def run():
        torch.empty(2**20, dtype=torch.uint8)
        return before + torch.empty(2**18, dtype=torch.uint8)[:1000]

    assert 2**20 <= harness.peak_bytes(run, CPU) < 2**20 + 2**16


def test_results_carry_the_work_of_their_workload():
    extent = steps.DRY._replace(rounds=1)
    ours, missing = steps.contest(steps.ours("linear_logprob", None, "frob"), SIZES, extent)
    assert (ours["flops"], ours["bytes"]) == WORKLOADS["linear_logprob"].work(SIZES)
    assert (ours["name"], ours["sizes"], ours["seconds"]) == ("linear_logprob", [6, 16, 40], ours["rounds"][0])
    assert "backend='frob'" in missing["error"]
    assert "seconds" not in missing


@pytest.mark.parametrize("name", ["mopo, per row", "mopo, sum", "torch linear_cross_entropy", "torch.compile"])
def test_heads_agree(name):
    hidden, weight, target = WORKLOADS["linear_logprob"].inputs(SIZES)
    target[2] = -100
    losses = peers.OURS | peers.heads(compiler="eager")
    expected = torch.autograd.grad(peers.eager(hidden, weight, target), (hidden, weight))
    gradients = torch.autograd.grad(losses[name](hidden, weight, target), (hidden, weight))
    torch.testing.assert_close(gradients, expected)


def test_who_took_all_patience_sits_out_larger_sizes(monkeypatch):
    monkeypatch.setattr(sampled, "SIZES", {"small": (4, 16, 40), "large": (8, 16, 40)})
    monkeypatch.setattr(sampled.head, "DTYPES", {"float32": torch.float32})
    monkeypatch.setattr(sampled, "LIMITS", harness.Limits(rounds=2, patience=2.0))
    monkeypatch.setattr(peers, "CPU_HEADS", {})
    calls = []

    def slow(hidden, weight, target):
        calls.append((len(hidden), weight.requires_grad))
        time.sleep(2)
        return peers.eager(hidden, weight, target)

    monkeypatch.setattr(peers, "heads", lambda: {"eager": peers.eager, "slow": slow})
    small, large, small_frozen, large_frozen = (x["extra_info"] for x in sampled.entries())
    assert calls == [(4, True), (4, False)]
    for info in (small, small_frozen):
        assert (len(info["seconds"]["slow"]), info["errors"]) == (1, {})
    for info in (large, large_frozen):
        assert "slow" not in info["seconds"]
        assert info["errors"] == {"slow": "not run: took 2 s at small"}
        assert {len(x) for x in info["seconds"].values()} == {2}
        assert next(iter(info["seconds"])) == "mopo, sampled 1/64"
        assert info["peak_bytes"]["eager"] > 0


def test_errors_stand_in_the_table(tmp_path):
    entry = harness.entry("pair", of(lambda: None, lambda: None) | {"gone": lambda: __import__("no_such_peer")}, N=3)
    results = {"machine_info": {"cpu": {"brand_raw": "X", "count": 2}}, "datetime": "2026", "benchmarks": [entry]}
    report.write([json.loads(json.dumps(results))], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| gone | ModuleNotFoundError: No module named 'no_such_peer' |" in text
    assert "| 0 | 0.000 | 1.00 |" in text
    assert (tmp_path / "contests.png").exists()


# ------------------------------------------------------------------------------------------------------- two trees


class FakeWorker:
    def __init__(self, name, log, seconds):
        self.name, self.log, self.of_a_call = name, log, seconds

    def seconds(self, call, size, repeats):
        self.log.append((self.name, repeats))
        return self.of_a_call


def test_who_goes_first_changes():
    log = []
    this, other = FakeWorker("this", log, 0.02), FakeWorker("other", log, 0.01)
    options = argparse.Namespace(rounds=4, seconds=60)
    times = in_turn.rounds_of(this, other, ("call", "size"), options)
    assert times == [[0.02] * 4, [0.01] * 4]
    assert log[4:] == [(name, 5) for name in ["this", "other", "other", "this"] * 2]  # 0.1 s a turn
    assert "2.000 (2.000 to 2.000, 4 rounds)" in in_turn.summary(*times)
    assert len(in_turn.rounds_of(this, other, ("call", "size"), argparse.Namespace(rounds=9, seconds=0))[0]) == 3


def test_a_process_answers_every_turn(monkeypatch, capsys):
    turns = [json.dumps([call, "8x32 H64 V1000", 2]) for call in in_turn.CALLS]
    monkeypatch.setattr(sys, "stdin", turns)
    in_turn.work()
    package, *seconds = capsys.readouterr().out.split()
    assert Path(package).parents[1] == TREE
    assert len([x for x in seconds if float(x) > 0]) == len(turns)


@pytest.mark.slow
def test_a_tree_times_itself(monkeypatch, capsys):
    monkeypatch.setattr(in_turn, "TURN", 0.0)
    arguments = ["--other", str(TREE), "--rounds", "2", "--size", "8x32 H64 V1000"]
    monkeypatch.setattr(sys, "argv", ["in_turn.py", *arguments])
    in_turn.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split("8x32")[0].strip() for line in lines] == list(in_turn.CALLS)
    assert all("2 rounds" in line for line in lines)


def test_a_directory_without_the_package_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="in_turn: error"):
        in_turn.Worker(tmp_path)
