"""Adapters (peft): which of them can train, the weights a run starts from, and the head that they leave in use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import is_peft_available

if is_peft_available():
    from peft import (
        PeftModel,
        get_peft_model,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    PEFT_MODEL: tuple[type, ...] = (PeftModel,)
    PEFT_TUNER: tuple[type, ...] = (BaseTunerLayer,)
    PEFT_LAYER: tuple[type, ...] = (BaseTunerLayer, AuxiliaryTrainingWrapper)
else:
    PEFT_MODEL = PEFT_TUNER = PEFT_LAYER = ()

logger = logging.getLogger(__name__)

ADAPTER_FILE = "mopo_adapter.safetensors"


# ----------------------------------------------------------------------------------------------- which can be trained


def with_adapter(model: nn.Module, peft_config: Any | None, seed: int) -> Any:
    """The model, in the adapter that `peft_config` asks for; an adapter of one seed always starts the same.

    Raises:
        ValueError: a wrapped model, or a new adapter over one that the model carries.
    """
    if not isinstance(model, (PreTrainedModel, *PEFT_MODEL)):
        raise ValueError(
            f"model is a {type(model).__name__}; give the transformers or peft model inside it, the trainer wraps it"
        )
    if peft_config is None:
        return model
    if carries_adapter(model):
        quantised = getattr(model, "is_quantized", False)
        full = " (load the base unquantised for that: merging into a quantised one rounds it)" if quantised else ""
        raise ValueError(
            "the model carries an adapter and peft_config asks for another; leave peft_config out to go on training "
            f"the one it has, or save model.merge_and_unload(){full} and start from what was saved"
        )
    set_seed(seed)
    return get_peft_model(model, peft_config)


def carries_adapter(model: nn.Module) -> bool:
    """Whether a peft adapter wraps the model or sits in its layers (as transformers itself loads them)."""
    return isinstance(model, PEFT_MODEL) or any(isinstance(module, PEFT_LAYER) for module in model.modules())


def check_trainable(model: Any, *, share_prompt: bool, gradient_checkpointing: bool) -> None:
    """Refuse what would run to the end and train nothing, or something that no checkpoint keeps.

    Raises:
        ValueError: no trainable parameter, none that the loss reaches, one that belongs to no adapter, one in float16;
            an adapter that is merged, off, or needs more than token ids; virtual tokens with options that misplace or
            drop them.
    """
    adapted = carries_adapter(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable and not adapted:
        raise ValueError(
            "nothing is trainable: every parameter of the model is frozen; call model.requires_grad_(True)"
        )
    _check_precision(model)
    if not adapted:
        return
    layers: list[Any] = [module for module in model.modules() if isinstance(module, PEFT_LAYER)]
    if any(getattr(layer, "merged", False) for layer in layers):
        raise ValueError("the adapter is merged into the model and would not train; call model.unmerge_adapter()")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("the adapter is switched off and would not train; call enable_adapter_layers() on the model")
    if not trainable:
        raise ValueError(
            "nothing is trainable: the adapter is frozen, as for inference; load it with is_trainable=True "
            "(or set requires_grad of its parameters and inference_mode=False in its configuration)"
        )
    _check_virtual_tokens(model, share_prompt=share_prompt, gradient_checkpointing=gradient_checkpointing)
    _check_kept(model, trainable)
    _check_reached(model, trainable)
    _say_what_a_merge_would_break(model)


def _check_precision(model: nn.Module) -> None:
    """Refuse weights that the optimizer would turn to NaN within a few steps."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is trainable in float16, where gradients and the optimizer's eps underflow; load the model "
                "with dtype=torch.float32 (fp16=True then computes in float16) or torch.bfloat16, or train an adapter"
            )


def _say_what_a_merge_would_break(model: Any) -> None:
    """A low-rank update merged into a head that is the embedding changes both; it was trained on one."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [getattr(end, "base_layer", end) for end in ends]
    is_tied = all(hasattr(base, "weight") for base in bases) and bases[0].weight is bases[1].weight
    if is_tied and any(isinstance(end, PEFT_TUNER) for end in ends):
        logger.warning(
            "the adapter stands on one end of a head that is tied to the embedding: exact as an adapter, but merged "
            "into the model it changes both ends; keep it apart, or leave both out of target_modules"
        )


def _check_virtual_tokens(model: PreTrainedModel, *, share_prompt: bool, gradient_checkpointing: bool) -> None:
    config = active_config(model)
    if not getattr(config, "is_prompt_learning", False):
        return
    kind = config.peft_type.value
    if share_prompt:
        raise ValueError(f"share_prompt cannot place the virtual tokens of {kind}; leave it off")
    if gradient_checkpointing and kind in ("PREFIX_TUNING", "CARTRIDGE"):  # layers drop past keys when they recompute
        raise ValueError(f"gradient_checkpointing would drop the virtual tokens of {kind}; leave it off")


def active_config(model: Any) -> Any:
    """peft's configuration of the (first) active adapter."""
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapter", None) if isinstance(model, PEFT_MODEL) else None
    return configs.get(active if isinstance(active, str) else next(iter(active or configs), None))


