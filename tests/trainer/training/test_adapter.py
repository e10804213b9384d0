"""Adapters of every kind: log-probs, the reference they start from, what is refused, what a resume keeps."""

import copy
import math

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny import make_pairs, make_tiny_model, plain_logps
from transformers import AutoModelForCausalLM

from mopo_trainer.training.adapter import check_trainable
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.head import linear_head
from mopo_trainer.training.trainer import MOPOTrainer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def make(tmp_path, model, tokenizer, *, peft_config=None, eval_dataset=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "primary": "friendly",
        "thresholds": ["brief=0.4"],
        "policy_step": "contrast",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    args = MOPOConfig(**{**defaults, **options})
    return MOPOTrainer(model, args, make_pairs(), eval_dataset, tokenizer, peft_config)


def moved(model, scale=0.3):
    """The model with its trainable weights away from where adapters start, as after training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@torch.no_grad()
def own_logps(model, sequences):
    """log π(response | prompt) from the model's own logits, those of virtual tokens in front left out."""
    model.eval()
    found = []
    for ids, prompt in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1].double()
        picked = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(picked[prompt - 1 :].sum())
    return torch.stack(found)


def first_loss(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch).item()


def check_run(trainer):
    """The log-probs are the model's own, the reference is the start (also once trained), the loss starts at ln 2."""
    model, sequences = trainer.model, trainer.train_groups.sequences()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = own_logps(model, sequences)
    trainer.start_dual()
    torch.testing.assert_close(trainer.reference["train"], expected, rtol=1e-5, atol=1e-4)
    assert first_loss(trainer) == pytest.approx(math.log(2), abs=1e-4)
    trainer.train()
    trained = trainer._response_logps(trainer.train_groups, description="now")
    torch.testing.assert_close(trained, own_logps(model, sequences), rtol=1e-5, atol=1e-4)
    assert (trained - expected).abs().max() > 1e-5, "the run trains"
    groups = trainer.train_groups.first(3)
    found = trainer._initial_logps(groups, "other")
    torch.testing.assert_close(found, expected[: len(groups.group)], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        trainer._response_logps(trainer.train_groups, description="again"), trained, rtol=0, atol=0
    )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


KINDS = {
    "LoRA": LoraConfig(**LORA),
    "DoRA with biases": LoraConfig(**LORA, use_dora=True, bias="all"),
    "IA3": IA3Config(task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PiSSA": LoraConfig(**LORA, init_lora_weights="pissa"),
    "OLoRA": LoraConfig(**LORA, init_lora_weights="olora"),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[9, 50]),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "LoRA on the head": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "embedding": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "both, tied": LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}


HEADS = ("tokens", "head", "LoRA on the head", "embedding", "both, tied")  # to the others a tied head is as good
CASES = [(kind, True) for kind in KINDS] + [
    pytest.param(kind, False, marks=[] if kind in HEADS else pytest.mark.slow) for kind in KINDS
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_reference_is_the_policy_at_the_start(tmp_path, tokenizer, kind, tied):
    model = make_tiny_model(tokenizer)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    moved(model, 0.1)
    torch.manual_seed(0)
    adapted = moved(get_peft_model(model, copy.deepcopy(KINDS[kind])))  # as after supervised fine-tuning
    check_run(make(tmp_path, adapted, tokenizer))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["head", "both, tied"])
def test_the_head_of_the_loss_is_the_one_that_trains(tmp_path, tokenizer, kind):
    model = make_tiny_model(tokenizer)
    trainer = make(tmp_path, model, tokenizer, peft_config=copy.deepcopy(KINDS[kind]))
    weight = linear_head(trainer.model).weight
    embedding = trainer.model.get_input_embeddings()
    assert weight.requires_grad
    assert (weight is embedding.weight) == (kind == "both, tied")
    trainer.start_dual()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    assert weight.grad.abs().max() > 0
    with trainer.model.disable_adapter():
        assert not linear_head(trainer.model).weight.requires_grad


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["LoRA", "head", "embedding", "both, tied", "tokens", "LoRA on the head"])
def test_merged_saved_and_loaded_a_tied_head_is_what_was_trained_or_a_warning_was_given(
    tmp_path, tokenizer, caplog, kind
):
    ids = torch.tensor([[5, 9, 50, 70, 80]])
    torch.manual_seed(0)
    adapted = moved(get_peft_model(make_tiny_model(tokenizer), copy.deepcopy(KINDS[kind]))).eval()
    check_trainable(adapted, share_prompt=False, gradient_checkpointing=False)
    trained = adapted(input_ids=ids).logits
    adapted.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    is_same = torch.allclose(loaded, trained, rtol=1e-5, atol=1e-5)
    assert is_same == (kind != "LoRA on the head")
    assert ("merged into the model it changes both ends" in caplog.text) == (not is_same)


