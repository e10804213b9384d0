"""The MOPO objective against golden cases, closed forms and its invariances; test_checks.py has what it refuses."""

import itertools
import math

import pytest
import torch
from golden_cases import golden, tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels import mopo_objective, mopo_weights, win_rate_from_pairs
from mopo_kernels.backends.native import cpu
from mopo_kernels.objective.robust import robust_bound

POLICY_STEPS = ("clone", "contrast", "regress")
TAU = 0.3  # soft enough that every weight matters
EXACT = {"rtol": 1e-10, "atol": 1e-12}  # two float64 evaluation orders of the same sums


@pytest.fixture(params=["reference", "cpu"], scope="module", autouse=True)
def backend(request):
    """Every test here runs once per backend; test_batch.py and test_triton.py hold the others to the contract."""
    if request.param == "cpu" and cpu.UNAVAILABLE:
        pytest.skip(cpu.UNAVAILABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPO_BACKEND", request.param)
        yield request.param


def random_batch(seed, sizes, objectives=3, unlabelled=0.0, lag=True):
    """Arguments of mopo_objective for groups of the given sizes, in random row order and with odd ids."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    win_rate = torch.rand(count, objectives, generator=generator, dtype=torch.float64)
    win_rate[torch.rand(count, objectives, generator=generator) < unlabelled] = math.nan
    ids = torch.randperm(1000, generator=generator)[: len(sizes)] - 500
    order = torch.randperm(count, generator=generator)
    return {
        "logp": torch.randn(count, generator=generator, dtype=torch.float64),
        "win_rate": win_rate,
        "group": ids.repeat_interleave(torch.tensor(sizes))[order],
        "multipliers": torch.cat([torch.ones(1), torch.rand(objectives - 1, generator=generator)]).double(),
        "ref_logp": torch.randn(count, generator=generator, dtype=torch.float64),
        "lag_log_ratio": torch.randn(count, generator=generator, dtype=torch.float64) if lag else None,
        "tau": TAU,
        "eps": 0.02,
    }


def rows(batch, index):
    """The batch's rows `index`, in that order."""
    per_row = ("logp", "win_rate", "group", "ref_logp", "lag_log_ratio")
    return {name: x[index] if name in per_row and x is not None else x for name, x in batch.items()}


def members(group):
    return [(group == i).nonzero()[:, 0] for i in group.unique()]


batches = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=5),
    objectives=st.integers(1, 4),
    unlabelled=st.sampled_from([0.0, 0.3]),
    lag=st.booleans(),
)


# ------------------------------------------------------------------------------------------------------ golden cases


@pytest.mark.parametrize("case", golden("batch"))
@pytest.mark.parametrize("policy_step", POLICY_STEPS)
def test_golden_batch(case, policy_step, backend):
    output = mopo_objective(
        tensor(case["logp"]),
        tensor(case["win_rate"]),
        torch.tensor(case["group"]),
        tensor([1.0, *case["multipliers"]]),
        tau=case["tau"],
        eps=case["eps"],
        ref_logp=tensor(case["ref_logp"]),
        lag_log_ratio=None if case["lag_log_ratio"] is None else tensor(case["lag_log_ratio"]),
        policy_step=policy_step,
        backend=backend,
    )
    relative = {"rtol": case["tol"]["rel"], "atol": 0}
    torch.testing.assert_close(output.weights, tensor(case["weights"]), **relative)
    torch.testing.assert_close(output.win_rates[1:], tensor(case["win_rates"]), **relative)
    torch.testing.assert_close(output.lower_bounds[1:], tensor(case["lower_bounds"]), **relative)
    torch.testing.assert_close(output.ess, tensor(case["ess"]), **relative)
    torch.testing.assert_close(output.loss, tensor(case["loss"][policy_step]), **relative)
    if case["eps"] > 0:
        torch.testing.assert_close(output.chi[1:], tensor(case["chi"]), rtol=case["tol"]["chi_rel"], atol=0)


# ----------------------------------------------------------------------------------------------------------- weights


