"""The door: every bad argument of a public call is refused by name, with what to do, before any matrix product."""

import math

import pytest
import torch
from dispatch import Operations

from mopo_kernels import (
    linear_logprob,
    mopo_loss,
    mopo_objective,
    mopo_weights,
    sequence_logprob,
    token_logprob,
    win_rate_from_pairs,
)
from mopo_kernels.loss import policy_loss
from mopo_kernels.objective.target import label_statistics

B, L, H, V, K = 6, 3, 4, 9, 3
CALLS = {
    call.__name__: call
    for call in (
        linear_logprob,
        token_logprob,
        sequence_logprob,
        mopo_loss,
        policy_loss,
        mopo_objective,
        mopo_weights,
        label_statistics,
    )
}
HEADS = ["linear_logprob", "sequence_logprob", "mopo_loss", "policy_loss"]
LABELS = ["mopo_loss", "mopo_objective", "mopo_weights", "label_statistics"]
STEPS = ["mopo_loss", "policy_loss", "mopo_objective"]


def labels():
    win_rate = win_rate_from_pairs(torch.linspace(0.1, 0.9, B // 2 * K).view(-1, K))
    return {"win_rate": win_rate, "group": torch.arange(B // 2).repeat(2), "multipliers": torch.tensor([1.0, 0.5, 2.0])}


def good(call):
    """Arguments that pass."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(B, L, H, generator=generator), torch.randn(V, H, generator=generator)
    target = torch.tensor([-100, 0, V - 1]).expand(B, L)
    head = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "target": target}
    return {
        "linear_logprob": head,
        "sequence_logprob": head,
        "token_logprob": {"logits": hidden @ weight.T, "target": target},
        "mopo_loss": {**head, **labels(), "tau": 0.3},
        "policy_loss": {**head, "labels": label_statistics(**labels(), tau=0.3)},
        "mopo_objective": {"logp": torch.linspace(-9, -3, B), **labels(), "tau": 0.3},
        "mopo_weights": {**labels(), "tau": 0.3},
        "label_statistics": {**labels(), "tau": 0.3},
    }[call]


def changed(x, value, at=0):
    """x with one element that is wrong."""
    return x.clone().index_put((torch.tensor(at),) * x.ndim, torch.tensor(value, dtype=x.dtype))


TARGET = torch.zeros(B, L, dtype=torch.int64)
BAD_HEADS = [
    ({"target": changed(TARGET, V)}, r"target holds 9, outside \[0, 9\) .* take ignore_index=-100"),
    ({"target": changed(TARGET, -1)}, r"target holds -1, outside \[0, 9\)"),
    ({"target": TARGET - 100, "ignore_index": 3}, r"target holds -100, outside .* take ignore_index=3"),
    ({"target": TARGET.float()}, "target has dtype torch.float32; give integer token ids"),
    ({"target": TARGET.bool()}, "target has dtype torch.bool; give integer token ids"),
    ({"target": TARGET[:, :2]}, r"target has shape \[6, 2\]; hidden \[6, 3, 4\] needs one target per row"),
    ({"target": TARGET.to("meta")}, "target is on meta and hidden on cpu; move one of them"),
    ({"hidden": torch.ones(B, L, H, dtype=torch.int64)}, "hidden has dtype torch.int64; give a floating-point tensor"),
    ({"hidden": torch.ones(B, L, H + 1)}, r"hidden \[6, 3, 5\] and weight \[9, 4\] do not fit: \[\*, H\] and \[V, H\]"),
    ({"hidden": torch.ones(B, L, H).double()}, "hidden is torch.float64 and weight torch.float32; cast one of them"),
    ({"weight": torch.ones(V, H, dtype=torch.int64)}, "weight has dtype torch.int64; give a floating-point tensor"),
    ({"weight": torch.ones(V * H)}, r"weight \[36\] do not fit"),
    ({"weight": torch.ones(0, H)}, r"weight has shape \[0, 4\]; a head needs at least one token"),
    ({"weight": torch.ones(V, H, device="meta")}, "weight is on meta and hidden on cpu; move one of them"),
    ({"bias": torch.zeros(V - 1)}, r"bias has shape \[8\]; weight \[9, 4\] needs \[9\]"),
    ({"bias": torch.zeros(V, device="meta")}, "bias is on meta and hidden on cpu; move one of them"),
    ({"logit_scale": math.nan}, "logit_scale must be a positive number; got nan"),
    ({"workspace_bytes": 0}, "workspace_bytes=0 must be positive, or None"),
    ({"workspace_bytes": -1}, "workspace_bytes=-1 must be positive, or None"),
    *(
        (
            {"grad_sampling": wrong},
            rf"grad_sampling must be a number between 0.00012207 and 1 \(0.015625, .* or None .*; got {found}$",
        )
        for wrong, found in (
            ("0.1", "'0.1', a str: give a float"),
            (True, "True, a bool: give a float"),
            (torch.tensor(0.1), r"tensor\(0.1000\), a Tensor: give a float"),
            (torch.tensor([0.1, 0.2]), r"tensor\(\[0.1000, 0.2000\]\), a Tensor: give a float"),
            *((x, x) for x in (math.nan, math.inf, 0, 0.0, -0.5, 1, 64, 1e-05, 5e-324)),
        )
    ),
]
BAD_LOGITS = [
    ({"target": changed(TARGET, V)}, r"target holds 9, outside \[0, 9\)"),
    ({"target": TARGET.float()}, "target has dtype torch.float32; give integer token ids"),
    ({"target": TARGET[:, :2]}, r"target has shape \[6, 2\]; logits \[6, 3, 9\] need one target per row"),
    ({"target": TARGET.to("meta")}, "target is on meta and logits on cpu; move one of them"),
    ({"logits": torch.ones(B, L, 0)}, r"logits have shape \[6, 3, 0\]; they need at least one token"),
    ({"logits": torch.ones(B, L, V, dtype=torch.int64)}, "logits has dtype torch.int64; give a floating-point tensor"),
]
BAD_SCALES = [
    ({"temperature": 0.0}, "temperature must be a positive number; got 0.0"),
    ({"temperature": math.inf}, "temperature must be a positive number; got inf"),
    ({"softcap": -1.0}, "softcap must be a positive number; got -1.0"),
    ({"softcap": 0.0}, "softcap must be a positive number; got 0.0"),
]
BAD_SEQUENCES = [
    ({"hidden": torch.ones(B * L, H), "target": TARGET.flatten()}, r"sequences need \[B, L, H\] and \[B, L\]"),
    ({"target": TARGET.flatten()}, r"sequences need \[B, L, H\] and \[B, L\]"),
]
WIN_RATE, GROUP, MULTIPLIERS = labels().values()
BAD_LABELS = [
    ({"win_rate": changed(WIN_RATE, 1.5, at=2)}, r"in \[0, 1\], or be NaN .* got 1.5 in row 2, objective 2"),
    ({"win_rate": changed(WIN_RATE, -0.5)}, r"in \[0, 1\], or be NaN .* got -0.5 in row 0, objective 0"),
    ({"win_rate": WIN_RATE.round().long()}, r"win_rate must be a floating-point tensor \[rows, objectives\]; got"),
    ({"win_rate": WIN_RATE[..., None]}, r"win_rate must be a floating-point tensor \[rows, objectives\]; got"),
    ({"group": torch.tensor([0, 1, 2, 0, 1, 7])}, "group [27] has one response: .* drop the prompt or add a response"),
    ({"group": GROUP.int()}, "group must be an int64 tensor with one id for each of the 6 .* got torch.int32"),
    ({"group": GROUP[:4]}, r"group must be an int64 tensor with one id for each of the 6 .* got torch.int64 \(4,\)"),
    ({"group": GROUP.to("meta")}, "group is on meta and win_rate on cpu; move one of them"),
    ({"multipliers": changed(MULTIPLIERS, -0.5, at=1)}, "multipliers must be finite and >= 0; got"),
    ({"multipliers": changed(MULTIPLIERS, math.inf, at=1)}, "multipliers must be finite and >= 0; got"),
    ({"multipliers": changed(MULTIPLIERS, math.nan, at=2)}, "multipliers must be finite and >= 0; got"),
    ({"multipliers": MULTIPLIERS[:2]}, r"one entry for each of win_rate's 3 objectives, the primary's too; got \(2,\)"),
    ({"multipliers": MULTIPLIERS.to("meta")}, "multipliers is on meta and win_rate on cpu; move one of them"),
    ({"lag_log_ratio": torch.zeros(B - 1)}, r"lag_log_ratio must have one entry for each of the 6 responses; got \(5"),
    ({"lag_log_ratio": changed(torch.zeros(B), -math.inf)}, "lag_log_ratio must be finite: clip it"),
    ({"lag_log_ratio": changed(torch.zeros(B), math.nan)}, "lag_log_ratio must be finite: clip it"),
    ({"lag_log_ratio": torch.zeros(B, device="meta")}, "lag_log_ratio is on meta and win_rate on cpu; move one"),
    ({"tau": 0.0}, "tau must be a positive number; got 0.0"),
    ({"tau": math.nan}, "tau must be a positive number; got nan"),
]
BAD_SETTINGS = [  # mopo_weights has neither, and takes any column as the primary
    ({"multipliers": MULTIPLIERS * 2}, "multipliers must be 1 at the primary objective 0; got 2: divide all of them"),
    ({"eps": -1}, r"eps must be a number >= 0 \(0 switches the robust bound off\); got -1"),
    ({"eps": math.inf}, "eps must be a number >= 0"),
    ({"primary": 7}, r"primary must be an objective 0 \.\. 2; got 7"),
    ({"primary": 3}, r"primary must be an objective 0 \.\. 2; got 3"),
    ({"primary": -1}, r"primary must be an objective 0 \.\. 2; got -1"),
]
BAD_STEPS = [
    ({"policy_step": "dpo"}, "policy_step must be one of clone, contrast, regress; got 'dpo'"),
    ({"policy_step": "contast", "ref_logp": torch.zeros(B)}, "did you mean 'contrast'?"),
    ({"policy_step": "contrast"}, "policy_step='contrast' needs ref_logp, the reference policy's log-probabilities"),
    ({"policy_step": "regress", "ref_logp": torch.zeros(B - 1)}, r"ref_logp must have one entry for each of the 6"),
    ({"ref_logp": torch.zeros(B, device="meta")}, "ref_logp is on meta and .* on cpu; move one of them"),
    (
        {"policy_step": "regress", "ref_logp": changed(torch.zeros(B), math.nan)},
        "ref_logp of response 0 is nan",
    ),
]
BAD_INDICES = [
    ({"index": torch.tensor([0, 1, 2, 3, 4, 6])}, r"index must hold distinct positions in \[0, 6\)"),
    ({"index": torch.tensor([-1, 1, 2, 3, 4, 5])}, r"index must hold distinct positions in \[0, 6\)"),
    ({"index": torch.tensor([0, 1, 2, 3, 4, 4])}, r"index must hold distinct positions in \[0, 6\)"),
    ({"index": torch.tensor([0, 1])}, "index must hold 6 integers, one per sequence of hidden"),
    ({"index": torch.arange(6.0)}, "index must hold 6 integers, one per sequence of hidden"),
    ({"index": torch.arange(6, device="meta")}, "index is on meta and hidden on cpu; move one of them"),
    (
        {"index": torch.arange(6), "policy_step": "regress", "ref_logp": torch.zeros(B)},
        "index goes with policy_step='clone' only; 'regress' needs every response of a group",
    ),
    ({"hidden": torch.ones(4, L, H), "target": TARGET[:4]}, "6 rows and hidden 4 sequences; give one row per sequence"),
]
BAD_LOGP = [
    ({"logp": torch.zeros(B - 1)}, r"logp must have one entry for each of the 6 responses; got \(5,\)"),
    ({"logp": changed(torch.zeros(B), math.nan, at=2)}, "logp of response 2 is nan"),
    ({"logp": torch.zeros(B, device="meta")}, "win_rate is on cpu and logp on meta; move one of them"),
    ({"kept": torch.ones(B - 1, dtype=torch.bool)}, "kept must have one entry for each of the 6 responses"),
    ({"kept": torch.ones(B, dtype=torch.bool, device="meta")}, "kept is on meta and logp on cpu"),
    (
        {"kept": torch.ones(B, dtype=torch.bool), "policy_step": "contrast", "ref_logp": torch.zeros(B)},
        "policy_step='contrast' needs every response's logp: kept works with 'clone' only",
    ),
]


def cases(calls, bad):
    return [pytest.param(call, *x, id=f"{call}-{','.join(x[0])}-{i}") for call in calls for i, x in enumerate(bad)]


def meta_labels():
    return {name: x.to("meta") for name, x in labels().items()}


CASES = [
    *cases(HEADS, BAD_HEADS),
    *cases([*HEADS, "token_logprob"], BAD_SCALES),
    *cases(HEADS[1:], BAD_SEQUENCES),
    *cases(["token_logprob"], BAD_LOGITS),
    *cases(LABELS, BAD_LABELS),
    *cases([x for x in LABELS if x != "mopo_weights"], BAD_SETTINGS),
    *cases(STEPS, BAD_STEPS),
    *cases(["mopo_loss", "policy_loss"], BAD_INDICES),
    *cases(["mopo_objective"], BAD_LOGP),
    *cases(["linear_logprob"], [({"reduction": "max"}, "reduction must be one of none, sum, mean; got 'max'")]),
    *cases(["mopo_loss"], [(meta_labels(), "win_rate is on meta and hidden on cpu; move one of them")]),
    *cases(
        ["policy_loss"],
        [({"labels": label_statistics(**labels(), tau=1).to("meta")}, "labels is on meta and hidden on cpu")],
    ),
]


@pytest.mark.parametrize(("call", "wrong", "message"), CASES)
def test_bad_arguments_are_named_before_any_product(call, wrong, message):
    for backend in ({}, {"backend": "reference"}):
        if call == "mopo_weights" and backend:
            continue
        arguments = {**good(call), **backend, **wrong}
        with Operations() as operations, pytest.raises(ValueError, match=message):
            CALLS[call](**arguments)
        assert not operations.products


@pytest.mark.parametrize("call", CALLS)
def test_unknown_backends_are_refused_with_those_that_there_are(call):
    if call == "mopo_weights":
        pytest.skip("it takes no backend")
    arguments = good(call)
    with Operations() as operations, pytest.raises(ValueError, match=r"backend='fast' cannot run .* choose one of"):
        CALLS[call](**arguments, backend="fast")
    assert not operations.products


@pytest.mark.parametrize("backend", ["reference", "the table's choice"])
@pytest.mark.parametrize("call", CALLS)
def test_good_arguments_pass_and_products_are_seen(call, backend):
    """Else the tests above could not fail."""
    options = {"backend": backend} if backend == "reference" and call != "mopo_weights" else {}
    arguments = good(call)
    with Operations() as operations:
        CALLS[call](**arguments, **options)
    has_product = call in HEADS or (call == "token_logprob" and not options)
    assert bool(operations.products) == has_product
