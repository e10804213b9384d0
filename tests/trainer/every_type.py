"""Every causal LM type of the installed transformers as a tiny random model, made in memory.

Sizes are set by the names that configurations use for them, layers are one of each kind that the type mixes, and what a
released configuration sets and a default one leaves neutral (scales of logits, windows) is set here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mopo_trainer.data.packing import SequenceBatch
from mopo_trainer.files import write_json
from mopo_trainer.training.fit import check_positions
from mopo_trainer.training.head import Scoring
from mopo_trainer.training.probe import probe_scoring, sharing_obstacle

VOCABULARY = 300
EVERY_TYPE = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Attributes of every configuration that has them.
VALUES = {
    **dict.fromkeys(["vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["embedding_size", "embedding_dim", "input_embedding_size", "output_embedding_size"], 32),
    **dict.fromkeys(["attention_hidden_size", "d_inner", "intermediate_size", "ffn_dim", "d_ff", "n_inner"], 64),
    **dict.fromkeys(["ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"], 64),
    **dict.fromkeys(["feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size", "mlp_dim"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["shared_experts_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "router_hidden_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"], 2),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(
        ["head_dim", "dim_head", "kv_channels", "d_head", "d_kv", "swa_head_dim", "attention_head_size"], 8
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"], 2),
    **dict.fromkeys(["n_group", "num_expert_group", "topk_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(
        ["q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "laurel_rank", "adapter_rank"], 16
    ),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["index_n_heads", "n_mamba_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "mamba_head_dim"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"], 128),
    **dict.fromkeys(["max_target_positions", "max_source_positions", "model_max_length"], 128),
    **dict.fromkeys(["mamba_d_head", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"], 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(["lru_width", "hidden_size_per_layer_input"], 32),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "local_attention"], 6),
    **dict.fromkeys(["window_size", "attention_chunk_size"], 6),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Values that a released model has and a default configuration hides.
    "is_decoder": True,
    "logits_scaling": 8.0,
    "lm_head_multiplier": 0.02,
    "use_sliding_window": True,
    "max_window_layers": 1,
}

SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 50,
    "heads_per_ngram": 2,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 1,
    "hc_lowrank": 8,
}

# What a type needs beside that; a key "type:word" is a variant of the type.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bert:encoder": {"is_decoder": False},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_config": {"hidden_size_global": 32, "num_key_value_heads": 4},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": {
        "text_config": {"q_lora_rank": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_key_value_heads": 4},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "doge:experts": {"is_moe": True},
    "falcon:alibi": {"alibi": True},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": SHARED_KEYS | {"activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0]},
    "gemma4_text": SHARED_KEYS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama:no windows": {},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral:no window": {"sliding_window": None},
    "mpt": {"logit_scale": 0.5},
    "qwen2:no window": {"use_sliding_window": False},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
    },
    "roc_bert": {
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}

VARIANTS = [name for name in ARGUMENTS if ":" in name]
TABLE = Path(__file__).with_suffix(".json")  # outcome of each, written by running this file


def tiny_model(name: str, **more: Any) -> PreTrainedModel:
    """The type or variant `name` with lively random weights, in evaluation mode; `more` goes into its configuration."""
    kind = CONFIG_MAPPING[name.partition(":")[0]]
    torch.manual_seed(0)
    arguments = _merged(_merged(_arguments(kind()), ARGUMENTS.get(name, {})), more)
    model = AutoModelForCausalLM.from_config(kind(**arguments))
    _enliven(model.eval())
    return model


def _arguments(default: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of a configuration like `default` with every size small and a layer of each kind."""
    found: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = _arguments(value)
        elif name in VALUES and not isinstance(value, (list, dict)):
            found[name] = VALUES[name]
    if "kv_lora_rank" in found:  # latent attention has as many key heads as query heads
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found | _layers_of_each_kind(default)


def _layers_of_each_kind(default: PreTrainedConfig) -> dict[str, Any]:
    kinds = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        value = getattr(default, name, None)
        if isinstance(value, (list, tuple)) and name in vars(default):
            kinds[name] = list(dict.fromkeys(value))
    if not kinds:
        return {}
    layers = max(2, *map(len, kinds.values()))
    lists = {name: each + [each[-1]] * (layers - len(each)) for name, each in kinds.items()}
    return {"num_hidden_layers": layers} | lists


