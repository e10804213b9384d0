"""What a call of the head is handed on as: every option arrives, in an operator's numbers too."""

import dataclasses
import itertools

import pytest
import torch

from mopo_kernels import backends
from mopo_kernels.backends.fold import Transform
from mopo_kernels.head.call import HeadCall, HeadInputs, Outputs
from mopo_kernels.head.shard import Shard

NEEDS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("needs", NEEDS)
def test_every_option_survives_the_numbers(needs):
    calls = [
        HeadCall(Transform(0.3, 1.7, True), -7, backend, workspace, needs, average)
        for backend, workspace, average in itertools.product(backends.BACKENDS, (None, 12_345), (False, True))
    ]
    calls.append(HeadCall(Transform(2.5, 1.0, False), 2**40))
    calls.append(HeadCall(Transform(2.5, 1.0, False), 0, grad_sampling=2.0**-6))
    calls += [HeadCall(Transform(2.5, 1.0, False), 0, outputs=Outputs(*outputs)) for outputs in NEEDS]
    calls += [HeadCall(Transform(2.5, 1.0, False), 0, shard=Shard(3, 7, 11, 5, own)) for own in (False, True)]
    for call in calls:
        numbers = call.flat()
        assert all(type(x) is float for x in numbers)
        assert HeadCall.unflat(numbers) == call


def test_options_as_a_caller_gives_them():
    call = HeadCall.of(
        temperature=0.5,
        softcap=4.0,
        logit_scale=2.0,
        ignore_index=-1,
        workspace_bytes=100,
        average=True,
        grad_sampling=0.25,
    )
    assert call == HeadCall(Transform(0.5, 8.0, True), -1, workspace_bytes=100, average=True, grad_sampling=0.25)
    assert HeadCall.of(temperature=0.5, ignore_index=3).transform == Transform(2.0, 1.0, False)
    run = call.on("cpu", (True, False, True))
    assert run == dataclasses.replace(call, backend="cpu", needs=(True, False, True))
    assert run.on("cut") == dataclasses.replace(call, backend="cut")
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.average = False


@pytest.mark.parametrize("needs", NEEDS)
def test_gradients_are_needed_where_autograd_will_ask(needs):
    hidden, weight, bias = (
        torch.zeros(shape, requires_grad=x) for shape, x in zip(((2, 3), (4, 3), 4), needs, strict=True)
    )
    inputs = HeadInputs(hidden, weight, bias, torch.zeros(2, dtype=torch.int64))
    assert inputs.needs == needs
    assert inputs._replace(bias=None).needs == (*needs[:2], False)
    with torch.no_grad():
        assert inputs.needs == (False, False, False)


def test_leading_dimensions_become_one():
    inputs = HeadInputs(torch.zeros(2, 3, 5), torch.zeros(7, 5), None, torch.arange(6).view(2, 3))
    flat = inputs.flattened()
    assert flat.hidden.shape == (6, 5)
    assert flat.target.tolist() == list(range(6))
    assert flat.weight is inputs.weight


def test_autocast_casts_all_but_float64():
    hidden, weight, bias = torch.zeros(2, 3), torch.zeros(4, 3).double(), torch.zeros(4).half()
    inputs = HeadInputs(hidden, weight, bias, torch.zeros(2, dtype=torch.int64))
    assert inputs.autocast() is inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = inputs.autocast()
        assert [x.dtype for x in cast] == [torch.bfloat16, torch.float64, torch.bfloat16, torch.int64]
        assert inputs._replace(bias=None).autocast().bias is None