def _check_kept(model: Any, trainable: list[str]) -> None:
    """Refuse trainable parameters of the base model: peft saves the adapter alone."""
    config = active_config(model)
    if not isinstance(model, PeftModel) or config.is_prompt_learning:  # whose encoder is saved as what it computes
        return
    kept = {
        tensor.data_ptr()
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).values()
    }
    parameters = dict(model.named_parameters())
    lost = [name for name in trainable if parameters[name].data_ptr() not in kept]
    if lost:
        raise ValueError(
            f"{lost[0]} is trainable but belongs to no adapter, so saved adapters would lack it ({len(lost)} such); "
            "name its module in modules_to_save or freeze it"
        )


def _check_reached(model: PreTrainedModel, trainable: list[str]) -> None:
    """Refuse adapters that cannot run on token ids, and trainable parameters that are all out of the loss's reach."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception as error:
        kind = getattr(active_config(model), "peft_type", type(model).__name__)
        raise ValueError(f"{kind} does not run on token ids alone ({error}); train another kind of adapter") from error
    if not logits.requires_grad:
        active = getattr(model, "active_adapters", None)
        raise ValueError(
            f"nothing trainable reaches the loss: trainable is {trainable[0]}, active is {active}; call set_adapter "
            "with the adapter to train, or load the active one with is_trainable=True"
        )


# ------------------------------------------------------------------------------------------------ the weights at start


class StartingWeights:
    """The trainable weights of an adapted model as a run found them: with them in place the model is π_ref0.

    "Adapter off" is that policy only where an adapter starts at zero, which neither PiSSA nor a trained adapter does,
    and it leaves trained biases and modules_to_save to chance. A copy is exact for all of them, and costs the adapter's
    own size on the CPU and in each checkpoint (LoRA of rank 16 on all linear layers of a 7B model: 160 MB in float32).
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """The model as it stood at the start; what was trained comes back bit by bit."""
        trained = {name: value.clone() for name, value in _parameters(model, self.values).items()}
        try:
            put(self.values, model)
            yield
        finally:
            put(trained, model)


def starting_weights(model: nn.Module) -> StartingWeights | None:
    """Those of an adapted model as it is now; None for a model without an adapter: they would be all its weights."""
    return StartingWeights(_trainable(model)) if carries_adapter(model) else None


def put(values: dict[str, Tensor], model: nn.Module) -> None:
    """Copy values into the model's parameters."""
    parameters = _parameters(model, values)
    for name, value in values.items():
        parameters[name].copy_(value)


def _parameters(model: nn.Module, names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name in names}


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def write_adapter(checkpoint: Path, start: StartingWeights, model: nn.Module) -> None:
    """The trainable weights at the start and now, under the names of the model's parameters.

    peft's own file knows no start, and of a prompt encoder it has what it computes instead of its weights.
    """
    named = {f"start.{name}": value for name, value in start.values.items()}
    named |= {f"now.{name}": value for name, value in _trainable(model).items()}
    save_file({name: value.contiguous() for name, value in named.items()}, checkpoint / ADAPTER_FILE)


def read_adapter(checkpoint: Path, model: Any) -> StartingWeights:
    """Put a checkpoint's adapter into the model; returns what its run started from.

    peft's `load_adapter` would also switch adapters and turn requires_grad on; here only values change.

    Raises:
        ValueError: the checkpoint holds no such adapter.
    """
    file = checkpoint / ADAPTER_FILE
    named = load_file(file) if file.is_file() else {}
    now = {name.removeprefix("now."): value for name, value in named.items() if name.startswith("now.")}
    wanted = {name: value.shape for name, value in _trainable(model).items()}
    if {name: value.shape for name, value in now.items()} != wanted:
        raise ValueError(
            f"{checkpoint} does not hold the adapter that the model carries; resume with the peft_config it had"
        )
    if is_peft_available() and isinstance(model, PeftModel):
        for name in model.peft_config:  # frozen parts of an adapter
            directory = checkpoint if name == "default" else checkpoint / name
            set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), name)
    put(now, model)
    return StartingWeights(
        {name.removeprefix("start."): value for name, value in named.items() if name.startswith("start.")}
    )


# ------------------------------------------------------------------------------------------------------ the head in use


def head_in_use(head: nn.Module | None) -> nn.Module | None:
    """The layer behind a wrapper of modules_to_save: the trained copy, or the original where no adapter is active."""
    if not is_peft_available() or not isinstance(head, ModulesToSaveWrapper):
        return head
    active = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
    return head.modules_to_save[active[0]] if active else head.original_module