@given(batch=batches)
@settings(deadline=None, max_examples=20)
def test_weights_are_the_softmax_of_scores_within_each_group(batch):
    labels = (batch["win_rate"], batch["group"], batch["multipliers"])
    weights = mopo_weights(*labels, tau=TAU, lag_log_ratio=batch["lag_log_ratio"])
    for member in members(batch["group"]):
        v = batch["win_rate"][member]
        counted = torch.where(v.isnan().all(0), 0.0, v.nan_to_num(nan=0.5))
        score = counted @ batch["multipliers"]
        lag = torch.zeros(len(member)).double() if batch["lag_log_ratio"] is None else batch["lag_log_ratio"][member]
        torch.testing.assert_close(weights[member], (score / TAU + lag).softmax(0), **EXACT)


def test_pair_weight_is_the_logistic_of_the_multi_objective_margin():
    preference = tensor([[0.7, 0.1, None], [0.2, 0.8, 1.0]])
    multipliers = tensor([1.0, 0.5, 2.0])
    margin = (multipliers * (2 * preference - 1)).nansum(1)
    weights = mopo_weights(win_rate_from_pairs(preference), torch.tensor([0, 1, 0, 1]), multipliers, tau=0.08)
    torch.testing.assert_close(weights, torch.cat([margin, -margin]).div(0.08).sigmoid(), **EXACT)


def test_weights_take_any_column_as_the_primary():
    batch = random_batch(0, [2, 3])
    labels, multipliers = batch["win_rate"], batch["multipliers"]
    turned = [labels.roll(1, 1), batch["group"], multipliers.roll(1)]
    expected = mopo_weights(labels, batch["group"], multipliers, tau=TAU)
    torch.testing.assert_close(mopo_weights(*turned, tau=TAU), expected, **EXACT)


def test_scores_of_hundreds_neither_overflow_nor_lose_the_loser():
    win_rate = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    weights = mopo_weights(win_rate, torch.tensor([0, 0]), torch.tensor([1.0, 6.0]), tau=0.08)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([1.0, math.exp(-7 / 0.08)]), rtol=1e-6, atol=0)


def test_weights_and_estimates_carry_no_gradient():
    batch = random_batch(0, [2, 3])
    for name in ("win_rate", "multipliers", "lag_log_ratio", "logp"):
        batch[name].requires_grad_()
    output = mopo_objective(**batch)
    carriers = {name for name, x in vars(output).items() if x.requires_grad}
    assert carriers == {"loss", "logp"}
    output.loss.backward()
    assert batch["win_rate"].grad is None
    assert batch["logp"].grad is not None


# --------------------------------------------------------------------------------------------------------- estimates


@given(batch=batches)
@settings(deadline=None, max_examples=12)
def test_win_rates_are_the_derivatives_of_the_dual(batch):
    """c_k G_k = d/d lambda_k of tau mean_x log E_ref exp(s / tau), c_k the fraction of groups labelled for k."""
    groups = members(batch["group"])
    lag = torch.zeros_like(batch["logp"]) if batch["lag_log_ratio"] is None else batch["lag_log_ratio"]
    multipliers = batch["multipliers"].clone().requires_grad_()
    total, labelled = 0, torch.zeros(len(multipliers)).double()
    for member in groups:
        v = batch["win_rate"][member]
        nobody = v.isnan().all(0)
        labelled += ~nobody
        score = torch.where(nobody, 0.0, v.nan_to_num(nan=0.5)) @ multipliers
        total = total + TAU * ((score / TAU + lag[member]).logsumexp(0) - lag[member].logsumexp(0))
    (derivative,) = torch.autograd.grad(total, multipliers)
    expected = torch.where(labelled > 0, derivative / labelled, math.nan)
    torch.testing.assert_close(mopo_objective(**batch).win_rates, expected, equal_nan=True, **EXACT)


def test_a_group_without_label_is_left_out_of_the_averages():
    batch = random_batch(1, [2, 3, 4])
    batch["win_rate"][batch["group"] == batch["group"][0], 1] = math.nan
    others = rows(batch, batch["group"] != batch["group"][0])
    torch.testing.assert_close(mopo_objective(**batch).win_rates[1], mopo_objective(**others).win_rates[1], **EXACT)
    torch.testing.assert_close(
        mopo_objective(**batch).lower_bounds[1], mopo_objective(**others).lower_bounds[1], **EXACT
    )


