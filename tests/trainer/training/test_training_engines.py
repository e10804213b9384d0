"""Engines that would split nothing, or split what the loss must read, are refused by name."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from mopo_trainer.training.engines import check_engine


def accelerator(kind, *, fsdp2=True):
    return SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=fsdp2)


@pytest.mark.parametrize(
    ("kind", "options", "has_adapter", "message"),
    [
        ("FSDP", {"fsdp2": False}, False, "set fsdp_version: 2"),
        ("FSDP", {}, True, "an adapter under FSDP"),
        ("DEEPSPEED", {}, False, "DeepSpeed was never run with this loss"),
    ],
)
def test_what_the_loss_cannot_read_is_refused(kind, options, has_adapter, message):
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator(kind, **options), has_adapter=has_adapter)


@pytest.mark.parametrize(("variable", "engine"), [("FSDP", "FSDP"), ("DEEPSPEED", "DEEPSPEED")])
def test_an_engine_that_accelerate_passes_over_is_an_error(monkeypatch, variable, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(ValueError, match=f"asks for {engine}, and accelerate made it MULTI_CPU"):
        check_engine(accelerator("MULTI_CPU"), has_adapter=False)


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU"])
def test_adapters_train_where_every_process_has_all_weights(kind):
    check_engine(accelerator(kind), has_adapter=True)


def test_fsdp2_splits_a_model_without_adapters(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_engine(accelerator("FSDP"), has_adapter=False)
