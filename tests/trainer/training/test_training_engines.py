"""Engines that would split nothing, or split what the loss must read, are refused by name."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from torch import nn

from mopo_trainer.training.engines import check_engine, check_loaded


def accelerator(kind, *, fsdp2=True, stage=2, zero=None, **config):
    gathered = {"stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "none"}}
    config["zero_optimization"] = {"stage": stage, **gathered, **(zero or {})}
    plugin = SimpleNamespace(deepspeed_config=config)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=fsdp2, state=state)


@pytest.mark.parametrize(
    ("kind", "options", "has_adapter", "message"),
    [
        ("FSDP", {"fsdp2": False}, False, "set fsdp_version: 2"),
        ("FSDP", {}, True, "an adapter under FSDP"),
        ("DEEPSPEED", {"stage": 1}, False, "ZeRO stage 1 was never run"),
        ("DEEPSPEED", {"scheduler": {}, "optimizer": {}}, False, "configuration has optimizer, scheduler, never run"),
        ("DEEPSPEED", {"zero": {"offload_optimizer": {"device": "cpu"}}}, False, "offload_optimizer was never run"),
        ("DEEPSPEED", {"zero": {"offload_param": {"device": "nvme"}}}, False, "offload_param was never run"),
        ("DEEPSPEED", {"zero": {"zero_quantized_gradients": True}}, False, "zero_quantized_gradients was never run"),
        ("DEEPSPEED", {"zero": {"zero_hpz_partition_size": 8}}, False, "zero_hpz_partition_size was never run"),
        ("DEEPSPEED", {"bf16": {"bf16_optimizer_states": True}}, False, "bf16.bf16_optimizer_states was never run"),
        ("DEEPSPEED", {"fp16": {"enabled": "auto"}}, False, "fp16 under DeepSpeed"),
        ("DEEPSPEED", {"fp16": {"enabled": True}}, False, "fp16 under DeepSpeed"),
        ("DEEPSPEED", {"stage": 3}, True, "an adapter under ZeRO-3"),
        (
            "DEEPSPEED",
            {"stage": 3, "zero": {"stage3_gather_16bit_weights_on_model_save": False}},
            False,
            "set zero3_save_16bit_model: true",
        ),
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


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"])
def test_adapters_train_where_every_process_has_all_weights(kind):
    check_engine(accelerator(kind), has_adapter=True)


@pytest.mark.parametrize(("variable", "kind"), [("FSDP", "FSDP"), ("DEEPSPEED", "DEEPSPEED")])
def test_weights_are_split_without_adapters(monkeypatch, variable, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    check_engine(accelerator(kind, stage=3, bf16={"enabled": True}), has_adapter=False)


def test_an_adapter_on_a_model_that_was_split_as_it_was_loaded_is_refused():
    model = nn.Linear(2, 2)
    check_loaded(model, has_adapter=True)
    model.weight.ds_id = 0
    check_loaded(model, has_adapter=False)
    with pytest.raises(ValueError, match="an adapter under ZeRO-3"):
        check_loaded(model, has_adapter=True)