def test_an_objective_without_any_label_has_no_estimate_and_no_effect():
    batch = random_batch(2, [2, 3])
    batch["win_rate"][:, 2] = math.nan
    output = mopo_objective(**batch)
    for estimate in (output.win_rates, output.lower_bounds, output.chi):
        assert estimate.isnan().tolist() == [False, False, True]
    batch["win_rate"], batch["multipliers"] = batch["win_rate"][:, :2], batch["multipliers"][:2]
    torch.testing.assert_close(output.weights, mopo_objective(**batch).weights, **EXACT)


def test_bound_is_the_robust_bound_of_the_joint_sample():
    batch = random_batch(3, [2, 4, 3])
    output = mopo_objective(**batch)
    values, ref_weights = [], []
    for member in members(batch["group"]):
        reference = batch["lag_log_ratio"][member].softmax(0)
        values.append(output.weights[member] / reference * batch["win_rate"][member, 1])
        ref_weights.append(reference / 3)
    bound, chi = robust_bound(torch.cat(values), torch.cat(ref_weights), batch["eps"])
    torch.testing.assert_close(output.lower_bounds[1], bound, **EXACT)
    torch.testing.assert_close(output.chi[1], chi, rtol=1e-8, atol=0)


def test_ess_and_kl_by_hand():
    batch = random_batch(4, [2, 3], lag=False)
    output = mopo_objective(**batch)
    w = output.weights
    size = (batch["group"][:, None] == batch["group"]).sum(1)
    assert output.ess.item() == pytest.approx(4 / (w**2).sum().item())
    assert output.kl.item() == pytest.approx((w * (w * size).log()).sum().item() / 2)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("policy_step", POLICY_STEPS)
def test_gradcheck(policy_step):
    batch = random_batch(5, [2, 3, 4], unlabelled=0.2)
    logp, ref_logp = batch.pop("logp").requires_grad_(), batch.pop("ref_logp").requires_grad_()
    inputs = (logp,) if policy_step == "clone" else (logp, ref_logp)

    def loss(logp, ref_logp=ref_logp):
        return mopo_objective(logp, ref_logp=ref_logp, policy_step=policy_step, **batch).loss

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@given(batch=batches)
@settings(deadline=None, max_examples=12)
def test_gradients_have_the_closed_forms_that_kernels_use(batch):
    """clone -w_i/G; contrast (softmax_group(h)_i - w_i)/G; regress 2 sum_j(...)/(pairs G)."""
    groups = members(batch["group"])
    h = batch["logp"] - batch["ref_logp"]
    w = mopo_weights(
        batch["win_rate"], batch["group"], batch["multipliers"], tau=TAU, lag_log_ratio=batch["lag_log_ratio"]
    )
    expected = {step: torch.zeros_like(h) for step in POLICY_STEPS}
    expected["clone"] -= w / len(groups)
    for member in groups:
        v = batch["win_rate"][member]
        score = torch.where(v.isnan().all(0), 0.0, v.nan_to_num(nan=0.5)) @ batch["multipliers"]
        expected["contrast"][member] = (h[member].softmax(0) - w[member]) / len(groups)
        n = len(member)
        error = h[member] - (n - 1) / n * score / TAU
        differences = error[:, None] - error[None]
        expected["regress"][member] = 2 * differences.sum(1) / (n * (n - 1) / 2 * len(groups))
    for step in POLICY_STEPS:
        logp = batch["logp"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(mopo_objective(**{**batch, "logp": logp}, policy_step=step).loss, logp)
        torch.testing.assert_close(gradient, expected[step], **EXACT)


# -------------------------------------------------------------------------------------------------------- invariances


def assert_same(a, b, order=None):
    """Outputs of one batch in two forms; `order` maps the rows of a to those of b."""
    for name, x in vars(a).items():
        y = getattr(b, name)
        x = x[order] if name in ("logp", "weights") and order is not None else x
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-8 if name == "chi" else 1e-10, atol=1e-12)


