"""MOPODual: its three update rules, lag and ratchet, exact resumption, and what it refuses."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from golden_cases import golden, tensor
from label_data import TAU, Oracle, between, data, solve

from mopo_kernels import mopo_objective, win_rate_from_pairs
from mopo_kernels.objective.dual import InfeasibleThresholds, attainable_range, auto_eps
from mopo_kernels.objective.multipliers import MOPODual, barrier_multipliers

NAMES = ["help", "harmless", "short"]


def dual(thresholds=None, **options):
    options = {"primary": "help", "tau": TAU, **options}
    return MOPODual(NAMES, thresholds={"harmless": 0.5, "short": 0.4} if thresholds is None else thresholds, **options)


def test_exact_refresh_is_the_solution_and_update_only_records():
    labels = data()
    module = dual({"harmless": 0.4, "short": 0.35}, eps=0.01)
    module.refresh(labels[0], labels[1])
    solution = solve(labels, [0.4, 0.35], eps=0.01)
    assert (solution.multipliers > 0).all()
    torch.testing.assert_close(module.multipliers, solution.multipliers)
    torch.testing.assert_close(module.win_rates, solution.win_rates)
    torch.testing.assert_close(module.slack, solution.lower_bounds[1:] - tensor([0.4, 0.35]))

    batch = labels[1] <= labels[1].unique()[3]
    module.update(labels[0][batch], labels[1][batch])
    assert module.step == 1
    torch.testing.assert_close(module.multipliers, solution.multipliers)
    output = mopo_objective(
        torch.zeros(int(batch.sum())), labels[0][batch], labels[1][batch], solution.multipliers, tau=TAU
    )
    torch.testing.assert_close(module.win_rates, output.win_rates)


def test_primary_may_stand_anywhere_and_thresholds_follow_names():
    labels = data()
    module = MOPODual(NAMES, primary="short", thresholds={"harmless": 0.6}, tau=TAU)
    module.refresh(labels[0], labels[1])
    torch.testing.assert_close(module.multipliers, solve(labels, [-math.inf, 0.6], primary=2).multipliers)
    assert module.secondaries == ["help", "harmless"]
    assert module.slack[0] == math.inf


@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_steps_follow_names_wherever_the_primary_stands(update):
    win_rate, group, *_ = data(groups=8)
    thresholds = {"harmless": 0.55, "short": 0.4}
    options = {"primary": "help", "thresholds": thresholds, "tau": TAU, "eps": 0.02, "update": update}
    last_first = [2, 0, 1]  # short, help, harmless
    plain = MOPODual(NAMES, **options)
    moved = MOPODual([NAMES[k] for k in last_first], **options)
    for _ in range(3):
        plain.update(win_rate, group)
        moved.update(win_rate[:, last_first], group)
    torch.testing.assert_close(moved.multipliers, plain.multipliers[last_first])
    assert dict(zip(moved.secondaries, moved.slack.tolist(), strict=True)) == pytest.approx(
        dict(zip(plain.secondaries, plain.slack.tolist(), strict=True))
    )
    assert (plain.multipliers[1:] > 0).any()


def test_chi_stays_above_its_floor():
    win_rate, group, *_ = data(groups=8)
    module = dual({"harmless": 0.5}, update="sgd", eps=5.0, chi_lr=100.0, chi_min=0.25)
    module.update(win_rate, group)
    assert (module.chi == 0.25).all()


def test_sgd_step_by_hand():
    labels = data(groups=8)
    module = dual({"harmless": 0.5, "short": 0.0}, update="sgd", eps=0.05, chi_lr=0.3, multiplier_lr=0.7)
    module.multipliers.copy_(tensor([1.0, 0.5, 0.0]))
    module.chi.fill_(2.0)
    oracle = Oracle(*labels)
    weights = oracle.weights([0.5, 0.0])
    chi, expected = [], []
    for k, (threshold, multiplier) in enumerate([(0.5, 0.5), (0.0, 0.0)], start=1):
        x = np.concatenate([w / r * v[:, k] for w, v, r in zip(weights, oracle.values, oracle.reference, strict=True)])
        q0 = np.concatenate(oracle.reference) / len(oracle.members)

        def penalty(c, x=x, q0=q0):
            return c * np.log(q0 @ np.exp(-x / c)) + c * 0.05

        slope = (penalty(2 + 1e-5) - penalty(2 - 1e-5)) / 2e-5
        chi.append(2 - 0.3 * slope)
        expected.append(max(0.0, multiplier - 0.7 * (-penalty(chi[-1]) - threshold)))
    module.update(labels[0], labels[1])
    np.testing.assert_allclose(module.chi[1:], chi, rtol=1e-8)
    np.testing.assert_allclose(module.multipliers, [1, *expected], rtol=1e-8)
    assert expected[1] == 0, "with slack, a multiplier of 0 stays there"


def test_barrier_step_by_hand():
    labels = data(groups=8)
    module = dual(update="barrier", eps=0.01, multiplier_lr=0.25, sigma=0.02, delta=0.05)
    module.multipliers.copy_(tensor([1.0, 0.5, 0.1]))
    slack = Oracle(*labels).lower_bounds([0.5, 0.1], 0.01) - [0.5, 0.4]
    module.update(labels[0], labels[1])
    expected = 0.75 * tensor([0.5, 0.1]) + 0.25 * barrier_multipliers(torch.from_numpy(slack), 0.02, 0.05)
    torch.testing.assert_close(module.multipliers[1:], expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_sgd_finds_the_exact_multipliers(eps):
    labels = data()
    thresholds = between(labels, 0.2, eps=eps).tolist()
    module = dual(dict(zip(NAMES[1:], thresholds, strict=True)), update="sgd", eps=eps, multiplier_lr=0.4, chi_lr=0.5)
    for _ in range(1000):
        module.update(labels[0], labels[1])
    expected = solve(labels, thresholds, eps=eps).multipliers
    assert (expected[1:] > 0.05).any()
    torch.testing.assert_close(module.multipliers, expected, rtol=0, atol=1e-3)


def test_barrier_settles_at_the_barriers_optimum_near_the_exact_multipliers():
    labels = data()
    thresholds = between(labels, 0.2).tolist()
    module = dual(
        dict(zip(NAMES[1:], thresholds, strict=True)), update="barrier", multiplier_lr=0.01, sigma=1e-3, delta=2e-3
    )
    for _ in range(2000):
        module.update(labels[0], labels[1])
    expected = solve(labels, thresholds).multipliers
    settled = barrier_multipliers(module.slack, 1e-3, 2e-3)
    torch.testing.assert_close(module.multipliers[1:], settled, rtol=1e-5, atol=0)
    assert (module.slack > 0).all()
    torch.testing.assert_close(module.multipliers, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(("sigma", "weak"), [(0.01, True), (0.05, False)])
def test_a_threshold_dearer_than_the_barrier_is_missed_and_warned_of(sigma, weak, recwarn):
    labels = data()
    bounds = dict(zip(NAMES[1:], between(labels, 0.75).tolist(), strict=True))
    needed = solve(labels, list(bounds.values())).multipliers[1:]
    assert 1 < needed.max() < 5
    module = dual(bounds, update="barrier", sigma=sigma)
    module.refresh(labels[0], labels[1])
    missed = [name for name, price in zip(NAMES[1:], needed, strict=True) if weak and price > 1]
    assert [str(w.message).split("'")[1] for w in recwarn] == missed
    for _ in range(400):
        module.update(labels[0], labels[1])
    assert bool((module.slack < 0).any()) == weak


@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_default_rates_hold_the_thresholds_on_noisy_batches(update):
    """Eight hard pairs at a time, as the paper trains: the multipliers settle, and where they do, thresholds hold."""
    win_rate, group, _ = data(groups=400, sizes=(2,), objectives=3, hard=True)
    thresholds = between((win_rate, group, None), 0.4).tolist()
    module = dual(dict(zip(NAMES[1:], thresholds, strict=True)), update=update)
    generator = torch.Generator().manual_seed(0)
    ids, path = group.unique(), []
    for _ in range(1500):
        batch = torch.isin(group, ids[torch.randperm(len(ids), generator=generator)[:8]])
        module.update(win_rate[batch], group[batch])
        path.append(module.multipliers.clone())
    late = torch.stack(path[500:])
    assert late.std(0).max() < 0.2
    settled = mopo_objective(torch.zeros(len(group)), win_rate, group, late.mean(0), tau=TAU).win_rates
    assert (settled[1:] > tensor(thresholds) - 0.01).all()
    assert settled[0] > 0.5, "the multipliers ran away"


@pytest.mark.parametrize("update", ["sgd", "barrier"])
def test_an_objective_that_the_batch_does_not_label_keeps_its_multiplier(update):
    labels = data(groups=8)
    module = dual(update=update, eps=0.01)
    module.update(labels[0], labels[1])
    before = copy.deepcopy(module.state_dict())
    unlabelled = labels[0].clone()
    unlabelled[:, 2] = math.nan
    module.update(unlabelled, labels[1])
    for name in ("multipliers", "win_rates", "lower_bounds", "chi"):
        now = getattr(module, name)
        assert now[2] == before[name][2], name
        assert now[1] != before[name][1], name


def test_ratchet_raises_thresholds_to_what_the_lagged_policy_attains():
    labels = data(lag=True)
    module = dual({"harmless": 0.3}, ratchet_beta=0.99)
    module.refresh(labels[0], labels[1])
    assert module.thresholds.tolist() == [0.3, -math.inf]
    module.refresh(labels[0], labels[1], labels[2], ratchet=True)
    oracle = Oracle(*labels)
    attained = np.mean([r @ v for r, v in zip(oracle.reference, oracle.values, strict=True)], 0)[1:]
    assert (0.99 * attained > 0.3).all()
    np.testing.assert_allclose(module.thresholds, 0.99 * attained)
    torch.testing.assert_close(module.multipliers, solve(labels, module.thresholds).multipliers)

    high_floor = dual({"harmless": float(attained[0])}, ratchet_beta=0.9)
    high_floor.refresh(labels[0], labels[1], labels[2], ratchet=True)
    np.testing.assert_allclose(high_floor.thresholds, [attained[0], 0.9 * attained[1]])


def test_auto_eps_makes_the_ratchet_feasible_where_the_papers_radius_is_not():
    pairs = win_rate_from_pairs(
        torch.rand(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).round()
    )
    group = torch.arange(8).repeat(2)
    module = dual({}, eps="auto")
    with pytest.raises(RuntimeError, match="call refresh before update"):
        module.update(pairs, group)
    module.refresh(pairs, group, ratchet=True)
    assert module.eps.item() == pytest.approx(auto_eps(pairs, group, beta=0.9995))
    with pytest.raises(InfeasibleThresholds):
        dual({}, eps=0.15).refresh(pairs, group, ratchet=True)


def test_lag_is_due_every_so_many_steps():
    labels = data(groups=4)
    module = dual(lag_steps=3)
    due = []
    for _ in range(6):
        module.update(labels[0], labels[1])
        due.append(module.lag_due)
    assert due == [False, False, True, False, False, True]
    assert not dual(lag_steps=3).lag_due
    assert not dual().lag_due


@pytest.mark.parametrize("update", ["exact", "sgd", "barrier"])
def test_infeasible_thresholds_are_named_under_every_rule(update):
    labels = data()
    module = dual({"short": 0.99}, update=update)
    with pytest.raises(InfeasibleThresholds, match=r"objective 'short' must reach 0\.99, but at most 0") as error:
        module.refresh(labels[0], labels[1])
    assert error.value.objective == "short"


def test_a_runaway_multiplier_is_an_error():
    labels = data()
    module = dual({"short": 0.99}, update="sgd", multiplier_lr=1.0, max_multiplier=2.0)
    module.multipliers[2] = 1.9
    with pytest.raises(InfeasibleThresholds, match=r"objective 'short' must reach 0\.99") as error:
        module.update(labels[0], labels[1])
    assert error.value.attainable == pytest.approx(float(attainable_range(labels[0], labels[1], tau=TAU)[1][2]))


# ------------------------------------------------------------------------------------------------- state, distributed


def trained(update="sgd"):
    labels = data()
    module = dual(update=update, eps=0.003)
    module.refresh(labels[0], labels[1])
    for _ in range(3):
        module.update(labels[0], labels[1])
    return module


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("update", ["exact", "sgd", "barrier"])
def test_a_resumed_module_continues_bit_for_bit(tmp_path, update):
    labels = data()
    module = trained(update)
    torch.save(module.state_dict(), tmp_path / "dual.pt")
    resumed = dual(update=update, eps=0.003)
    resumed.load_state_dict(torch.load(tmp_path / "dual.pt", weights_only=True))
    assert_same_state(module.state_dict(), resumed.state_dict())
    for _ in range(2):
        module.update(labels[0], labels[1])
        resumed.update(labels[0], labels[1])
    module.refresh(labels[0], labels[1], ratchet=True)
    resumed.refresh(labels[0], labels[1], ratchet=True)
    assert_same_state(module.state_dict(), resumed.state_dict())


def test_a_model_in_half_precision_keeps_exact_multipliers():
    module = trained()
    before = copy.deepcopy(module.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    model.half().to(torch.bfloat16).to("cpu", torch.float32)
    assert model[0].weight.dtype == torch.float32
    assert_same_state(before, module.state_dict())
    module.to("meta")
    assert module.multipliers.is_meta
    assert module.multipliers.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": ["a", "b", "a"]}, "objectives must have different names; a "),
        ({"primary": "c"}, "primary must be one of the objectives a, b; got 'c'"),
        ({"thresholds": {"a": 0.5}}, "'a' is the primary objective"),
        ({"thresholds": {"c": 0.5}}, "'c' is not one of the objectives a, b"),
        ({"thresholds": {"b": math.nan}}, "'b' must have a number below inf; got nan"),
        ({"update": "adam"}, "update must be one of exact, sgd, barrier; got 'adam'"),
        ({"tau": -0.1}, "tau must be a positive number"),
        ({"eps": -0.1}, "eps must be a number >= 0"),
        ({"ratchet_beta": 1.1}, r"beta must lie in \[0, 1\]; got 1.1"),
        ({"chi_lr": 0.0}, "chi_lr must be a positive number"),
        ({"multiplier_lr": -1.0}, "multiplier_lr must be a positive number"),
        ({"lag_steps": 0}, "lag_steps must be a positive number; got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    good = {"objectives": ["a", "b"], "primary": "a", "thresholds": {"b": 0.5}}
    arguments = {**good, **change}
    MOPODual(good["objectives"], primary="a", thresholds={"b": 0.5})
    with pytest.raises(ValueError, match=message):
        MOPODual(arguments.pop("objectives"), **arguments)


def test_labels_need_a_column_for_each_objective():
    labels = data(objectives=2)
    for method in (dual().update, dual().refresh):
        with pytest.raises(ValueError, match="one column for each of the objectives help, harmless, short"):
            method(labels[0], labels[1])


def rank_update(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    win_rate, group, lag = data(groups=5 + rank, seed=rank, lag=True)
    module = dual(update="sgd", eps=0.01)
    module.update(win_rate, group, lag)
    torch.save(module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class Ranks:
    """torch.distributed among threads, each of which is a rank."""

    def __init__(self, count):
        self.met, self.sent = threading.Barrier(count), {}
        self.is_available = self.is_initialized = lambda: True
        self.get_world_size = lambda: count

    def all_gather_object(self, received, mine):
        rank = int(threading.current_thread().name)
        self.sent[rank] = mine
        self.met.wait(timeout=60)
        received[:] = [self.sent[i] for i in range(len(received))]

    def broadcast_object_list(self, objects, src):
        self.sent[f"of {threading.current_thread().name}"] = list(objects)
        self.met.wait(timeout=60)
        objects[:] = self.sent[f"of {src}"]


def states_of_threads(monkeypatch):
    monkeypatch.setattr("mopo_kernels.objective.multipliers.dist", Ranks(2))
    modules = [dual(update="sgd", eps=0.01) for _ in range(2)]
    labels = [data(groups=5 + rank, seed=rank, lag=True) for rank in range(2)]
    threads = [
        threading.Thread(name=str(i), target=module.update, args=x)
        for i, (module, x) in enumerate(zip(modules, labels, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    return [module.state_dict() for module in modules]


def states_of_processes(folder):
    mp.spawn(rank_update, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("ranks", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_all_ranks_take_the_step_of_their_joint_batch(tmp_path, monkeypatch, ranks):
    first, second = states_of_threads(monkeypatch) if ranks == "threads" else states_of_processes(tmp_path)
    assert_same_state(first, second)
    assert first["step"] == 1
    parts = [data(groups=5 + rank, seed=rank, lag=True) for rank in range(2)]
    win_rate, lag = (torch.cat([part[i] for part in parts]) for i in (0, 2))
    alone = dual(update="sgd", eps=0.01)
    alone.update(win_rate, torch.cat([parts[0][1], parts[1][1] + 10_000]), lag)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value)


# ----------------------------------------------------------------------------------------------------------- barrier


@pytest.mark.parametrize("case", golden("barrier"))
def test_golden_barrier(case):
    multipliers = barrier_multipliers(tensor(case["slack"]), case["sigma"], case["delta"])
    torch.testing.assert_close(multipliers, tensor(case["multipliers"]), rtol=case["tol"]["rel"], atol=0)


def test_barrier_is_smooth_at_delta_and_zero_without_a_threshold():
    slack = tensor([0.1 - 1e-9, 0.1 + 1e-9, math.inf]).requires_grad_()
    multipliers = barrier_multipliers(slack, 0.3, 0.1)
    assert multipliers[2] == 0
    assert multipliers[0].item() == pytest.approx(multipliers[1].item(), rel=1e-7)
    gradient = torch.autograd.grad(multipliers[:2].sum(), slack)[0]
    assert gradient[0].item() == pytest.approx(gradient[1].item(), rel=1e-7)


def test_barrier_refuses_a_width_of_zero():
    with pytest.raises(ValueError, match="delta must be a positive number; got 0"):
        barrier_multipliers(tensor([0.1]), 0.1, 0.0)
