"""Tokens and lengths that a model's tables do not hold: said in one line when the trainer is made."""

import pytest
import torch
from tiny import make_pairs, make_tiny_model, make_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from mopo_trainer.data.sources import DataError
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.fit import check_positions, pad_token
from mopo_trainer.training.trainer import MOPOTrainer


def make(tmp_path, model, tokenizer, rows, **options):
    settings = {"output_dir": str(tmp_path), "primary": "friendly", "use_cpu": True, "report_to": "none"}
    settings |= {"max_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return MOPOTrainer(model, MOPOConfig(**(settings | options)), rows, processing_class=tokenizer)


def test_a_text_token_beyond_the_vocabulary(tmp_path, tiny_model):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<emotion>"])
    rows = make_pairs()
    rows[3]["rejected"] += "<emotion>"
    message = (
        r"row 3: token '<emotion>' has id 261, and the model's vocabulary ends at 260; use the model's own tokenizer, "
        r"or call model.resize_token_embeddings\(262\)"
    )
    with pytest.raises(DataError, match=message):
        make(tmp_path, tiny_model, tokenizer, rows)
    tiny_model.resize_token_embeddings(262)
    make(tmp_path, tiny_model, tokenizer, rows)


def test_a_pad_token_beyond_the_vocabulary_need_not_be_embedded(tmp_path, tiny_model):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added pad>"})
    assert tokenizer.pad_token_id == 261
    found = []
    for tokens in (tokenizer, make_tokenizer()):
        model = make_tiny_model(make_tokenizer())
        trainer = make(tmp_path, model, tokens, make_pairs(), per_device_train_batch_size=8)
        trainer.start_dual()
        found.append(trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))))
        trainer.train()
    assert torch.equal(*found)


def test_without_pad_and_end_tokens(tmp_path, tiny_model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_token(tiny_model, tokenizer) == 0
    make(tmp_path, tiny_model, tokenizer, make_pairs()).train()


SMALL = {"vocab_size": 261, "n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2}
MODELS = {
    "table": lambda: GPT2LMHeadModel(GPT2Config(**SMALL)),
    "buffer": lambda: GPTJForCausalLM(GPTJConfig(**SMALL, rotary_dim=8)),
    "table behind padding": lambda: RobertaForCausalLM(
        RobertaConfig(
            vocab_size=261,
            max_position_embeddings=26,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            is_decoder=True,
        )
    ),
    "offset": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=261,
            max_position_embeddings=24,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        )
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_sequences_beyond_the_position_table(kind):
    model = MODELS[kind]().eval()
    check_positions(model, 24)
    model(input_ids=torch.full((1, 24), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 25), 5))
    with pytest.raises(ValueError, match="has 25 tokens and the model 24 positions; set max_length=24"):
        check_positions(model, 25)


def test_positions_beyond_those_of_training_are_told(tiny_model, caplog):
    check_positions(tiny_model, 512)
    assert not caplog.records
    check_positions(tiny_model, 513)
    assert "has 513 tokens and the model was made for 512 positions; max_length=512 keeps to them" in caplog.text


def test_a_model_that_fails_at_the_length_is_refused(tiny_model, monkeypatch):
    def forward(**inputs):
        raise RuntimeError(f"no room for {inputs['input_ids'].shape[1]}")

    monkeypatch.setattr(tiny_model, "forward", forward)
    with pytest.raises(ValueError, match=r"set max_length=512 \(RuntimeError: no room for 513\)"):
        check_positions(tiny_model, 513)


def test_the_trainer_looks_at_the_longest_sequence(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="has 47 tokens and the model 24 positions"):
        make(tmp_path, MODELS["table"](), tokenizer, make_pairs())
    make(tmp_path, MODELS["table"](), tokenizer, make_pairs(), max_length=24, max_prompt_length=12)


def test_held_out_sequences_are_looked_at_too(tmp_path, tokenizer):
    short = [row | {"chosen": "Yes!", "rejected": "No"} for row in make_pairs()]
    trainer = make(tmp_path, MODELS["table"](), tokenizer, short)
    with pytest.raises(ValueError, match="has 47 tokens and the model 24 positions"):
        trainer.evaluate(make_pairs())