@given(batch=batches, policy_step=st.sampled_from(POLICY_STEPS), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=12)
def test_neither_row_order_nor_group_ids_matter(batch, policy_step, seed):
    output = mopo_objective(**batch, policy_step=policy_step)
    order = torch.randperm(len(batch["logp"]), generator=torch.Generator().manual_seed(seed))
    assert_same(output, mopo_objective(**rows(batch, order), policy_step=policy_step), order)
    renamed = {**batch, "group": 10**12 - 7 * batch["group"]}
    assert_same(output, mopo_objective(**renamed, policy_step=policy_step))


@given(batch=batches, shift=st.floats(-50, 50))
@settings(deadline=None, max_examples=12)
def test_a_constant_per_prompt_cancels(batch, shift):
    """Normalisers cancel in contrast and regress; clone, a likelihood, moves by the shift; so do lag ratios cancel."""
    chosen = (batch["group"] == batch["group"][0]).double()
    moved = {**batch, "logp": batch["logp"] + shift * chosen}
    if batch["lag_log_ratio"] is not None:
        moved["lag_log_ratio"] = batch["lag_log_ratio"] + shift * chosen
    loose = {"rtol": 1e-8, "atol": 1e-9}
    for step, change in (("clone", -shift / len(batch["group"].unique())), ("contrast", 0), ("regress", 0)):
        before, after = mopo_objective(**batch, policy_step=step), mopo_objective(**moved, policy_step=step)
        torch.testing.assert_close(after.loss, before.loss + change, **loose)
        torch.testing.assert_close(after.weights, before.weights, **loose)


@given(batch=batches, policy_step=st.sampled_from(POLICY_STEPS))
@settings(deadline=None, max_examples=12)
def test_a_batch_is_the_average_of_its_groups(batch, policy_step):
    parts = [mopo_objective(**rows(batch, member), policy_step=policy_step) for member in members(batch["group"])]
    whole = mopo_objective(**batch, policy_step=policy_step)
    torch.testing.assert_close(whole.loss, torch.stack([part.loss for part in parts]).mean(), **EXACT)
    torch.testing.assert_close(whole.kl, torch.stack([part.kl for part in parts]).mean(), **EXACT)
    win_rates = torch.stack([part.win_rates for part in parts]).nanmean(0)
    torch.testing.assert_close(whole.win_rates, win_rates, equal_nan=True, **EXACT)


def test_one_objective_and_hard_pairs_are_dpo_with_soft_labels_and_ipo():
    h = tensor([0.3, -1.2, 0.4, 2.0])
    arguments = {
        "win_rate": win_rate_from_pairs(tensor([[1.0], [0.0]])),
        "group": torch.tensor([0, 1, 0, 1]),
        "multipliers": torch.ones(1, dtype=torch.float64),
        "tau": TAU,
        "ref_logp": torch.zeros(4, dtype=torch.float64),
    }
    margin = tensor([h[0] - h[2], h[3] - h[1]])  # of the winner over the loser
    soft_label = tensor(1 / TAU).sigmoid()
    dpo = -(soft_label * margin.sigmoid().log() + (1 - soft_label) * (-margin).sigmoid().log()).mean()
    ipo = ((margin - 1 / (2 * TAU)) ** 2).mean()
    torch.testing.assert_close(mopo_objective(h, policy_step="contrast", **arguments).loss, dpo, **EXACT)
    torch.testing.assert_close(mopo_objective(h, policy_step="regress", **arguments).loss, ipo, **EXACT)


