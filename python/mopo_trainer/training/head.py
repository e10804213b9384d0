"""The LM head of a Hugging Face model, and the hidden states that it reads."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mopo_trainer.data.packing import PackedSequences
from mopo_trainer.training.adapter import head_in_use


def response_hidden_states(model: nn.Module, plain: PreTrainedModel, packed: PackedSequences) -> Tensor:
    """Hidden states [S, L, H] that predict `packed.target`; `plain` is `model` without wrappers.

    The whole model is called, so that wrappers (DDP) see their forward pass; its head runs on one position only.
    """
    captured: list[Tensor] = []
    handle = plain.get_decoder().register_forward_hook(lambda module, args, output: captured.append(output[0]))
    keep_one = {"logits_to_keep": 1} if _takes_logits_to_keep(plain) else {}
    try:
        inputs = packed.model_inputs(plain.config._attn_implementation, plain.dtype)
        model(**inputs, use_cache=False, **keep_one)
    finally:
        handle.remove()
    last = captured[-1][:, -packed.input_ids.shape[1] :]  # adapters may run the model before, or put tokens in front
    return last.flatten(0, 1)[packed.source]


def _takes_logits_to_keep(plain: PreTrainedModel) -> bool:
    base = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return "logits_to_keep" in inspect.signature(base.forward).parameters


@dataclass(frozen=True)
class LMHead:
    """The LM head of a Hugging Face model as arguments of `linear_logprob`."""

    weight: Tensor  # [V, H]
    options: dict[str, Any]  # bias, softcap, logit_scale

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        """Raises ValueError where the head is no plain linear layer (an adapter on it, a quantised head)."""
        head = head_in_use(model.get_output_embeddings())
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"the LM head is a {type(head).__name__}; the fused loss needs a plain linear layer "
                "(leave lm_head out of the adapter's target_modules and modules_to_save)"
            )
        config = model.config.get_text_config()
        logit_scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, {"bias": head.bias, "softcap": softcap, "logit_scale": logit_scale})
