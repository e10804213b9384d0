"""Our fused head in the models of TRL's trainers."""

from __future__ import annotations

from functools import wraps
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from mopo_kernels import linear_logprob
from mopo_trainer.training.head import Transform, head_input, linear_head
from mopo_trainer.training.probe import PROBE_TOKENS, measure_transform
from mopo_trainer.training.split import is_zero3


def add_mopo_head(model: PreTrainedModel | PeftModel, *, temperature: float = 1.0) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` compute what TRL's fused head does by `linear_logprob`.

    For the model of a trainer of TRL's, once the trainer is made. What the model does to its logits (scale, softcap) is
    measured, as MOPOTrainer does. Against TRL's head: entropy carries no gradient, a tie is a hit in `is_top1`,
    `log_sum_sq_probs` (WPO's weights) is None, and `mean_logits` is NaN under a softcap.

    Args:
        temperature: what TRL's head divides logits by: GRPO's and RLOO's `temperature`, 1 in DPO.

    Raises:
        ValueError: a head that is no argument of `linear_logprob` (an adapter on it, logits bent in an unknown way,
            split by ZeRO-3), or other log-probs than TRL's head gives on a few tokens (another temperature).
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(map(is_zero3, plain.parameters())):
        raise ValueError("ZeRO-3 has split the model; keep TRL's head, which gathers its weight")
    otherwise, training = plain.forward, plain.training
    ids = torch.arange(PROBE_TOKENS, device=plain.device)[None]
    with torch.no_grad():
        plain.eval()
        transform = measure_transform(plain, ids[0].tolist())

    @wraps(type(plain).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return otherwise(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        with head_input(self, lambda hidden: hidden[:, :1]) as captured:
            output = type(self).forward(self, *args, **{**kwargs, "use_cache": False})
        hidden, target = (captured[-1], shifted) if labels is None else (captured[-1][:, :-1], labels[:, 1:])
        head = _Head(linear_head(self), transform, temperature)
        return head.scored(hidden, target, items, getattr(output, "aux_loss", None))

    plain.forward = MethodType(forward, plain)
    with torch.no_grad():
        found = plain(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        truth = otherwise(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        plain.train(training)
    rounding = max(16 * torch.finfo(plain.dtype).eps, 1e-4)
    if not torch.allclose(found, truth.to(found.dtype), rtol=rounding, atol=rounding):
        plain.forward = otherwise
        raise ValueError(
            f"temperature={temperature}: a log-prob is {found[0, 0]:.3f} where TRL's head gives {truth[0, 0]:.3f}; "
            "give the trainer's own temperature, or keep TRL's head"
        )


class _Head(NamedTuple):
    """A head, and what becomes of its logits."""

    layer: nn.Linear
    transform: Transform
    temperature: float

    def scored(
        self,
        hidden: Tensor,  # [B, L, H]
        target: Tensor,  # [B, L]
        items: Any,  # what the loss is divided by; None: the tokens that count
        router_loss: Tensor | None,
    ) -> FusedCausalLMOutput:
        weight, bias, transform = self.layer.weight, self.layer.bias, self.transform
        hidden, counts = hidden.to(weight.dtype), target != -100
        logp, entropy, hit = linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=self.temperature,
            softcap=transform.softcap,
            logit_scale=transform.logit_scale,
            return_entropy=True,
            return_hit=True,
        )
        with torch.no_grad():  # a mean over the vocabulary is one row of the head
            mean = F.linear(hidden, weight.mean(0, keepdim=True), None if bias is None else bias.mean(0, keepdim=True))
            mean = mean[..., 0].float() * transform.logit_scale / self.temperature
        return FusedCausalLMOutput(
            loss=-logp.sum() / (counts.sum().clamp(min=1) if items is None else items),
            log_probs=logp,
            entropy=entropy,
            mean_logits=mean.masked_fill(~counts, 0) if transform.softcap is None else mean * torch.nan,
            is_top1=hit,
            label_mask=counts,
            aux_loss=router_loss,
        )
