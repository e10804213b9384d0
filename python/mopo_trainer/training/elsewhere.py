"""Options of TRL's configurations that MOPOConfig and `mopo train` do not have: what takes their place."""

from __future__ import annotations

from collections.abc import Iterable

from mopo_trainer.names import did_you_mean

_REFERENCE = "the reference policy is the model as training starts, scored once; there is nothing to set"
_LABELS = "labels are probabilities here: write 0.9 instead of 1 as the preference"
_QUANTISED = "load the quantised model in Python and hand it to MOPOTrainer with a peft_config"
_PEFT = "in Python, hand MOPOTrainer a peft_config with it"
_PADDING = "batches are padded to their longest sequence"
_LOSS = "policy_step is clone, contrast or regress"

ELSEWHERE = {
    "beta": "tau takes its place, the strength of the KL penalty: the same number for IPO (policy_step regress), but "
    "tau weighs the KL against win rates in [0, 1] where DPO's beta weighs it against rewards",
    "loss_type": "policy_step takes its place: contrast for sigmoid, regress for ipo, clone for sft; no other",
    "loss_weights": "policy_step is one loss; thresholds weigh the objectives",
    "label_smoothing": _LABELS,
    "reference_free": _REFERENCE,
    "precompute_ref_log_probs": _REFERENCE,
    "precompute_ref_batch_size": "per_device_eval_batch_size takes its place",
    "force_use_ref_model": _REFERENCE,
    "ref_model": _REFERENCE,
    "ref_model_init_kwargs": _REFERENCE,
    "model_adapter_name": "the adapter as training starts is the reference",
    "ref_adapter_name": "the adapter as training starts is the reference",
    "sync_ref_model": "lag_steps takes its place: the reference moves to the policy of one lag ago",
    "ref_model_sync_steps": "lag_steps takes its place",
    "ref_model_mixup_alpha": "lag_steps replaces the reference as a whole, nothing is mixed",
    "rpo_alpha": "policy_step clone is a weighted log-likelihood; there is no term to add to contrast",
    "max_completion_length": "max_length bounds prompt + response; max_prompt_length the prompt",
    "truncation_mode": "prompts lose their beginning, responses their end",
    "dataset_num_proc": "one process reads the rows",
    "padding_free": _PADDING,
    "pad_to_multiple_of": _PADDING,
    "padding_value": "the tokenizer's pad token is used",
    "label_pad_token_id": "prompts never enter the loss",
    "pad_token": "set tokenizer.pad_token and save the tokenizer",
    "disable_dropout": "dropout stays as the model's config has it: set it to 0 there",
    "use_weighting": _LOSS,
    "use_logits_to_keep": "only responses enter the LM head, always",
    "generate_during_eval": "evaluation reads log-probs of the held-out responses; nothing is sampled",
    "ld_alpha": _LOSS,
    "discopop_tau": _LOSS,
    "f_divergence_type": "the divergence is the reverse KL",
    "f_alpha_divergence_coef": "the divergence is the reverse KL",
    "activation_offloading": "activation_checkpointing saves memory",
    "router_aux_loss_coef": "set router_aux_loss_coef and output_router_logits in the model's config",
    "model_init_kwargs": "load the model in Python; `mopo train` has dtype, attn_implementation, model_revision",
    "model_name": "model_name_or_path takes its place",
    "torch_dtype": "dtype takes its place",
    "use_peft": "a rank takes its place: lora_r > 0 trains an adapter",
    "lora_task_type": "always CAUSAL_LM",
    "lora_modules_to_save": _PEFT,
    "lora_target_parameters": _PEFT,
    "use_rslora": _PEFT,
    "use_dora": _PEFT,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "bnb_4bit_quant_type": _QUANTISED,
    "use_bnb_nested_quant": _QUANTISED,
    "bnb_4bit_quant_storage": _QUANTISED,
    "dataset_name": "dataset takes its place (file, directory or hub name); dataset_config names a configuration",
    "datasets": "dataset takes its place, one source; join the files before",
    "dataset_train_split": "dataset_split takes its place",
    "dataset_test_split": "eval_dataset and eval_split take its place",
    "dataset_streaming": "all labels are read before the first step; max_train_samples takes the first so many groups",
    "ignore_bias_buffers": "nothing in its place",
    "warmup_ratio": "warmup_steps takes its place: below 1 it is a share of all steps",
    "group_by_length": "batches are of groups of several responses; leave it out",
    "evaluation_strategy": "eval_strategy takes its place",
    "tokenizer": "MOPOTrainer takes it as processing_class",
}


def whats_instead(name: str, known: Iterable[str]) -> str:
    """ ": …" or "; did you mean …" behind the name of an option that does not exist; nothing for one like no other."""
    reason = ELSEWHERE.get(name.replace("-", "_"))
    return f": {reason}" if reason else did_you_mean(name, known)