# ------------------------------------------------------------------------------------------------- what is refused


def saved_adapter(tmp_path, tokenizer, **options):
    adapted = moved(get_peft_model(make_tiny_model(tokenizer), LoraConfig(**{**LORA, **options})))
    adapted.save_pretrained(tmp_path / "sft")
    return adapted, str(tmp_path / "sft")


@pytest.mark.parametrize("policy_step", ["clone", "contrast"])
def test_an_adapter_loaded_for_inference_is_refused(tmp_path, tokenizer, policy_step):
    _, directory = saved_adapter(tmp_path, tokenizer)
    frozen = PeftModel.from_pretrained(make_tiny_model(tokenizer), directory)
    with pytest.raises(ValueError, match=r"nothing is trainable.*is_trainable=True"):
        make(tmp_path, frozen, tokenizer, policy_step=policy_step)


def test_an_adapter_loaded_to_train_starts_where_it_was(tmp_path, tokenizer):
    adapted, directory = saved_adapter(tmp_path, tokenizer)
    model = PeftModel.from_pretrained(make_tiny_model(tokenizer), directory, is_trainable=True)
    trainer = make(tmp_path, model, tokenizer)
    trainer.start_dual()
    expected = plain_logps(adapted, trainer.train_groups.sequences())
    torch.testing.assert_close(trainer.reference["train"], expected, rtol=1e-5, atol=1e-4)


def merged(model):
    model.merge_adapter()
    return model


def switched_off(model):
    model.base_model.disable_adapter_layers()
    return model


def other_active(model):
    model.add_adapter("other", LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".other." in name)
    return model


def norm_unfrozen(model):
    model.get_base_model().model.norm.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (merged, "merged.*unmerge_adapter"),
        (switched_off, "switched off.*enable_adapter_layers"),
        (other_active, r"nothing trainable reaches the loss.*\.other\..*active is \['default'\]"),
        (norm_unfrozen, "norm.weight is trainable but belongs to no adapter.*modules_to_save"),
    ],
)
def test_adapters_that_would_train_nothing_or_keep_nothing_are_refused(tmp_path, tokenizer, change, message):
    adapted = change(get_peft_model(make_tiny_model(tokenizer), LoraConfig(**LORA)))
    with pytest.raises(ValueError, match=message):
        make(tmp_path, adapted, tokenizer)


def test_weights_that_would_train_in_float16_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"float16, where gradients .* dtype=torch\.float32"):
        check_trainable(make_tiny_model(tokenizer).half(), share_prompt=False, gradient_checkpointing=False)


def test_a_frozen_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"every parameter of the model is frozen.*requires_grad_"):
        make(tmp_path, make_tiny_model(tokenizer).requires_grad_(False), tokenizer)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_second_adapter_is_refused(tmp_path, tokenizer, targets):
    adapted, _ = saved_adapter(tmp_path, tokenizer)
    inside = make_tiny_model(tokenizer)
    inside.add_adapter(LoraConfig(**LORA))
    for model in (adapted, inside):
        with pytest.raises(ValueError, match=r"carries an adapter and peft_config asks for another.*merge_and_unload"):
            make(tmp_path, model, tokenizer, peft_config=LoraConfig(target_modules=targets))
    adapted.is_quantized = True
    with pytest.raises(ValueError, match="merging into a quantised one rounds it"):
        make(tmp_path, adapted, tokenizer, peft_config=LoraConfig(target_modules=targets))


def test_wrapped_models_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="model is a DataParallel; give the transformers or peft model inside"):
        make(tmp_path, torch.nn.DataParallel(make_tiny_model(tokenizer)), tokenizer, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("prompt tuning", {"share_prompt": True}, "share_prompt cannot place the virtual tokens of PROMPT_TUNING"),
        ("prefix tuning", {"gradient_checkpointing": True}, "would drop the virtual tokens of PREFIX_TUNING"),
    ],
)
def test_virtual_tokens_without_what_misplaces_them(tmp_path, tokenizer, kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, make_tiny_model(tokenizer), tokenizer, peft_config=copy.deepcopy(KINDS[kind]), **options)


