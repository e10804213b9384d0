"""Log-probabilities of whole responses under a model: reference passes, lag refreshes, evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from mopo_kernels import sequence_logprob
from mopo_trainer.data.packing import SequenceBatch, TokenSequence, pack
from mopo_trainer.training.head import LMHead, response_hidden_states


@torch.no_grad()
def response_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    accelerator: Accelerator,
    batch_size: int,
    pad_token_id: int,
    row_of: Sequence[int] | None = None,
    backend: str | None = None,
    description: str = "Log-probs",
) -> Tensor:  # [M]
    """log π(y|x), the sum over the response's tokens, of every response; float64 on the CPU, the same on every rank.

    `sequences` are (input_ids, prompt_tokens) pairs, those of equal `row_of` share their prompt's pass. Rows are taken
    longest first, `batch_size` sequences at a time, shared among the ranks.
    """
    plain = accelerator.unwrap_model(model)
    batches = _batches(sequences, row_of, batch_size)
    rank, world = accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, len(sequences), dtype=torch.float64)
    was_training = plain.training
    plain.eval()
    for i in tqdm(range(0, len(batches), world), desc=description, disable=not accelerator.is_local_main_process):
        indices = batches[(i + rank) % len(batches)]  # every rank runs as many forward passes as the others
        shared = torch.tensor([row_of[j] for j in indices]) if row_of else None
        chosen = SequenceBatch.of([sequences[j] for j in indices])
        packed = pack(chosen, shared, pad_token_id).to(accelerator.device)
        hidden = response_hidden_states(model, plain, packed)
        head = LMHead.of(plain)
        with accelerator.autocast():
            logp = sequence_logprob(
                hidden.to(head.weight.dtype), head.weight, packed.target, backend=backend, **head.options
            )
        total[0, indices] += logp.double().cpu()
        total[1, indices] += 1
    plain.train(was_training)
    if world > 1:
        total = accelerator.reduce(total.to(accelerator.device), reduction="sum").cpu()
    return total[0] / total[1]


def _batches(sequences: Sequence[TokenSequence], row_of: Sequence[int] | None, batch_size: int) -> list[list[int]]:
    """Indices of sequences, whole rows together, longest rows first, up to `batch_size` (at least a row) a batch."""
    rows = [list(row) for _, row in groupby(range(len(sequences)), key=row_of.__getitem__ if row_of else None)]
    rows.sort(key=lambda row: sum(len(sequences[i][0]) for i in row), reverse=True)
    batches: list[list[int]] = []
    for row in rows:
        if not batches or len(batches[-1]) + len(row) > batch_size:
            batches.append([])
        batches[-1] += row
    return batches


def parameters_fingerprint(model: nn.Module, is_reference: Callable[[nn.Parameter], bool]) -> str:
    """Hash of the reference weights: names, shapes and, per parameter, its sum and absolute sum in float64."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if is_reference(parameter):
            values = parameter.detach()
            sums = (values.sum(dtype=torch.float64).item(), values.abs().sum(dtype=torch.float64).item())
            digest.update(repr((name, tuple(parameter.shape), sums)).encode())
    return digest.hexdigest()
