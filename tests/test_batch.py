"""The batch contract of every backend against plain torch in float64: ragged groups and rows, poison, threads, graphs.

`mopo_objective` on the reference backend is the truth (test_objective.py holds it to golden cases); inputs are widened
by both sides, so that only the order of float64 sums differs.
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mopo_kernels import backends, mopo_loss, mopo_objective, sequence_logprob
from mopo_kernels.backends import reference, triton
from mopo_kernels.backends.batch import ObjectiveValues
from mopo_kernels.objective_ops import objective as objective_op
from mopo_kernels.objective_ops import sequence_sums as sequence_sums_op

STEPS = ("clone", "contrast", "regress")
FLOATS = [torch.float32, torch.float64]
IGNORE = -100
SUMS = {"rtol": 1e-10, "atol": 1e-12}  # two float64 evaluation orders
CHI = {"rtol": 1e-7, "atol": 1e-9}  # a KL near 1e-6 cancels to 1e-10, one that saturates hardly moves with chi


@pytest.fixture(params=["cpu", "cuda", "triton"], scope="module")
def backend(request):
    try:
        return backends.choose("objective", device_of(request.param), request.param).backend
    except ValueError as error:
        pytest.skip(str(error))


def device_of(backend):
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


@pytest.fixture(scope="module")
def fast_backend(backend):
    """One that runs hundreds of examples in no time."""
    if backend == "triton" and triton.INTERPRETED:
        pytest.skip("the interpreter runs fewer of them, in test_triton.py")
    return backend


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """Whatever torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_batch(
    seed, sizes, objectives=3, *, labels="uniform", unlabelled=0.0, lag=True, kept=False, dtypes=(torch.float64,)
):
    """Positional arguments of `objective` for groups of the given sizes, in random row order and with odd ids."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)

    def floats(*shape, draw=torch.randn):
        dtype = dtypes[int(torch.randint(len(dtypes), (), generator=generator))]
        return draw(*shape, generator=generator, dtype=dtype)

    win_rate = floats(count, objectives, draw=torch.rand)
    win_rate = {"uniform": win_rate, "hard": win_rate.round(), "equal": torch.full_like(win_rate, 0.5)}[labels]
    win_rate[torch.rand(count, objectives, generator=generator) < unlabelled] = math.nan
    multipliers = floats(objectives, draw=torch.rand)
    multipliers[0] = 1
    ids = torch.randperm(1000, generator=generator)[: len(sizes)] * (2**40 + 1) - 2**45
    order = torch.randperm(count, generator=generator)
    return (
        floats(count),
        win_rate,
        ids.repeat_interleave(torch.tensor(sizes))[order],
        multipliers,
        floats(count),
        floats(count) if lag else None,
        torch.rand(count, generator=generator) < 0.6 if kept else None,
    )


batches = st.builds(
    random_batch,
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=7),
    objectives=st.integers(1, 5),
    labels=st.sampled_from(["uniform", "hard", "equal"]),
    unlabelled=st.sampled_from([0.0, 0.3, 0.9]),
    lag=st.booleans(),
    dtypes=st.just(FLOATS),
)


def moved(batch, backend):
    return tuple(x if x is None else x.to(device_of(backend)) for x in batch)


def values_of(batch, backend, **options):
    """What the backend computes, on the CPU, from inputs with poison in what must not be read."""
    logp, win_rate, group, multipliers, ref_logp, lag, kept = batch
    if kept is not None:
        logp, ref_logp = (x.masked_fill(~kept, math.nan) for x in (logp, ref_logp))
    poisoned = moved((logp, win_rate, group, multipliers, ref_logp, lag, kept), backend)
    buffer = backends.batch(backend).objective(*poisoned, **{"primary": 0, **options})
    assert buffer.dtype == torch.float64
    assert buffer.shape == (ObjectiveValues.size(*win_rate.shape),)
    return ObjectiveValues.unpack(buffer.cpu(), *win_rate.shape)


def expected_of(batch, **options):
    """The same in plain torch, with the gradient from autograd."""
    logp, win_rate, group, multipliers, ref_logp, lag, kept = (
        x.double() if x is not None and x.is_floating_point() else x for x in batch
    )
    logp = logp.requires_grad_()
    output = mopo_objective(
        *(logp, win_rate, group, multipliers),
        ref_logp=ref_logp,
        lag_log_ratio=lag,
        kept=kept,
        backend="reference",
        **options,
    )
    (gradient,) = torch.autograd.grad(output.loss, logp)
    fields = {name: getattr(output, name).detach() for name in ObjectiveValues._fields if hasattr(output, name)}
    return ObjectiveValues(**fields, gradient=gradient, valid=torch.tensor(1.0).double())


def assert_same(values, expected):
    for name, x, y in zip(ObjectiveValues._fields, values, expected, strict=True):
        tolerance = CHI if name == "chi" else SUMS
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --------------------------------------------------------------------------------------------------------- objective


@given(
    batch=batches,
    tau=st.sampled_from([0.08, 0.3, 2.0]),
    eps=st.sampled_from([0.0, 1e-6, 0.01, 0.15, 1.3, 50.0]),
    policy_step=st.sampled_from(STEPS),
    normalize=st.sampled_from(["group", "none"]),
)
@settings(deadline=None, max_examples=30 if torch.cuda.is_available() else 300)  # Triton compiles most examples anew
def test_objective_is_what_plain_torch_computes(fast_backend, batch, **options):
    # Equal labels give ratios that differ by rounding alone, much of it without normalisation, and χ is their spread.
    assume(options["normalize"] == "group" or batch[1].nan_to_num(nan=0.5).unique().numel() > 1)
    assert_same(values_of(batch, fast_backend, **options), expected_of(batch, **options))


@given(seed=st.integers(0, 10**6), normalize=st.sampled_from(["group", "none"]))
@settings(deadline=None, max_examples=50)
def test_what_is_not_kept_is_neither_read_nor_counted(fast_backend, seed, normalize):
    batch = random_batch(seed, [2, 3, 4, 2], kept=True, dtypes=FLOATS)
    options = {"tau": 0.3, "eps": 0.02, "policy_step": "clone", "normalize": normalize}
    assert_same(values_of(batch, fast_backend, **options), expected_of(batch, **options))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2], id="one pair"),
        pytest.param([2] * 600, id="pairs of more threads than a block has"),
        pytest.param([1500], id="one large group"),
        pytest.param([2, 900, 3, 257], id="very unequal groups"),
    ],
)
@pytest.mark.parametrize("policy_step", STEPS)
def test_groups_of_any_number_and_size(backend, sizes, policy_step):
    batch = random_batch(1, sizes, unlabelled=0.2)
    options = {"tau": 0.3, "eps": 0.15, "policy_step": policy_step, "normalize": "group"}
    assert_same(values_of(batch, backend, **options), expected_of(batch, **options))


def test_scores_of_hundreds_neither_overflow_nor_lose_the_loser(backend):
    logp, _, _, _, ref_logp, _, _ = random_batch(2, [2])
    win_rate, multipliers = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 70.0])
    batch = (logp, win_rate, torch.tensor([5, 5]), multipliers, ref_logp, torch.tensor([900.0, 900.0]), None)
    values = values_of(batch, backend, tau=0.1, eps=0.1, policy_step="clone", normalize="group")
    torch.testing.assert_close(values.weights.log(), torch.tensor([0.0, -710.0]).double(), rtol=1e-12, atol=1e-12)
    assert values.loss.isfinite()
    assert values.lower_bounds.isfinite().all()


def test_contrast_takes_log_ratios_of_thousands(backend):
    batch = list(random_batch(3, [2, 3]))
    batch[0] = batch[0] * 1e4
    options = {"tau": 0.3, "eps": 0.0, "policy_step": "contrast", "normalize": "group"}
    assert_same(values_of(batch, backend, **options), expected_of(batch, **options))


def test_a_wide_ball_reaches_the_smallest_value(backend):
    values = values_of(
        random_batch(4, [2, 2], labels="hard"), backend, tau=1.0, eps=9.0, policy_step="clone", normalize="group"
    )
    assert (values.chi == 0).all()


@pytest.mark.parametrize("policy_step", STEPS)
def test_the_same_input_gives_the_same_bits(backend, policy_step):
    batch = moved(random_batch(5, [2, 3, 5] * 40, unlabelled=0.2), backend)
    run = backends.batch(backend).objective
    options = {"tau": 0.3, "eps": 0.1, "policy_step": policy_step, "normalize": "group", "primary": 0}
    first = run(*batch, **options)
    assert all(torch.equal(run(*batch, **options), first) for _ in range(3))


# ------------------------------------------------------------------------------------------------------ valid values


def changed(position, index, value):
    """A batch whose argument at `position` holds `value` at `index`."""
    batch = random_batch(6, [2, 3])
    batch[position][index] = value
    return batch


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(changed(0, 3, math.nan), id="logp NaN"),
        pytest.param(changed(0, 4, -math.inf), id="logp -inf"),
        pytest.param(changed(1, (4, 2), 1.0000001), id="win rate above 1"),
        pytest.param(changed(1, (0, 0), -1e-9), id="win rate below 0"),
        pytest.param(changed(1, (2, 1), math.inf), id="win rate inf"),
        pytest.param(changed(2, 0, 7), id="a group of one"),
        pytest.param(changed(3, 2, -0.1), id="multiplier below 0"),
        pytest.param(changed(3, 1, math.inf), id="multiplier inf"),
        pytest.param(changed(3, 1, math.nan), id="multiplier NaN"),
        pytest.param(changed(3, 0, 1.5), id="multiplier of the primary"),
        pytest.param(changed(4, 1, math.inf), id="ref_logp inf"),
        pytest.param(changed(5, 2, math.nan), id="lag NaN"),
    ],
)
def test_bad_values_are_flagged_and_named_as_the_reference_names_them(backend, batch):
    options = {"tau": 0.3, "eps": 0.02, "policy_step": "regress", "normalize": "group"}
    assert values_of(batch, backend, **options).valid == 0

    def message(name):
        logp, win_rate, group, multipliers, ref_logp, lag, _ = moved(batch, backend)
        with pytest.raises(ValueError, match=r"must|one response|logp of response") as error:
            mopo_objective(
                *(logp, win_rate, group, multipliers), ref_logp=ref_logp, lag_log_ratio=lag, backend=name, **options
            )
        return str(error.value)

    assert message(backend) == message("reference")


def test_more_objectives_than_responses_are_all_checked(backend):
    batch = random_batch(7, [2], objectives=6)
    options = {"tau": 0.3, "eps": 0.0, "policy_step": "clone", "normalize": "group"}
    assert values_of(batch, backend, **options).valid == 1
    batch[3][5] = -1
    assert values_of(batch, backend, **options).valid == 0


def test_the_multiplier_of_another_primary_may_be_the_one(backend):
    batch = random_batch(8, [2, 2])
    batch[3][:] = torch.tensor([0.3, 0.2, 1.0])
    options = {"tau": 0.3, "eps": 0.0, "policy_step": "clone", "normalize": "group"}
    assert values_of(batch, backend, primary=2, **options).valid == 1
    assert values_of(batch, backend, primary=0, **options).valid == 0


def test_a_refusal_that_no_check_explains_is_an_internal_error(backend, monkeypatch):
    module = backends.batch(backend)
    run = module.objective

    def refusing(*arguments, **options):
        buffer = run(*arguments, **options)
        ObjectiveValues.unpack(buffer, *arguments[1].shape).valid.zero_()
        return buffer

    monkeypatch.setattr(module, "objective", refusing)
    logp, win_rate, group, multipliers, *_ = moved(random_batch(9, [2, 2]), backend)
    with pytest.raises(RuntimeError, match="nothing is wrong"):
        mopo_objective(logp, win_rate, group, multipliers, tau=0.3, backend=backend)


# ----------------------------------------------------------------------------------------------- objective as torch op


@pytest.mark.parametrize("policy_step", STEPS)
@pytest.mark.parametrize("dtypes", [[torch.float32], FLOATS], ids=["float32", "mixed"])
def test_opcheck_of_the_objective(backend, policy_step, dtypes):
    batch = moved(random_batch(10, [2, 3, 2], dtypes=dtypes, kept=policy_step == "clone"), backend)
    batch[0].requires_grad_()
    if policy_step != "clone":
        batch[4].requires_grad_()
    torch.library.opcheck(objective_op, (*batch, 0.3, 0.02, policy_step, "group", 0, backend))


@pytest.mark.parametrize("policy_step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_by_logp_and_ref_logp(backend, policy_step, dtype):
    logp, win_rate, group, multipliers, ref_logp, lag, _ = moved(random_batch(11, [2, 3, 4]), backend)

    def gradients(name):
        inputs = [x.to(dtype).detach().requires_grad_() for x in (logp, ref_logp)]
        loss = mopo_objective(
            *(inputs[0], win_rate, group, multipliers),
            ref_logp=inputs[1],
            lag_log_ratio=lag,
            tau=0.3,
            policy_step=policy_step,
            backend=name,
        ).loss
        assert loss.dtype == dtype
        return torch.autograd.grad(3 * loss, inputs, allow_unused=policy_step == "clone")

    for x, y in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(x, y, **({"rtol": 2**-7, "atol": 2**-9} if dtype == torch.bfloat16 else {}))


def test_outputs_are_the_callers(backend):
    """Changing what mopo_objective returned does not change the gradient that is still to come."""
    logp, win_rate, group, multipliers, *_ = moved(random_batch(12, [2, 3]), backend)
    logp.requires_grad_()
    output = mopo_objective(logp, win_rate, group, multipliers, tau=0.3, backend=backend)
    weights = output.weights.clone()
    for x in (output.weights, output.win_rates, output.ess):
        x.zero_()
    output.loss.backward()
    torch.testing.assert_close(logp.grad, -weights / 2, **SUMS)


def test_inputs_may_have_any_strides(backend):
    batch = random_batch(13, [2, 3, 4], lag=True)
    spread = [x.repeat_interleave(3, 0)[::3] for x in batch[:-1]]
    spread[1] = batch[1].T.contiguous().T
    assert not any(x.is_contiguous() for x in spread)
    arguments = (0.3, 0.02, "contrast", "group", 0, backend)
    _, values = objective_op(*moved(spread, backend), None, *arguments)
    _, expected = objective_op(*moved(batch, backend), *arguments)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("policy_step", STEPS)
def test_compiled_whole_it_computes_the_same_and_looks_at_no_value(backend, policy_step):
    logp, win_rate, group, multipliers, ref_logp, lag, _ = moved(random_batch(14, [2, 3, 2]), backend)

    def outputs(logp, win_rate):
        output = mopo_objective(
            *(logp, win_rate, group, multipliers),
            ref_logp=ref_logp,
            lag_log_ratio=lag,
            tau=0.3,
            eps=0.05,
            policy_step=policy_step,
            backend=backend,
        )
        return output.loss, output.weights, output.lower_bounds

    logp.requires_grad_()
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(logp, win_rate), outputs(logp, win_rate), strict=True):
        assert torch.equal(x, y)
    gradients = [torch.autograd.grad(f(logp, win_rate)[0], logp)[0] for f in (compiled, outputs)]
    assert torch.equal(*gradients)
    compiled(logp, win_rate + 1)


def test_tensors_on_several_devices_are_refused(backend):
    logp, win_rate, group, multipliers, *_ = moved(random_batch(15, [2]), backend)
    with pytest.raises(ValueError, match=f"group is on meta and logp on {logp.device}"):
        mopo_objective(logp, win_rate, group.to("meta"), multipliers, tau=0.3, backend=backend)


# ------------------------------------------------------------------------------------------------------ sequence sums


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(0, 9),
    columns=st.integers(0, 70),
    counted=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(FLOATS),
)
@settings(deadline=None, max_examples=100)
def test_sequence_sums_are_of_the_positions_that_count(backend, seed, rows, columns, counted, dtype):
    generator = torch.Generator().manual_seed(seed)
    # Slices of wider tensors: rows lie further apart than they are long.
    logp = torch.randn(rows, columns + 3, generator=generator, dtype=dtype)[:, 2:-1]
    target = torch.randint(0, 50, (rows, columns + 1), generator=generator)[:, 1:]
    target[torch.rand(rows, columns, generator=generator) >= counted] = IGNORE
    expected, expected_counts = reference.sequence_sums(logp, target, IGNORE)
    poisoned = logp.masked_fill_(target == IGNORE, math.nan)
    sums, counts = backends.batch(backend).sequence_sums(*moved((poisoned, target), backend), IGNORE)
    torch.testing.assert_close(sums.cpu(), expected, **SUMS)
    assert torch.equal(counts.cpu(), expected_counts)


def test_sequence_sums_by_any_strides_and_integers(backend):
    logp = torch.randn(5, 4).T
    target = torch.tensor([[1, 2, IGNORE, 3, 7]], dtype=torch.int32).expand(4, 5)
    sums, counts = sequence_sums_op(*moved((logp, target.long()), backend), IGNORE, backend)
    torch.testing.assert_close(sums.cpu(), logp[:, [0, 1, 3, 4]].sum(1).double(), rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [4] * 4


def test_sums_of_many_small_terms_are_float64(backend):
    logp = torch.full((1, 2**20), -0.1)
    sums, _ = backends.batch(backend).sequence_sums(*moved((logp, torch.zeros(1, 2**20).long()), backend), IGNORE)
    assert sums.item() == pytest.approx(logp[0, 0].double().item() * 2**20, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_and_gradients_of_the_sums(backend, dtype):
    logp = torch.randn(3, 5, dtype=dtype, device=device_of(backend)).requires_grad_()
    target = torch.tensor([[IGNORE, 1, 2, 3, IGNORE], [IGNORE] * 5, [1] * 5], device=device_of(backend))
    torch.library.opcheck(sequence_sums_op, (logp, target, IGNORE, backend))
    upstream = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64, device=device_of(backend))
    (gradient,) = torch.autograd.grad(sequence_sums_op(logp, target, IGNORE, backend)[0], logp, upstream)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.where(target != IGNORE, upstream[:, None], 0).to(dtype))


def test_threads_change_no_bit():
    backends.choose("objective", "cpu", "cpu")
    batch = random_batch(16, [2, 3, 5] * 100)
    logp, target = torch.randn(37, 501), torch.randint(0, 3, (37, 501))
    cpu = backends.batch("cpu")

    def results():
        values = cpu.objective(*batch, tau=0.3, eps=0.1, policy_step="contrast", normalize="group", primary=0)
        return values, *cpu.sequence_sums(logp, target, 0)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        assert all(torch.equal(x, y) for x, y in zip(results(), one, strict=True))
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- where it is used


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprob_sums_by_the_backend(backend, average):
    hidden, weight = torch.randn(3, 6, 4, device=device_of(backend)), torch.randn(9, 4, device=device_of(backend))
    target = torch.randint(0, 9, (3, 6), device=device_of(backend))
    target[0, 2:], target[1] = IGNORE, IGNORE
    results = [sequence_logprob(hidden, weight, target, average=average, backend=x) for x in (backend, "reference")]
    torch.testing.assert_close(*results)
    assert results[0][1] == 0


def test_mopo_loss_on_the_reference_backend_is_differentiable_twice():
    _, win_rate, group, multipliers, ref_logp, *_ = random_batch(17, [2, 2])
    hidden = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64)
    target = torch.randint(0, 5, (4, 2))

    def loss(hidden):
        arguments = (hidden, weight, target, win_rate, group, multipliers)
        return mopo_loss(
            *arguments, tau=0.5, ref_logp=ref_logp, policy_step="contrast", min_weight=0, backend="reference"
        ).loss

    assert torch.autograd.gradgradcheck(loss, hidden)
