"""A tiny tokenizer, a tiny random model and a few labelled pairs, made in memory; log-probs the plain way."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer():
    """Byte-level, no merges: every text is a sequence of bytes, plus chat and special tokens."""
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=special[2:]
    )
    made.chat_template = CHAT_TEMPLATE
    return made


SIZES = {  # of Llama and its kin
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def make_tiny_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def make_pairs():
    """Eight conflicting pairs: the friendlier answer is the longer one, except in one pair."""
    rows = []
    for i in range(8):
        friendly, brief = f"Of course, my dear friend number {i}!", f"No {i}."
        rows.append(
            {
                "prompt": f"Question {i}?",
                "chosen": friendly,
                "rejected": brief,
                "preference": {"friendly": 1.0, "brief": 0.0 if i else 1.0},
            }
        )
    return rows


@torch.no_grad()
def plain_logps(model, sequences):
    """log π(response | prompt) of each (input_ids, prompt_tokens) alone, from the model's own logits."""
    model.eval()
    found = []
    for ids, prompt in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(picked[prompt - 1 :].sum())
    return torch.stack(found)
