"""The batch contract of every backend against plain torch in float64: ragged groups and rows, poison, threads, graphs.

`TargetPolicy` is the truth (test_objective.py holds it to golden cases); inputs are widened by both sides, so that only
the order of float64 sums differs.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopo_kernels import backends, sequence_logprob
from mopo_kernels.backends import reference, triton
from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.objective.ops import measure_labels, sequence_sums
from mopo_kernels.objective.target import label_statistics, torch_statistics

FLOATS = [torch.float32, torch.float64]
IGNORE = -100
SUMS = {"rtol": 1e-10, "atol": 1e-12}  # two float64 evaluation orders
CHI = {"rtol": 1e-7, "atol": 1e-9}  # a KL near 1e-6 cancels to 1e-10, one that saturates hardly moves with chi


@pytest.fixture(params=["cpu", "cuda", "triton"], scope="module")
def backend(request):
    """Triton's interpreter has fewer examples, in test_triton.py."""
    if request.param == "triton" and triton.INTERPRETED:
        pytest.skip("interpreted in test_triton.py")
    try:
        return backends.choose("label_statistics", device_of(request.param), request.param).backend
    except ValueError as error:
        pytest.skip(str(error))


def device_of(backend):
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory():
    """Whatever torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_labels(
    seed, sizes, objectives=3, *, kind="uniform", unlabelled=0.0, lag=True, tau=0.3, eps=0.02, dtypes=(torch.float64,)
):
    """Labels of groups of the given sizes, in random row order and with odd ids."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)

    def floats(*shape, draw=torch.randn):
        dtype = dtypes[int(torch.randint(len(dtypes), (), generator=generator))]
        return draw(*shape, generator=generator, dtype=dtype)

    win_rate = floats(count, objectives, draw=torch.rand)
    win_rate = {"uniform": win_rate, "hard": win_rate.round(), "equal": torch.full_like(win_rate, 0.5)}[kind]
    win_rate[torch.rand(count, objectives, generator=generator) < unlabelled] = math.nan
    multipliers = floats(objectives, draw=torch.rand)
    multipliers[0] = 1
    ids = torch.randperm(1000, generator=generator)[: len(sizes)] * (2**40 + 1) - 2**45
    group = ids.repeat_interleave(torch.tensor(sizes))[torch.randperm(count, generator=generator)]
    return Labels(win_rate, group, multipliers, floats(count) if lag else None, tau, eps, 0)


def moved(labels, backend):
    device = device_of(backend)
    return Labels(*(x.to(device) if torch.is_tensor(x) else x for x in labels))


def values_of(labels, backend):
    """slot and values that the backend computes, on the CPU."""
    slot, buffer = backends.batch(backend).label_statistics(moved(labels, backend))
    assert buffer.dtype == torch.float64
    assert buffer.shape == (LabelValues.length(*labels.win_rate.shape),)
    return slot.cpu(), LabelValues.unpack(buffer.cpu(), *labels.win_rate.shape)


def assert_same(labels, backend):
    slot, values = values_of(labels, backend)
    wide = Labels(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in labels))
    _, buffer = torch_statistics(wide)
    expected = LabelValues.unpack(buffer, *labels.win_rate.shape)
    for name, x, y in zip(LabelValues._fields, values, expected, strict=True):
        tolerance = CHI if name == "chi" else SUMS
        torch.testing.assert_close(x, y, equal_nan=True, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    same_slot, same_group = (x[:, None] == x for x in (slot, labels.group))
    assert torch.equal(same_slot, same_group)
    assert sorted(slot.unique().tolist()) == list(range(int(expected.num_groups)))


# -------------------------------------------------------------------------------------------------- label statistics


LABEL_STRATEGIES = {
    "seed": st.integers(0, 10**6),
    "sizes": st.lists(st.integers(2, 6), min_size=1, max_size=7),
    "objectives": st.integers(1, 5),
    "kind": st.sampled_from(["uniform", "hard", "equal"]),
    "unlabelled": st.sampled_from([0.0, 0.3, 0.9]),
    "lag": st.booleans(),
    "tau": st.sampled_from([0.08, 0.3, 2.0]),
    "eps": st.sampled_from([0.0, 1e-6, 0.01, 0.15, 1.3, 50.0]),
}


@given(**LABEL_STRATEGIES)
@settings(deadline=None, max_examples=30 if torch.cuda.is_available() else 200)  # Triton compiles most examples anew
def test_label_statistics_are_what_plain_torch_computes(backend, **options):
    assert_same(random_labels(**options, dtypes=FLOATS), backend)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2], id="one pair"),
        pytest.param([2] * 600, id="pairs of more threads than a block has"),
        pytest.param([1500], id="one large group"),
        pytest.param([2, 900, 3, 257], id="very unequal groups"),
    ],
)
def test_groups_of_any_number_and_size(backend, sizes):
    assert_same(random_labels(1, sizes, unlabelled=0.2, eps=0.15), backend)


