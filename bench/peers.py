"""The peers, each behind its own entry point, in a few lines: same arguments, same result.

HEADS: hidden[N, H], weight[V, H], target[N] → Σ log p(target), differentiable in hidden and weight. Ours with the sum
asked for, so that coefficients are known beforehand, and per row; within 64 MiB, the default, and 512.
(Liger's fused linear cross-entropy is a Triton kernel and takes part where there is a GPU, in gpu_contest.py.)
PAIRS: hidden[2P, L, H], weight, target[2P, L] (first, then second responses), ref_logp[2P] → loss of P hard pairs.
"""

import torch
from cut_cross_entropy import linear_cross_entropy as cce
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearORPOLoss
from torch import nn
from torch.nn import functional as F
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from mopo_kernels import linear_logprob, mopo_loss, win_rate_from_pairs

BETA = 0.1
TAU = 0.08


# ---------------------------------------------------------------------------------------------------------------- heads


def eager_rows(hidden, weight, target):
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target == -100, 0)


compiled_rows = torch.compile(eager_rows, dynamic=False)


def trl_rows(hidden, weight, target):
    arguments = (None, target.clamp(min=0), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    return ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0].masked_fill(target == -100, 0)


HEADS = {
    "mopo, sum": lambda h, w, t: linear_logprob(h, w, t, reduction="sum"),
    "mopo, per row": lambda h, w, t: linear_logprob(h, w, t).sum(),
    "mopo, sum, 512 MiB": lambda h, w, t: linear_logprob(h, w, t, reduction="sum", workspace_bytes=2**29),
    "mopo, per row, 512 MiB": lambda h, w, t: linear_logprob(h, w, t, workspace_bytes=2**29).sum(),
    "eager": lambda h, w, t: eager_rows(h, w, t).sum(),
    "torch.compile": lambda h, w, t: compiled_rows(h, w, t).sum(),
    "torch linear_cross_entropy": lambda h, w, t: (
        -F.linear_cross_entropy(h, w, t, reduction="sum", options=nn.LinearCrossEntropyOptions())
    ),
    "CCE torch_compile": lambda h, w, t: -cce(h, w, t, reduction="sum", impl="torch_compile"),
    "TRL ChunkedLogProbFunction": lambda h, w, t: trl_rows(h, w, t).sum(),
}


# ---------------------------------------------------------------------------------------------------------------- pairs


def dpo(rows):
    """DPO as TRL writes it, over a function that gives per-token log-probs of flat rows."""

    def loss(hidden, weight, target, ref_logp):
        logp = rows(hidden.flatten(0, 1), weight, target.flatten()).view(target.shape).sum(-1)
        chosen, rejected = (logp - ref_logp).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return loss


def mopo(policy_step):
    def loss(hidden, weight, target, ref_logp):
        pairs = len(target) // 2
        labels = (win_rate_from_pairs(torch.ones(pairs, 1)), torch.arange(pairs).repeat(2), torch.ones(1))
        return mopo_loss(hidden, weight, target, *labels, tau=TAU, policy_step=policy_step, ref_logp=ref_logp).loss

    return loss


liger_dpo = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)  # as with a reference computed beforehand
liger_orpo = LigerFusedLinearORPOLoss(beta=BETA)

PAIRS = {
    "mopo_loss clone": mopo("clone"),
    "mopo_loss contrast": mopo("contrast"),
    "eager DPO": dpo(eager_rows),
    "TRL ChunkedLogProbFunction DPO": dpo(trl_rows),
    "Liger fused DPO": lambda h, w, t, ref_logp: liger_dpo(w, h, t)[0],
    "Liger fused ORPO": lambda h, w, t, ref_logp: liger_orpo(w, h, t)[0],
}
