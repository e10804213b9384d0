"""Every option of TrainingArguments is one that works in MOPOTrainer or one that is refused."""

import pytest
from tiny import make_tiny_model
from transformers import TrainingArguments

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.options import MOPOOptions
from mopo_trainer.training.refused import REFUSED, REFUSED_VALUES
from mopo_trainer.training.trainer import MOPOTrainer

PLAIN = {
    "primary": "friendly",
    "thresholds": ["brief=0.4"],
    "policy_step": "contrast",
    "max_steps": 2,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}

# They act in the Trainer's own loop, optimizer, data loader, logging or saving, which MOPOTrainer leaves as it is.
WORKS = """
output_dir num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim
optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs use_cache neftune_noise_alpha torch_empty_cache_steps logging_strategy
logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica
disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy
eval_steps eval_delay per_device_eval_batch_size eval_on_start save_only_model save_strategy save_steps
save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id
hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug
skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank torch_compile torch_compile_backend
torch_compile_mode
"""


def test_every_option_is_classified():
    ours = set(MOPOOptions.__dataclass_fields__)
    fields = set(TrainingArguments.__dataclass_fields__)
    works = set(WORKS.split())
    assert not works & set(REFUSED)
    assert fields - ours - works - set(REFUSED) == set(), "decide for each: does it work in MOPOTrainer?"
    assert {name for name, _ in REFUSED_VALUES} <= works


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_do_nothing_is_refused_by_name(tmp_path, name):
    default = MOPOConfig.__dataclass_fields__[name].default
    value = {
        "label_smoothing_factor": 0.1,
        "label_names": ["labels"],
        "include_for_metrics": ["loss"],
        "eval_accumulation_steps": 2,
        "length_column_name": "tokens",
        "liger_kernel_config": {"rope": True},
        "parallelism_config": object(),
        "fsdp": "full_shard",
        "fsdp_config": {"version": 2},
        "deepspeed": "zero3.json",
    }.get(name, not default)
    with pytest.raises(ValueError, match=f"^{name}=.*: .* "):
        MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "no one length"),
        ({"hub_strategy": "checkpoint"}, "renamed once it is whole"),
        ({"do_eval": True}, "do_eval=True says not when"),
        ({"fp16": True}, "fp16=True does nothing on a CPU"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True cannot split groups"),
    ],
)
def test_values_that_would_go_wrong_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_what_a_file_of_another_trainer_says_anyway_is_taken(tmp_path):
    options = {"do_train": True, "label_smoothing_factor": 0.0, "remove_unused_columns": False, "fsdp": ""}
    args = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, eval_strategy="steps", do_eval=True, **options)
    assert args.do_eval
    copied = MOPOConfig(**{name: getattr(args, name) for name, f in args.__dataclass_fields__.items() if f.init})
    assert copied.to_dict() == args.to_dict()


def test_two_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"2 GPUs in one process: .* start with torchrun"):
        MOPOConfig(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"gradient_checkpointing": True}, 1e-5),
        ({"dataloader_num_workers": 1}, 1e-5),
        ({"accelerator_config": {"split_batches": True}}, 1e-5),
        ({"bf16": True}, 1e-2),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_how_a_step_is_computed_leaves_its_loss(tmp_path, tokenizer, pairs, options, tolerance):
    def losses(**options):
        args = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **PLAIN, **options)
        trainer = MOPOTrainer(make_tiny_model(tokenizer), args, pairs, processing_class=tokenizer)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    found = losses(**options)
    assert len(found) == 2
    assert found == pytest.approx(losses(), rel=tolerance)


def test_arguments_of_another_trainer_are_named(tmp_path, tiny_model, tokenizer, pairs):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args is a TrainingArguments; give a MOPOConfig"):
        MOPOTrainer(tiny_model, args, pairs, processing_class=tokenizer)


def test_a_checkpoint_named_in_the_config_is_resumed_from(tmp_path, tokenizer, pairs):
    args = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, resume_from_checkpoint=True, **PLAIN)
    trainer = MOPOTrainer(make_tiny_model(tokenizer), args, pairs, processing_class=tokenizer)
    with pytest.raises(ValueError, match="holds no whole checkpoint"):  # instead of a start from nothing
        trainer.train()
    trainer.train(resume_from_checkpoint=False)
