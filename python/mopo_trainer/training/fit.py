"""Whether tokens and lengths fit a model's tables: said when the trainer is made, not by an index out of range."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mopo_trainer.data.sources import DataError, one_line
from mopo_trainer.data.tokens import TokenizedGroups
from mopo_trainer.training.adapter import active_config
from mopo_trainer.training.split import whole_shape

logger = logging.getLogger(__name__)


def check_tokens(model: PreTrainedModel, groups: TokenizedGroups, tokenizer: Any) -> None:
    """Raise DataError for a token that the model does not embed or cannot predict."""
    rows = vocabulary(model)
    if groups.largest_token() < rows:
        return
    row, token = next(
        (i, max(chain(*row))) for i, row in enumerate(groups.dataset["input_ids"]) if max(chain(*row)) >= rows
    )
    raise DataError(
        f"row {row}: token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, and the model's vocabulary ends "
        f"at {rows - 1}; use the model's own tokenizer, or call "
        f"model.resize_token_embeddings({max(len(tokenizer), token + 1)}) and train the new rows"
    )


def vocabulary(model: PreTrainedModel) -> int:
    """Ids that the model both embeds and predicts."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = [whole_shape(table.weight)[0] for table in tables if isinstance(getattr(table, "weight", None), Tensor)]
    return min(rows, default=model.config.get_text_config().vocab_size)


def pad_token(model: PreTrainedModel, tokenizer: Any) -> int:
    """An id to fill rows with: masked everywhere, it only has to be one that the model embeds."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < vocabulary(model):
            return candidate
    return 0


POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "n_ctx")


@torch.no_grad()
def check_positions(plain: PreTrainedModel, longest: int) -> None:
    """Sequences beyond the model's position table are refused, beyond its trained positions they are told.

    Raises:
        ValueError: the model has a table of positions that ends before `longest`, or fails at that length.
    """
    config = plain.config.get_text_config()
    named = [getattr(config, name, None) for name in POSITIONS]
    limit = min((x for x in named if isinstance(x, int) and x > 0), default=longest)
    limit -= getattr(active_config(plain), "num_virtual_tokens", None) or 0  # an adapter's, in front
    tables = [rows for rows in _table_rows(plain) if limit - 8 <= rows <= limit + 8]
    usable = min(limit, *tables) if tables else limit
    if longest <= usable:
        return
    refusal = f"the longest sequence has {longest} tokens and the model {usable} positions; set max_length={usable}"
    if tables:
        raise ValueError(refusal)
    try:
        plain(input_ids=torch.zeros(1, longest, dtype=torch.long, device=plain.device), use_cache=False)
    except Exception as error:  # models of any library
        raise ValueError(f"{refusal} ({type(error).__name__}: {one_line(error, 80)})") from error
    logger.warning(
        "the longest sequence has %d tokens and the model was made for %d positions; max_length=%d keeps to them",
        *(longest, limit, limit),
    )


def _table_rows(plain: PreTrainedModel) -> Iterator[int]:
    """Lengths of what may be tables of positions: embeddings other than the tokens', and buffers."""
    tokens = plain.get_input_embeddings()
    for module in plain.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # where positions begin (RoBERTa)
            yield module.num_embeddings - before
    for buffer in plain.buffers():
        yield from buffer.shape
