"""Log-probabilities of whole responses under a model: reference passes, lag refreshes, evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from mopo_trainer.data.packing import SequenceBatch, TokenSequence
from mopo_trainer.data.tokens import TokenizedGroups
from mopo_trainer.files import atomic_path
from mopo_trainer.training.head import Scoring
from mopo_trainer.training.split import whole

logger = logging.getLogger(__name__)


@torch.no_grad()
def response_logps(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    *,
    scoring: Scoring,
    accelerator: Accelerator,
    batch_size: int,
    row_of: Sequence[int] | None = None,
    description: str = "Log-probs",
) -> Tensor:  # [M]
    """log π(y|x), the sum over the response's tokens, of every response; float64 on the CPU, the same on every rank.

    `sequences` are (input_ids, prompt_tokens) pairs, those of equal `row_of` share their prompt's pass
    where `scoring` has it so. Rows are taken
    longest first, `batch_size` sequences at a time, shared among the ranks.
    """
    plain = accelerator.unwrap_model(model)
    row_of = row_of if scoring.share_prompt else None
    batches = _batches(sequences, row_of, batch_size)
    rank, world = accelerator.process_index, accelerator.num_processes
    total = torch.zeros(2, len(sequences), dtype=torch.float64)
    was_training = plain.training
    plain.eval()
    for i in tqdm(range(0, len(batches), world), desc=description, disable=not accelerator.is_local_main_process):
        indices = batches[(i + rank) % len(batches)]  # every rank runs as many forward passes as the others
        shared = torch.tensor([row_of[j] for j in indices]) if row_of else None
        chosen = SequenceBatch.of([sequences[j] for j in indices])
        packed = scoring.pack(chosen, shared).to(accelerator.device)
        states = scoring.forward(model, plain, packed).states
        with accelerator.autocast():
            logp = scoring.logp(plain, states, packed)
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


def initial_logps(
    file: Path, groups: TokenizedGroups, score: Callable[[TokenizedGroups], Tensor], accelerator: Accelerator
) -> Tensor:
    """`score(groups)`, from `file` if that holds what the model says now of the first two groups; kept there."""
    probe = groups.first(2)
    expected = score(probe)
    logp = broadcast_object_list([_read_logps(file, len(groups.group))])[0]  # one rank decides for all
    if logp is not None and _differs(logp, expected):
        logger.warning("%s holds other log-probs than the model gives now; computed anew", file)
        logp = None
    if logp is None:
        logp = score(groups)
        if _differs(logp, expected):
            logger.warning("the model's log-probs of the same tokens differ from pass to pass, and so the reference's")
        if accelerator.is_main_process:
            with atomic_path(file) as temporary:
                save_file({"logp": logp}, temporary)
        accelerator.wait_for_everyone()
    return logp


def _differs(logp: Tensor, expected: Tensor) -> bool:
    """Whether log-probs differ by more than another batch in half precision makes of them."""
    return not torch.allclose(logp[: len(expected)], expected, rtol=3e-2, atol=3e-2)


def _read_logps(file: Path, count: int) -> Tensor | None:
    """The cached log-probs; None if there are none, or with a warning if the file is not what was written."""
    if not file.is_file():
        return None
    try:
        logp = load_file(file)["logp"].double()
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s cannot be read (%s); computed anew", file, error)
        return None
    if logp.shape != (count,) or logp.isnan().any():
        logger.warning("%s holds %d log-probs, not %d numbers; computed anew", file, logp.numel(), count)
        return None
    return logp


VOLATILE = {  # of configurations: names, versions, and what saving a model writes into them
    *("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version"),
    *("architectures", "dtype", "use_cache", "inference_mode"),
}
STATES = {  # of modules: change no number
    *("training", "gradient_checkpointing", "warnings_issued", "_is_hf_initialized"),
    *("ds_id", "ds_grads_remaining", "applied_pre_backward_ref_cnt"),  # DeepSpeed's
}
CHUNK = 1 << 24  # bytes on the CPU at a time; SHA-256 reads 1.4 GB/s on one core with SHA instructions (14 GB in 10 s)


def policy_fingerprint(model: nn.Module, *numerics: Any) -> str:
    """Hash of all that a model's log-probs depend on, and not of names and paths.

    Bytes of parameters and buffers, configurations of model and adapters, the modules with the numbers they keep, the
    attention implementation, and what the caller knows of the arithmetic (`numerics`).
    """
    digest = hashlib.sha256(repr((numerics, getattr(model.config, "_attn_implementation", None))).encode())
    _hash_tensors(digest, {**dict(model.named_buffers()), **dict(model.named_parameters())})
    _hash_configs(digest, model)
    for name, module in model.named_modules():
        digest.update(repr((name, type(module).__qualname__, sorted(_numbers(module)))).encode())
    return digest.hexdigest()


def frozen_fingerprint(model: nn.Module) -> str:
    """Hash of what training leaves alone and a checkpoint may lack: frozen weights, configurations."""
    digest = hashlib.sha256()
    _hash_tensors(digest, {name: p for name, p in model.named_parameters() if not p.requires_grad})
    _hash_configs(digest, model)
    return digest.hexdigest()


def _hash_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        values = whole(tensor)
        digest.update(repr((name, tensor.dtype, tuple(values.shape))).encode())
        for chunk in values.reshape(-1).split(CHUNK // tensor.element_size()):
            own = chunk.to("cpu", copy=True)  # FSDP could not free what numpy has looked at
            digest.update(own.view(torch.uint8).numpy())


def _hash_configs(digest: hashlib._Hash, model: nn.Module) -> None:
    adapters = getattr(model, "peft_config", None) or {}
    for config in (model.config, *(adapters[name] for name in sorted(adapters))):
        digest.update(json.dumps(_settled(config.to_dict()), sort_keys=True, default=str).encode())


def _settled(value: Any) -> Any:
    """A configuration without what changes no number; sets in a fixed order."""
    if isinstance(value, Mapping):
        return {str(key): _settled(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value


def _numbers(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Numbers that a module keeps outside its tensors, such as an adapter's scaling, and its active adapters."""
    for name, value in vars(module).items():
        values = list(value.values()) if isinstance(value, dict) else [value]
        is_number = values and all(isinstance(v, int | float) for v in values)
        if name == "_active_adapter" or (is_number and name not in STATES):
            yield name, repr(value)