@pytest.mark.parametrize("eps", [1e-6, 50.0], ids=["small ball", "a ball that holds everything"])
@pytest.mark.parametrize("sizes", [[2], [3], [4], [2, 2], [2, 3], [7], [9, 8]], ids=str)
def test_few_responses(backend, sizes, eps):
    """Fewer than a warp has lanes, and values that are products: their differences may be fused with them."""
    assert_same(random_labels(1, sizes, 1, lag=False, eps=eps), backend)


def test_scores_of_hundreds_neither_overflow_nor_lose_the_loser(backend):
    win_rate, multipliers = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([1.0, 70.0])
    _, values = values_of(
        Labels(win_rate, torch.tensor([5, 5]), multipliers, torch.tensor([900.0, 900.0]), 0.1, 0.1, 0), backend
    )
    torch.testing.assert_close(values.weights.log(), torch.tensor([0.0, -710.0]).double(), rtol=1e-12, atol=1e-12)
    assert values.lower_bounds.isfinite().all()


def test_a_wide_ball_reaches_the_smallest_value(backend):
    _, values = values_of(random_labels(4, [2, 2], kind="hard", tau=1.0, eps=9.0), backend)
    assert (values.chi == 0).all()


def test_the_same_input_gives_the_same_bits(backend):
    labels = moved(random_labels(5, [2, 3, 5] * 40, unlabelled=0.2, eps=0.1), backend)
    run = backends.batch(backend).label_statistics
    first = run(labels)
    assert all(torch.equal(x, y) for _ in range(3) for x, y in zip(run(labels), first, strict=True))


def changed(field, index, value):
    """Labels of which one value is another."""
    labels = random_labels(6, [2, 3])
    getattr(labels, field)[index] = value
    return labels


BAD = [
    ("win_rate", (4, 2), 1.0000001),
    ("win_rate", (0, 0), -1e-9),
    ("win_rate", (2, 1), math.inf),
    ("group", 0, 7),
    ("multipliers", 2, -0.1),
    ("multipliers", 1, math.inf),
    ("multipliers", 1, math.nan),
    ("multipliers", 0, 1.5),
    ("lag_log_ratio", 2, math.nan),
]


@pytest.mark.parametrize(("field", "index", "value"), BAD)
def test_bad_values_are_flagged_and_named(backend, field, index, value):
    labels = changed(field, index, value)
    assert values_of(labels, backend)[1].valid == 0
    assert LabelValues.unpack(torch_statistics(labels)[1], *labels.win_rate.shape).valid == 0
    with pytest.raises(ValueError, match=field):
        label_statistics(**moved(labels, backend)._asdict(), backend=backend)


def test_more_objectives_than_responses_are_all_checked(backend):
    labels = random_labels(7, [2], objectives=6)
    assert values_of(labels, backend)[1].valid == 1
    labels.multipliers[5] = -1
    assert values_of(labels, backend)[1].valid == 0


def test_the_multiplier_of_another_primary_may_be_the_one(backend):
    labels = random_labels(8, [2, 2])
    labels.multipliers[:] = torch.tensor([0.3, 0.2, 1.0])
    assert values_of(labels._replace(primary=2), backend)[1].valid == 1
    assert values_of(labels, backend)[1].valid == 0