def _merged(arguments: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` with `more` in their place, inside nested configurations as well."""
    both = {k: _merged(arguments[k], v) for k, v in more.items() if isinstance(arguments.get(k), dict)}
    return arguments | more | both


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Make weights large and biases not zero: at the usual 0.02 every token is as likely and faults go unseen."""
    for parameter in model.parameters():
        if parameter.ndim >= 2 and 0 < parameter.std() < 0.05:
            parameter *= 10
        elif parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    head = model.get_output_embeddings()
    logits = model(input_ids=torch.arange(10, 26)[None], use_cache=False).logits
    if isinstance(head, nn.Module) and head.weight is not model.get_input_embeddings().weight:
        head.weight *= 2 / logits.std(-1).mean()


def router_options(name: str) -> dict[str, Any]:
    """Arguments with which the type reports a router loss, under the names that types use, {} where it has none."""
    default = CONFIG_MAPPING[name.partition(":")[0]]()
    text = default.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return {}
    weights = {key: 0.5 for key in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(text, key)}
    options = {"output_router_logits": True} | weights
    return options if text is default else {"text_config": options}


UNBUILT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for a larger model: its layers read that model's keys",
    "gemma4_unified_assistant": "drafts for a larger model: its layers read that model's keys",
    "musicgen": "its decoder predicts codes of sound",
    "musicgen_melody": "its decoder predicts codes of sound",
}
PROMPT = [11, 250, 73, 19, 140, 66, 205]
SEQUENCES = [([*PROMPT, 31, 88, 270, 154, 12, 99, 231, 47, 180], 7), ([*PROMPT, 263, 41, 117, 8, 202], 7)]


def outcome(name: str) -> dict[str, str]:
    """What the trainer does with the type, after checking log-probabilities and gradients against the model's own.

    Raises AssertionError where they differ without a refusal.
    """
    model = tiny_model(name)
    try:
        scoring = probe_scoring(model, SEQUENCES[0][0], Scoring(pad_token_id=0))
    except ValueError as error:
        return {"logits": f"refused: {error}"}
    obstacle = sharing_obstacle(model, SEQUENCES, scoring)
    for one in [scoring] if obstacle else [scoring, replace(scoring, share_prompt=True)]:
        _check(model, one, gradients=name != "reformer")  # whose backward pass asks for dropout
    transform = scoring.transform
    fused = transform and f"fused, logit_scale {transform.logit_scale:.4g}, softcap {transform.softcap}"
    return {
        "logits": fused or "through the model's logits",
        "share_prompt": (obstacle and f"off: {re.sub(r'are [0-9.e-]+ off', 'differ', obstacle)}") or "exact",
        "positions": _positions(model),
    }


def _check(model: PreTrainedModel, scoring: Scoring, *, gradients: bool) -> None:
    if not gradients:
        with torch.no_grad():
            return torch.testing.assert_close(_logps(model, scoring), _own(model), rtol=1e-5, atol=1e-3)
    found, truth = _with_gradients(model, lambda: _logps(model, scoring)), _with_gradients(model, lambda: _own(model))
    torch.testing.assert_close(found[0], truth[0], rtol=1e-5, atol=1e-3)
    for name, gradient in truth[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6)


def _with_gradients(model: PreTrainedModel, logps: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    found = logps()
    (found * torch.tensor([1.0, -0.7])).sum().backward()
    named = model.named_parameters()
    return found.detach(), {name: x.grad.clone() for name, x in named if x.grad is not None and x.grad.any()}


def _logps(model: PreTrainedModel, scoring: Scoring) -> torch.Tensor:
    packed = scoring.pack(SequenceBatch.of(SEQUENCES), torch.zeros(2, dtype=torch.long))
    return scoring.logp(model, scoring.forward(model, model, packed).states, packed).double()


def _own(model: PreTrainedModel) -> torch.Tensor:
    found = []
    for ids, prompt in SEQUENCES:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[prompt - 1 :].sum())
    return torch.stack(found)


def _positions(model: PreTrainedModel) -> str:
    """What becomes of five tokens more than the model has positions."""
    try:
        check_positions(model, 133)
    except ValueError:
        return "refused"
    with torch.no_grad():
        model(input_ids=torch.ones(1, 133, dtype=torch.long), use_cache=False)
    return "run"


if __name__ == "__main__":
    table = {name: outcome(name) for name in tqdm([*EVERY_TYPE, *VARIANTS]) if name not in UNBUILT}
    write_json(TABLE, table)
