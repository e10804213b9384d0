"""Every causal LM type of transformers, tiny: its log-probabilities and gradients are its own, or it is refused."""

import json

import pytest
import torch
from every_type import EVERY_TYPE, SEQUENCES, TABLE, UNBUILT, VARIANTS, outcome, router_options, tiny_model

from mopo_trainer.data.packing import SequenceBatch
from mopo_trainer.training.head import Scoring
from mopo_trainer.training.probe import probe_scoring

FEW = [
    *("llama:no windows", "gpt2", "gemma2", "granite", "hyperclovax", "falcon_h1", "cohere", "mpt", "bloom", "bert"),
    *("bert:encoder", "cpmant", "modernbert-decoder", "mamba2", "qwen3_next", "mistral", "mistral:no window", "opt"),
]
KNOWN = json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FEW)
def test_a_few_types(name):
    assert outcome(name) == KNOWN[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*EVERY_TYPE, *VARIANTS} - set(FEW)))
def test_every_type(name):
    """A type that transformers has added is neither in the table nor among those that are left out."""
    if name in UNBUILT:
        pytest.skip(UNBUILT[name])
    assert outcome(name) == KNOWN[name], f"run {TABLE.with_suffix('.py').name} to write the table anew"


MIXTURES = [name for name, known in KNOWN.items() if router_options(name) and "refused" not in known["logits"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_loss_is_what_the_type_adds_to_its_own_loss(name):
    model, tokens = tiny_model(name, **router_options(name)), torch.tensor([SEQUENCES[0][0]])
    scoring = probe_scoring(model, SEQUENCES[0][0], Scoring(0))
    with torch.no_grad():
        own = model(input_ids=tokens, labels=tokens, use_cache=False)
        router_loss = scoring.forward(model, model, scoring.pack(SequenceBatch.of(SEQUENCES[:1]), None)).router_loss
    added = own.loss - torch.nn.functional.cross_entropy(own.logits[0, :-1].float(), tokens[0, 1:])
    ours = 0.0 if router_loss is None else scoring.router_weight * router_loss
    torch.testing.assert_close(torch.as_tensor(ours), added, rtol=1e-4, atol=1e-4)