def test_a_refusal_that_no_check_explains_is_an_internal_error(backend, monkeypatch):
    implementation = backends.batch(backend)
    run = implementation.label_statistics

    def refusing(labels):
        slot, buffer = run(labels)
        buffer[0] = 0
        return slot, buffer

    monkeypatch.setattr(implementation, "label_statistics", refusing)
    with pytest.raises(RuntimeError, match="nothing is wrong"):
        label_statistics(**moved(random_labels(9, [2, 2]), backend)._asdict(), backend=backend)


def test_inputs_may_have_any_strides(backend):
    labels = random_labels(13, [2, 3, 4])
    spread = {name: x.repeat_interleave(3, 0)[::3] for name, x in labels._asdict().items() if torch.is_tensor(x)}
    spread["win_rate"] = labels.win_rate.T.contiguous().T
    assert not any(x.is_contiguous() for x in spread.values())
    results = [
        label_statistics(**moved(x, backend)._asdict(), backend=backend) for x in (labels, labels._replace(**spread))
    ]
    assert torch.equal(results[0].buffer, results[1].buffer)


@pytest.mark.parametrize("lag", [True, False])
def test_opcheck_of_label_statistics(backend, lag):
    labels = moved(random_labels(10, [2, 3, 2], lag=lag, dtypes=FLOATS), backend)
    torch.library.opcheck(measure_labels, (*labels[:4], [0.3, 0.02], 0, backend))


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
    poisoned = logp.masked_fill_(target == IGNORE, math.nan).to(device_of(backend))
    sums, counts = backends.batch(backend).sequence_sums(poisoned, target.to(device_of(backend)), IGNORE)
    torch.testing.assert_close(sums.cpu(), expected, **SUMS)
    assert torch.equal(counts.cpu(), expected_counts)


def test_sequence_sums_by_any_strides(backend):
    logp = torch.randn(5, 4).T
    target = torch.tensor([[1, 2, IGNORE, 3, 7]]).expand(4, 5)
    sums, counts = sequence_sums(logp.to(device_of(backend)), target.to(device_of(backend)), IGNORE, backend)
    torch.testing.assert_close(sums.cpu(), logp[:, [0, 1, 3, 4]].sum(1).double(), rtol=1e-6, atol=1e-6)
    assert counts.tolist() == [4] * 4


def test_sums_of_many_small_terms_are_float64(backend):
    logp = torch.full((1, 2**20), -0.1, device=device_of(backend))
    sums, _ = backends.batch(backend).sequence_sums(logp, torch.zeros_like(logp, dtype=torch.int64), IGNORE)
    assert sums.item() == pytest.approx(logp[0, 0].double().item() * 2**20, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck_and_gradients_of_the_sums(backend, dtype):
    logp = torch.randn(3, 5, dtype=dtype, device=device_of(backend)).requires_grad_()
    target = torch.tensor([[IGNORE, 1, 2, 3, IGNORE], [IGNORE] * 5, [1] * 5], device=device_of(backend))
    torch.library.opcheck(sequence_sums, (logp, target, IGNORE, backend))
    upstream = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64, device=device_of(backend))
    (gradient,) = torch.autograd.grad(sequence_sums(logp, target, IGNORE, backend)[0], logp, upstream)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, torch.where(target != IGNORE, upstream[:, None], 0).to(dtype))


def test_threads_change_no_bit():
    backends.choose("label_statistics", "cpu", "cpu")
    logp, target = torch.randn(37, 501), torch.randint(0, 3, (37, 501))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(backends.batch("cpu").sequence_sums(logp, target, 0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprob_sums_by_the_backend(backend, average):
    hidden, weight = torch.randn(3, 6, 4, device=device_of(backend)), torch.randn(9, 4, device=device_of(backend))
    target = torch.randint(0, 9, (3, 6), device=device_of(backend))
    target[0, 2:], target[1] = IGNORE, IGNORE
    results = [sequence_logprob(hidden, weight, target, average=average, backend=x) for x in (backend, "reference")]
    torch.testing.assert_close(*results)
    assert results[0][1] == 0
