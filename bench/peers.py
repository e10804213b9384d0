"""The peers, each behind its own entry point, in a few lines: same arguments, same result. On CPUs and GPUs alike.

heads        hidden[N, H], weight[V, H], target[N] → −Σ log p(target), differentiable in hidden and weight
token rows   logits[N, V], target[N] → log p(target)[N]
PAIRS        hidden[2P, L, H], weight, target[2P, L] (first, then second responses), ref_logp[2P] → loss of P hard pairs

Peers are imported when they are called, so that one that is missing is a line of the report.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mopo_kernels import linear_logprob, mopo_loss, win_rate_from_pairs
from mopo_kernels.measure.workloads import TAU

Loss = Callable[..., Tensor]
BETA = 0.1
SAMPLED = 2.0**-6  # grad_sampling


# ---------------------------------------------------------------------------------------------------------------- heads


def token_rows(logits: Tensor, target: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), target, reduction="none")


def eager_rows(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return token_rows(F.linear(hidden, weight), target)


def trl_rows(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    arguments = (None, target.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0].masked_fill(target == -100, 0)


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -eager_rows(hidden, weight, target).sum()


def torch_head(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, reduction="sum", options=options)


def trl(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -trl_rows(hidden, weight, target).sum()


def cce(**options: Any) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, target, reduction="sum", **options)

    return loss


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, target)


def liger_sm90(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return liger_fused_linear_cross_entropy_sm90(hidden, weight, target, reduction="sum")


def liger_sm100(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops.cutedsl.ops import LigerFusedLinearCrossEntropyFunction

    options = (None, None, -100, 0.0, 0.0, "sum")  # bias, class weights, ignore_index, z-loss, smoothing, reduction
    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, *options)[0]


def liger_scaled(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target).sum()


def quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target, reduction="sum")


def heads(*, compiler: str = "inductor") -> dict[str, Loss]:
    """What runs on any device."""
    return {
        "eager": eager,
        "torch.compile": compiled(eager, compiler),
        "torch linear_cross_entropy": torch_head,
        "TRL ChunkedLogProbFunction": trl,
    }


CPU_HEADS = {"CCE torch_compile": cce(impl="torch_compile")}
GPU_HEADS = {  # CCE leaves out small gradients unless told otherwise, so it enters twice
    "CCE": cce(filter_eps="high"),
    "CCE, all gradients": cce(filter_eps=None),
    "Liger": liger,  # Triton
    "Liger SM90": liger_sm90,  # CuTe DSL, for one architecture each
    "Liger SM100": liger_sm100,
    "Liger scaled": liger_scaled,  # per row; CuTe DSL on Hopper, else plain torch
    "QuACK": quack,  # CuTe DSL; on Hopper by its scaled exponentials
}
OURS = {  # with the sum asked for, so that coefficients are known beforehand, and per row; by default and in 512 MiB
    "mopo, sum": lambda h, w, t: -linear_logprob(h, w, t, reduction="sum"),
    "mopo, per row": lambda h, w, t: -linear_logprob(h, w, t).sum(),
    "mopo, sampled 1/64": lambda h, w, t: -linear_logprob(h, w, t, reduction="sum", grad_sampling=SAMPLED),
    "mopo, sum, 512 MiB": lambda h, w, t: -linear_logprob(h, w, t, reduction="sum", workspace_bytes=2**29),
    "mopo, per row, 512 MiB": lambda h, w, t: -linear_logprob(h, w, t, workspace_bytes=2**29).sum(),
}


def compiled(function: Loss, compiler: str, *, dynamic: bool = False) -> Loss:
    torch._dynamo.reset()  # or the eighth size is one too many
    return torch.compile(function, dynamic=dynamic, backend=compiler)


# ---------------------------------------------------------------------------------------------------------------- pairs


def dpo(rows: Loss) -> Loss:
    """DPO as TRL writes it, over a function that gives per-token log-probs of flat rows."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        logp = rows(hidden.flatten(0, 1), weight, target.flatten()).view(target.shape).sum(-1)
        chosen, rejected = (logp - ref_logp).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def mopo(policy_step: Any, **options: Any) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, ref_logp: Tensor) -> Tensor:
        pairs, device = len(target) // 2, hidden.device
        win_rate, group = win_rate_from_pairs(torch.ones(pairs, 1, device=device)), torch.arange(pairs, device=device)
        labels = win_rate, group.repeat(2), torch.ones(1, device=device)
        step = {"tau": TAU, "policy_step": policy_step, "ref_logp": ref_logp}
        return mopo_loss(hidden, weight, target, *labels, **step, **options).loss

    return loss


def liger_pairs(name: str, **options: Any) -> Loss:
    @cache
    def build() -> Loss:
        from liger_kernel import chunked_loss

        return getattr(chunked_loss, name)(beta=BETA, **options)

    return lambda hidden, weight, target, ref_logp: build()(weight, hidden, target)[0]


PAIRS = {
    "mopo_loss clone": mopo("clone"),
    "mopo_loss contrast": mopo("contrast"),
    "mopo_loss clone, sampled 1/64": mopo("clone", grad_sampling=SAMPLED),
    "mopo_loss contrast, sampled 1/64": mopo("contrast", grad_sampling=SAMPLED),
    "eager DPO": dpo(eager_rows),
    "TRL ChunkedLogProbFunction DPO": dpo(trl_rows),
    # as with a reference computed beforehand
    "Liger fused DPO": liger_pairs("LigerFusedLinearDPOLoss", use_ref_model=False),
    "Liger fused ORPO": liger_pairs("LigerFusedLinearORPOLoss"),
}