@pytest.mark.parametrize("n", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_regress_is_unbiased_under_single_draws_by_enumeration(n):
    """Over all iid draws of n responses and of their labels, the expected gradient vanishes at h = v / tau."""
    mu = tensor([0.5, 0.2, 0.3])
    preference = tensor([[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]])
    pairs = list(itertools.combinations(range(n), 2))
    drawn, win_rates, probability = [], [], []
    for draw in itertools.product(range(3), repeat=n):
        for labels in itertools.product([0.0, 1.0], repeat=len(pairs)):
            chance = math.prod(mu[y].item() for y in draw)
            wins = torch.zeros(n, dtype=torch.float64)
            for (i, j), label in zip(pairs, labels, strict=True):
                p = preference[draw[i], draw[j]].item()
                chance *= p if label else 1 - p
                wins[i] += label
                wins[j] += 1 - label
            drawn.append(draw)
            win_rates.append(wins / (n - 1))
            probability.append(chance)
    response = torch.tensor(drawn).flatten()
    optimum = (preference @ mu / TAU)[response].requires_grad_()
    win_rate = torch.cat(win_rates)[:, None]
    expected = torch.zeros_like(optimum)
    for part in torch.arange(len(optimum)).split(1024 * n):
        loss = mopo_objective(
            optimum[part],
            win_rate[part],
            part // n,
            torch.ones(1, dtype=torch.float64),
            tau=TAU,
            ref_logp=torch.zeros_like(optimum[part]),
            policy_step="regress",
        ).loss
        expected += torch.autograd.grad(loss, optimum)[0] * len(part) / n
    expected *= tensor(probability).repeat_interleave(n)
    per_response = torch.zeros(3, dtype=torch.float64).index_add(0, response, expected)
    torch.testing.assert_close(per_response, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------- kept, dtypes, graph


def test_what_is_not_kept_leaves_the_clone_loss_and_is_reported():
    batch = random_batch(6, [3, 4])
    weights = mopo_objective(**batch).weights
    kept = weights > 0.2
    assert 0 < kept.sum() < len(kept)
    logp = torch.where(kept, batch["logp"], math.nan).requires_grad_()
    output = mopo_objective(**{**batch, "logp": logp}, kept=kept)
    assert output.loss.item() == pytest.approx(-(weights * batch["logp"])[kept].sum().item() / 2)
    assert output.dropped_mass.item() == pytest.approx(weights[~kept].sum().item() / 2)
    (gradient,) = torch.autograd.grad(output.loss, logp)
    torch.testing.assert_close(gradient, torch.where(kept, -weights / 2, 0), **EXACT)


def test_a_log_probability_that_is_not_kept_is_not_blamed():
    batch = random_batch(6, [3, 4])
    kept = torch.arange(7) != 2
    logp = torch.where(kept, batch["logp"], math.nan)
    with pytest.raises(ValueError, match="multipliers must be 1 at the primary"):
        mopo_objective(**{**batch, "logp": logp, "multipliers": 2 * batch["multipliers"]}, kept=kept)
    with pytest.raises(ValueError, match="logp of response 4 is inf"):
        mopo_objective(**{**batch, "logp": logp.index_fill(0, torch.tensor([4]), math.inf)}, kept=kept)


def test_results_are_in_the_callers_dtypes_and_sums_in_float64():
    batch = random_batch(7, [2, 3])
    single = {name: x.float() if name != "group" and torch.is_tensor(x) else x for name, x in batch.items()}
    output = mopo_objective(**{**single, "logp": single["logp"].bfloat16()})
    assert output.loss.dtype == torch.bfloat16
    assert {x.dtype for name, x in vars(output).items() if name not in ("loss", "logp")} == {torch.float32}
    exact = mopo_objective(**batch)
    torch.testing.assert_close(output.weights, exact.weights.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("policy_step", POLICY_STEPS)
def test_compiles_to_one_graph(policy_step, backend):
    if backend == "reference" and policy_step != "clone":
        pytest.skip("the step is the same operations; the statistics' are traced with clone")
    torch._dynamo.reset()  # it compiles a function again only so often
    batch = random_batch(8, [2, 3, 2], unlabelled=0.2)

    def loss_and_weights(logp, win_rate, group):
        arguments = {**batch, "logp": logp, "win_rate": win_rate, "group": group}
        output = mopo_objective(**arguments, policy_step=policy_step)
        return output.loss, output.lower_bounds, mopo_weights(win_rate, group, batch["multipliers"], tau=TAU)

    compiled = torch.compile(loss_and_weights, fullgraph=True, backend="aot_eager")
    arguments = batch["logp"].requires_grad_(), batch["win_rate"], batch["group"]
    for a, b in zip(compiled(*arguments), loss_and_weights(*arguments), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    (gradient,) = torch.autograd.grad(compiled(*arguments)[0], arguments[0])
    (expected,) = torch.autograd.grad(loss_and_weights(*arguments)[0], arguments[0])
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_output_is_a_pytree():
    output = mopo_objective(**random_batch(9, [2]))
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, output)
    assert type(doubled) is type(output)
    torch.testing.assert_close(doubled.weights, 2 * output.weights)
