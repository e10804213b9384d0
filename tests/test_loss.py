"""mopo_loss: it must be the composition of its parts, whatever is left out of the product."""

import pytest
import torch
from dispatch import Operations

from mopo_kernels import mopo_loss, mopo_objective, mopo_weights, sequence_logprob, win_rate_from_pairs
from mopo_kernels.loss import policy_loss
from mopo_kernels.objective.target import label_statistics

B, L, H, V, K = 6, 5, 8, 31, 3
TAU = 0.08


def batch(*, seed=0, hard=True):
    generator = torch.Generator().manual_seed(seed)
    preference = torch.rand(B // 2, K, generator=generator, dtype=torch.float64)
    target = torch.randint(0, V, (B, L), generator=generator)
    target[:, 0] = -100
    target[1, 3:] = -100
    return {
        "hidden": torch.randn(B, L, H, generator=generator, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_(),
        "target": target,
        "win_rate": win_rate_from_pairs(preference.round() if hard else preference),
        "group": torch.arange(B // 2).repeat(2),
        "multipliers": torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64),
    }


def composed(b, policy_step, ref_logp=None, eps=0.0):
    """The loss through [B] log-probs of every sequence, nothing left out."""
    logp = sequence_logprob(b["hidden"], b["weight"], b["target"])
    labels = (b["win_rate"], b["group"], b["multipliers"])
    return mopo_objective(logp, *labels, tau=TAU, eps=eps, ref_logp=ref_logp, policy_step=policy_step)


def gradients(output, b):
    return torch.autograd.grad(output.loss, (b["hidden"], b["weight"]))


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_equals_the_composition_of_its_parts(policy_step):
    b = batch(hard=False)
    ref_logp = torch.randn(B, dtype=torch.float64)
    fused = mopo_loss(**b, tau=TAU, eps=0.02, ref_logp=ref_logp, policy_step=policy_step, min_weight=0.0)
    parts = composed(b, policy_step, ref_logp, eps=0.02)
    for name in ("loss", "logp", "weights", "win_rates", "lower_bounds", "chi", "ess", "kl", "dropped_mass"):
        torch.testing.assert_close(getattr(fused, name), getattr(parts, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(fused, b), gradients(parts, b), rtol=1e-11, atol=1e-12)


def test_dropped_sequences_change_the_loss_by_their_mass_only():
    b = batch()
    output = mopo_loss(**b, tau=TAU, min_weight=1e-3)
    weights = mopo_weights(b["win_rate"], b["group"], b["multipliers"], tau=TAU)
    dropped = weights <= 1e-3
    assert dropped.any()
    assert torch.equal(output.logp.isnan(), dropped)
    torch.testing.assert_close(output.dropped_mass, weights[dropped].sum() / 3)
    logp = sequence_logprob(b["hidden"], b["weight"], b["target"])
    torch.testing.assert_close(output.loss, -(weights * logp)[~dropped].sum() / 3)
    grad_hidden, _ = gradients(output, b)
    assert (grad_hidden[dropped] == 0).all()
    assert (grad_hidden[~dropped] != 0).any()


def test_a_sequence_of_just_the_least_weight_is_dropped():
    b = batch()
    b["win_rate"] = torch.full_like(b["win_rate"], 0.5)
    assert mopo_loss(**b, tau=TAU, min_weight=0.5).logp.isnan().all()
    assert mopo_loss(**b, tau=TAU, min_weight=0.499).logp.isfinite().all()


def test_dropped_sequences_are_never_read():
    b = batch()
    dropped = mopo_weights(b["win_rate"], b["group"], b["multipliers"], tau=TAU) <= 1e-3
    expected = mopo_loss(**b, tau=TAU, min_weight=1e-3)
    poisoned = b["hidden"].detach().clone()
    poisoned[dropped] = float("nan")
    output = mopo_loss(**{**b, "hidden": poisoned.requires_grad_()}, tau=TAU, min_weight=1e-3)
    assert output.loss == expected.loss
    assert torch.autograd.grad(output.loss, b["weight"])[0].isfinite().all()


def test_index_stands_for_the_sequences_that_are_there():
    b = batch()
    whole = mopo_loss(**b, tau=TAU, min_weight=1e-3)
    index = (~whole.logp.isnan()).nonzero().squeeze(-1).flip(0)  # any order
    part = {**b, "hidden": b["hidden"].detach()[index].requires_grad_(), "target": b["target"][index]}
    output = mopo_loss(**part, tau=TAU, min_weight=1e-3, index=index)
    torch.testing.assert_close(output.loss, whole.loss)
    torch.testing.assert_close(output.logp, whole.logp, equal_nan=True)
    torch.testing.assert_close(output.dropped_mass, whole.dropped_mass)
    torch.testing.assert_close(gradients(output, part)[0], gradients(whole, b)[0][index])


def test_a_heavy_sequence_that_index_leaves_out_is_dropped_and_reported():
    b = batch(hard=False)
    weights = mopo_weights(b["win_rate"], b["group"], b["multipliers"], tau=TAU)
    heavy = int(weights.argmax())
    index = torch.tensor([i for i in range(B) if i != heavy])
    part = {**b, "hidden": b["hidden"].detach()[index].requires_grad_(), "target": b["target"][index]}
    output = mopo_loss(**part, tau=TAU, min_weight=0.0, index=index)
    assert output.logp.isnan().nonzero().tolist() == [[heavy]]
    torch.testing.assert_close(output.dropped_mass, weights[heavy] / 3)
    logp = sequence_logprob(b["hidden"], b["weight"], b["target"])
    torch.testing.assert_close(output.loss, -(weights * logp)[index].sum() / 3)


def test_padding_and_batch_order_do_not_matter():
    b = batch(hard=False)
    expected = mopo_loss(**b, tau=TAU)
    padded = {
        **b,
        "hidden": torch.cat([b["hidden"], torch.full((B, 3, H), float("nan"), dtype=torch.float64)], 1),
        "target": torch.nn.functional.pad(b["target"], (0, 3), value=-100),
    }
    torch.testing.assert_close(mopo_loss(**padded, tau=TAU).loss, expected.loss)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {k: v[order] if v.shape[0] == B else v for k, v in b.items()}
    torch.testing.assert_close(mopo_loss(**shuffled, tau=TAU).loss, expected.loss)


def test_the_reference_backend_is_plain_torch_throughout():
    with Operations() as operations:
        mopo_loss(**batch(), tau=TAU, backend="reference")
    assert {x.namespace for x in operations.all} <= {"aten", "prim", "prims"}


def test_average_divides_by_the_tokens_that_count():
    b = batch(hard=False)
    logp = sequence_logprob(b["hidden"], b["weight"], b["target"], average=True)
    labels = (b["win_rate"], b["group"], b["multipliers"])
    expected = mopo_objective(logp, *labels, tau=TAU).loss
    torch.testing.assert_close(mopo_loss(**b, tau=TAU, average=True, min_weight=0.0).loss, expected)


def test_head_options_reach_the_head():
    b = batch(hard=False)
    options = {"bias": torch.randn(V, dtype=torch.float64), "softcap": 3.0, "temperature": 0.9, "logit_scale": 0.5}
    logp = sequence_logprob(b["hidden"], b["weight"], b["target"], **options)
    labels = (b["win_rate"], b["group"], b["multipliers"])
    expected = mopo_objective(logp, *labels, tau=TAU).loss
    torch.testing.assert_close(mopo_loss(**b, tau=TAU, min_weight=0.0, **options).loss, expected)


@pytest.mark.parametrize(
    ("policy_step", "compiled"), [("clone", False), ("clone", True), ("contrast", False), ("regress", False)]
)
def test_statistics_that_are_there_already_give_the_same_loss(policy_step, compiled):
    """Bit for bit; a clone step with `index`, as a trainer does that leaves sequences out before the model runs."""
    b = batch()
    ref_logp, bias = torch.linspace(-9, -5, B), torch.linspace(-1, 1, V, dtype=torch.float64)
    labels = {name: b[name] for name in ("win_rate", "group", "multipliers")}
    statistics = label_statistics(**labels, tau=TAU, eps=0.02)
    index = (statistics.weights > 0.1).nonzero()[:, 0].int() if policy_step == "clone" else torch.arange(B)
    head = {"hidden": b["hidden"].detach()[index].requires_grad_(), "weight": b["weight"], "target": b["target"][index]}
    options = {"policy_step": policy_step, "ref_logp": ref_logp, "min_weight": 0.1, "average": True, "bias": bias}
    options |= {"softcap": 3.0, "temperature": 0.9, "logit_scale": 0.5, "workspace_bytes": 2000}
    options |= {"index": index} if policy_step == "clone" else {}
    expected = mopo_loss(**head, **labels, tau=TAU, eps=0.02, **options)

    def run(hidden, weight, target, statistics):
        return policy_loss(hidden, weight, target, statistics, **options)

    torch._dynamo.reset()
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    output = run(*head.values(), statistics)
    exact = {"rtol": 0, "atol": 0} if not compiled else {"rtol": 1e-12, "atol": 1e-14}
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(output, name), value, equal_nan=True, **exact)
    torch.testing.assert_close(gradients(output, head), gradients(expected, head), **exact)


def test_an_option_that_the_head_does_not_have_is_named():
    b = batch()
    statistics = label_statistics(b["win_rate"], b["group"], b["multipliers"], tau=TAU)
    with pytest.raises(
        TypeError, match=r"policy_loss\(\) has no option 'grad_samplin'; those of the head: average, bias"
    ):
        policy_loss(b["hidden"], b["weight"], b["target"], statistics, grad_samplin=0.1)


def test_example_of_the_docstring_trains():
    """A few plain gradient steps on hidden states alone must raise the preferred responses' log-probs."""
    b = batch()
    optimizer = torch.optim.SGD([b["weight"]], lr=0.05)
    first = mopo_loss(**b, tau=TAU)
    for _ in range(20):
        optimizer.zero_grad()
        mopo_loss(**b, tau=TAU).loss.backward()
        optimizer.step()
    last = mopo_loss(**b, tau=TAU)
    assert last.loss < first.loss - 1
    kept = ~first.logp.isnan()
    assert (last.logp - first.logp)[kept].mean() > 1


def test_nan_hidden_states_are_named_before_the_loss():
    b = batch(hard=False)
    b["hidden"].data[2, 1] = float("nan")
    with pytest.raises(ValueError, match="hidden holds NaN"):
        mopo_loss(**b, tau=TAU, min_weight=0.0)


def test_vmap_is_refused_by_name():
    labels = torch.rand(4, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 1]), torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"mopo_objective .* torch.func.vmap hides"):
        torch.func.vmap(lambda logp: mopo_objective(logp, *labels, tau=1.0).loss)(torch.randn(3, 4))