# ---------------------------------------------------------------------------------------------- states that stay


def test_frozen_parts_and_active_adapters_stay_as_they_were(tmp_path, tokenizer):
    model = get_peft_model(make_tiny_model(tokenizer), LoraConfig(**LORA))
    model.add_adapter("other", LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainer = make(tmp_path, model, tokenizer, eval_dataset=make_pairs()[:2])
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(make_pairs()[2:4])
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", ["LoRA", "prompt tuning", "P-tuning", "PiSSA", "head"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_run_has_the_weights_and_the_reference_of_the_whole_one(tmp_path, tokenizer, kind):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(seed, resume=None):
        torch.manual_seed(seed)  # what a fresh adapter holds must not matter
        model = get_peft_model(make_tiny_model(tokenizer), copy.deepcopy(KINDS[kind]))
        trainer = make(tmp_path, model, tokenizer, **saved)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(0)
    now = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    flags = {name: p.requires_grad for name, p in whole.model.named_parameters()}
    expected = whole._initial_logps(whole.train_groups.first(3), "other")
    resumed = run(1, str(tmp_path / "checkpoint-2"))
    found = dict(resumed.model.named_parameters())
    for name, value in now.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-6, atol=1e-7)
    assert {name: p.requires_grad for name, p in found.items()} == flags
    torch.testing.assert_close(resumed._initial_logps(resumed.train_groups.first(3), "other"), expected)


def test_a_checkpoint_of_another_base_or_adapter_is_not_resumed(tmp_path, tokenizer):
    saved = {"save_strategy": "steps", "save_steps": 2}
    make(tmp_path, make_tiny_model(tokenizer), tokenizer, peft_config=LoraConfig(**LORA), **saved).train()
    other = moved(make_tiny_model(tokenizer))
    with pytest.raises(ValueError, match="its run had other frozen weights or configuration"):
        make(tmp_path, other, tokenizer, peft_config=LoraConfig(**LORA)).train(resume_from_checkpoint=True)
    larger = make(tmp_path, make_tiny_model(tokenizer), tokenizer, peft_config=LoraConfig(**{**LORA, "r": 8}))
    with pytest.raises(ValueError, match="does not hold the adapter that the model carries"):
        larger.train(resume_from_checkpoint=True)


def test_gradient_checkpointing_trains_the_same_adapter(tmp_path, tokenizer):
    trained = []
    for options in ({}, {"gradient_checkpointing": True}):
        for reentrant in (True, False)[: 1 + bool(options)]:
            kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} if options else {}
            trainer = make(
                tmp_path, make_tiny_model(tokenizer), tokenizer, peft_config=LoraConfig(**LORA), **options, **kwargs
            )
            trainer.train()
            trained.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ every kind

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
MINIMAL = {  # what a configuration needs beside its defaults
    "ADALORA": {**TARGETS, "total_step": 100},
    "ADAPTION_PROMPT": {"adapter_layers": 2, "adapter_len": 3},
    "C3A": {**TARGETS, "block_size": 4},
    "FOURIERFT": {**TARGETS, "n_frequency": 16},
    "MISS": {**TARGETS, "r": 4},
    "PSOFT": {**TARGETS, "r": 4},
    "ROAD": {**TARGETS, "group_size": 4},
    "SHIRA": {**TARGETS, "r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [9, 50]},
    "VBLORA": {**TARGETS, "vector_length": 4, "num_vectors": 8},
    "WAVEFT": {**TARGETS, "n_frequency": 16},
}
VIRTUAL = ("CARTRIDGE", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
REFUSED = {  # by name, when the trainer is made
    "MULTITASK_PROMPT_TUNING": "does not run on token ids alone",  # asks for task_ids
    "POLY": "does not run on token ids alone",  # asks for task_ids
}
LEFT_OUT = {"ADAMSS": "needs scikit-learn", "XLORA": "needs trained adapters on disk"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
def test_every_kind_of_adapter(tmp_path, tokenizer, kind):
    if kind in LEFT_OUT:
        pytest.skip(LEFT_OUT[kind])
    options = MINIMAL.get(kind, {"num_virtual_tokens": 3} if kind in VIRTUAL else {})
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type="CAUSAL_LM", **options)
    model = moved(make_tiny_model(tokenizer), 0.1)
    if kind == "TRAINABLE_TOKENS":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    adapted = get_peft_model(model, config)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            make(tmp_path, adapted, tokenizer)
        return
    check_run(make(tmp_path, adapted, tokenizer))
