"""The robust bound against golden cases, its definition as a maximum over chi, and what it refuses."""

import itertools
import math

import pytest
import torch
from golden_cases import golden, tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from mopo_kernels.objective import robust
from mopo_kernels.objective.robust import robust_bound

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # two float64 evaluation orders of the same sums


@pytest.mark.parametrize("case", golden("robust"))
def test_golden_robust_bound(case):
    bound, chi = robust_bound(tensor(case["values"]), tensor(case["ref_weights"]), case["eps"])
    assert bound.item() == pytest.approx(case["lower_bound"], abs=case["tol"]["bound"])
    assert chi.item() == pytest.approx(case["chi"], rel=case["tol"]["chi_rel"])


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 40),
    log_eps=st.floats(-12, 0.5),
)
@settings(deadline=None, max_examples=25)
def test_bound_is_the_maximum_over_chi(seed, size, log_eps):
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.rand(size, generator=generator, dtype=torch.float64)
    ref_weights = torch.rand(size, generator=generator, dtype=torch.float64).softmax(0)
    eps = 10**log_eps
    bound, chi = robust_bound(values, ref_weights, eps)

    def negative(log_chi):
        c = math.exp(log_chi)
        return c * ((ref_weights * (-(values - values.min()) / c).exp()).sum().log().item() + eps) - values.min().item()

    best = minimize_scalar(negative, bounds=(-12, 25), method="bounded", options={"xatol": 1e-10})
    assert bound.item() == pytest.approx(max(-best.fun, values.min().item()), abs=1e-6)
    assert values.min() <= bound <= (values * ref_weights).sum()
    if chi > 0:
        assert -negative(math.log(chi)) == pytest.approx(bound.item(), abs=1e-9)


def test_bound_without_a_ball_is_the_mean_and_with_a_wide_one_the_minimum():
    values, ref_weights = tensor([0.2, 0.7, 1.0]), tensor([0.25, 0.25, 0.5])
    assert [x.item() for x in robust_bound(values, ref_weights, 0.0)] == [pytest.approx(0.725), math.inf]
    assert [x.item() for x in robust_bound(values, ref_weights, math.log(4) + 1e-9)] == [0.2, 0.0]
    just_inside, chi = robust_bound(values, ref_weights, math.log(4) - 1e-3)
    assert 0.2 < just_inside < 0.21
    assert chi > 0


def test_bound_of_a_constant_is_the_constant():
    values, ref_weights = torch.full((4,), 0.3, dtype=torch.float64), tensor([0.1, 0.2, 0.3, 0.4])
    for eps in (0.0, 1e-12, 0.1, 3.0):
        assert robust_bound(values, ref_weights, eps)[0].item() == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize("eps", [0.1, 1.0])  # 1.0: the ball reaches the smallest value that has weight
def test_bound_ignores_values_without_weight(eps):
    with_ghost = robust_bound(tensor([-5.0, 0.4, 0.9]), tensor([0.0, 0.5, 0.5]), eps)
    without = robust_bound(tensor([0.4, 0.9]), tensor([0.5, 0.5]), eps)
    torch.testing.assert_close(with_ghost, without, **EXACT)


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 0.15])
def test_newton_takes_a_few_steps(monkeypatch, eps):
    """From the paper's radius down to the automatic one; a wrong slope would take dozens."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ref_weights = torch.full_like(values, 1e-3)
    expected = robust_bound(values, ref_weights, eps)
    monkeypatch.setattr(robust, "MAX_ROOT_STEPS", 6)
    torch.testing.assert_close(robust_bound(values, ref_weights, eps), expected, rtol=1e-8, atol=0)


def test_bounds_of_a_stack_are_those_of_its_rows():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64)
    ref_weights = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64).softmax(-1)
    ref_weights[0, 0] = tensor([1 - 8e-9] + [1e-9] * 8)  # its ball reaches the minimum long after the others'
    bound, chi = robust_bound(values, ref_weights, 0.05)
    for i, j in itertools.product(range(2), range(3)):
        row = robust_bound(values[i, j], ref_weights[i, j], 0.05)
        torch.testing.assert_close((bound[i, j], chi[i, j]), row, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.1, 5.0])
def test_bound_is_differentiable_by_the_envelope_theorem(eps):
    values = tensor([0.1, 0.5, 0.8, 0.9]).requires_grad_()
    weights = tensor([0.3, -0.2, 0.4, 0.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: robust_bound(v, w.softmax(0), eps)[0], (values, weights))


def test_chi_op_is_registered_properly():
    arguments = (torch.rand(3, 5, dtype=torch.float64), torch.full((3, 5), 0.2, dtype=torch.float64), 0.1)
    torch.library.opcheck(torch.ops.mopo_kernels.solve_chi.default, arguments)


@pytest.mark.parametrize(
    ("values", "ref_weights", "eps", "message"),
    [
        ([0.1, 0.2], [0.5, 0.6], 0.1, "ref_weights must be >= 0 and sum to 1"),
        ([0.1, 0.2], [1.5, -0.5], 0.1, "ref_weights must be >= 0 and sum to 1"),
        ([0.1, 0.2], [1.0], 0.1, "must be floating-point tensors of one shape"),
        ([0.1, math.nan], [0.5, 0.5], 0.1, "values must be finite"),
        ([0.1, 0.2], [0.5, 0.5], -1.0, "eps must be a number >= 0"),
    ],
)
def test_bad_samples_are_named(values, ref_weights, eps, message):
    with pytest.raises(ValueError, match=message):
        robust_bound(torch.tensor(values), torch.tensor(ref_weights), eps)
