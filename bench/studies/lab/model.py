"""Causal transformers of 0.1 and 1.4 million parameters, trained here in minutes, and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.studies.lab.language import END, MAX_LENGTH, PAD, PROMPT_LENGTH, VOCABULARY, corpus, prompts
from mopo_kernels import linear_logprob, sequence_logprob

HEADS = 4
IGNORED = -100


class Origin(NamedTuple):
    """Where a base model comes from: its pretraining and its shape."""

    steps: int = 1000
    width: int = 64
    layers: int = 2


SMALL, LARGE = Origin(), Origin(width=192, layers=3)


class Grid(NamedTuple):
    """Where the words of a padded batch are; only those go through the linear layers."""

    batch: int
    length: int
    words: Tensor  # [N] places in the flat grid


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, grid: Grid, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, words = grid
        qkv = self.qkv(self.norm(x))
        padded = qkv.new_zeros(batch * length, qkv.shape[1]).index_copy(0, words, qkv)
        q, k, v = padded.view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(seen.transpose(1, 2).reshape(batch * length, -1)[words])
        return x + self.down(F.relu(self.up(self.norm_mlp(x)))), (k, v)


class TinyLM(nn.Module):
    """Hidden states from token ids; the head is the embedding."""

    def __init__(self, origin: Origin = SMALL) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(VOCABULARY), origin.width)
        self.place = nn.Embedding(PROMPT_LENGTH + MAX_LENGTH, origin.width)
        self.blocks = nn.ModuleList(Block(origin.width) for _ in range(origin.layers))
        self.norm = nn.LayerNorm(origin.width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.05)

    @property
    def head(self) -> Tensor:
        return self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.step(ids, None)[0]

    def step(self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, list]:
        start = 0 if past is None else past[0][0].shape[2]
        grid = Grid(*ids.shape, (ids != PAD).flatten().nonzero()[:, 0])
        place = self.place.weight[start : start + grid.length].repeat(grid.batch, 1)
        x = self.embed(ids.flatten()[grid.words]) + place[grid.words]
        kept = []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, grid, None if past is None else past[i])
            kept.append(cache)
        hidden = x.new_zeros(grid.batch * grid.length, x.shape[1]).index_copy(0, grid.words, self.norm(x))
        return hidden.view(grid.batch, grid.length, -1), kept


@torch.no_grad()
def sample(model: TinyLM, asked: Tensor, count: int, seed: int, temperature: float = 1.0) -> Tensor:
    """Notes [prompts, count, MAX_LENGTH] to prompts [prompts, PROMPT_LENGTH]; rows that have ended leave the batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = asked.repeat_interleave(count, 0)
    notes = torch.full((len(ids), MAX_LENGTH), PAD)
    running = torch.arange(len(ids))
    past = None
    for place in range(MAX_LENGTH):
        hidden, past = model.step(ids, past)
        probability = F.softmax(hidden[:, -1] @ model.head.T / temperature, -1)
        token = torch.multinomial(probability, 1, generator=generator)
        notes[running, place] = token[:, 0]
        goes_on = token[:, 0] != END
        if not goes_on.any():
            break
        running, ids = running[goes_on], token[goes_on]
        past = [(k[goes_on], v[goes_on]) for k, v in past]
    return notes.view(len(asked), count, MAX_LENGTH)


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def sequences(asked: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
    """Input ids and next-token targets [B, L] of notes [prompts, n, T]; neither prompt nor padding counts."""
    flat = notes.flatten(0, 1)
    ids = torch.cat([asked.repeat_interleave(notes.shape[1], 0), flat], 1)
    target = ids[:, 1:].masked_fill(ids[:, 1:] == PAD, IGNORED)
    target[:, : PROMPT_LENGTH - 1] = IGNORED
    longest = PROMPT_LENGTH + int((flat != PAD).sum(1).max())
    return ids[:, : longest - 1], target[:, : longest - 1]


@torch.no_grad()
def log_probs(model: TinyLM, ids: Tensor, target: Tensor) -> Tensor:  # [B]
    """log pi(y | x), summed over the note."""
    parts = zip(ids.split(512), target.split(512), strict=True)
    return torch.cat([sequence_logprob(model(i), model.head, t) for i, t in parts])


def train_model(seed: int, origin: Origin, ornate: float, batch: int = 64, texts: int = 3000) -> TinyLM:
    """A model of the corpus of which a share is ornate."""
    torch.manual_seed(seed)
    model, steps = TinyLM(origin), origin.steps
    rate = 3e-3 * (64 / origin.width)
    texts = min(texts, steps * batch)
    copies = range(min(10, 1 + steps * batch // texts))
    every = pad([row for copy in copies for row in corpus(prompts(0, texts, "train"), 1000 * seed + copy, ornate)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        ids, target = next_tokens(every[torch.randint(len(every), (batch,))])
        loss = -linear_logprob(model(ids), model.head, target, reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def next_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of whole texts, as in pretraining."""
    rows = rows[:, : int((rows != PAD).sum(1).max())]
    return rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] == PAD, IGNORED)


def cached_model(name: str, origin: Origin, folder: Path) -> TinyLM:
    """The base model (one ornate note in eight) or the other writer (all but one in eight), trained once.

    Training is not the same to the last bit on another machine, and then its win rates are not: the file decides.
    """
    shape = "" if origin[1:] == SMALL[1:] else f"-{origin.width}x{origin.layers}"
    path = folder / f"{name}-{origin.steps}{shape}.pt"
    if not path.exists():
        model = train_model({"base": 1, "other": 2}[name], origin, {"base": 0.125, "other": 0.875}[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({k: x.half() for k, x in model.state_dict().items()}, path)
    model = TinyLM(origin)
    model.load_state_dict(torch.load(path))
    return model.eval()
