"""MOPOTrainer on a tiny model: what the step computes, what it skips, what it logs, and its errors."""

import copy
import json

import pytest
import torch
from every_type import tiny_model as type_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import SIZES, make_pairs, make_tiny_model, plain_logps
from transformers import MixtralConfig, MixtralForCausalLM, Trainer
from transformers.modeling_outputs import CausalLMOutput

from mopo_kernels import InfeasibleThresholds, mopo_objective, mopo_weights, solve_dual
from mopo_trainer.training import trainer as trainer_module
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.head import Scoring
from mopo_trainer.training.resume import MANIFEST, write_manifest
from mopo_trainer.training.trainer import MOPOTrainer


def config(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "primary": "friendly",
        "thresholds": ["brief=0.4"],
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return MOPOConfig(**{**defaults, **options})


def make(tmp_path, model, tokenizer, rows, *, eval_dataset=None, peft_config=None, **options):
    return MOPOTrainer(
        model,
        config(tmp_path, **options),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A run of three steps with clone, an exact dual and a robust bound."""
    trainer = make(tmp_path_factory.mktemp("finished"), make_tiny_model(tokenizer), tokenizer, make_pairs(), eps="0.01")
    trainer._response_logps = lambda *args, **options: pytest.fail("clone without lag needs no reference pass")
    trainer.record._since -= 3600  # an hour of preparation before the first step
    trainer.train()
    return trainer


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_dual_is_solved_before_the_first_step(finished):
    labels = finished.train_groups
    expected = solve_dual(labels.win_rate, labels.group, torch.tensor([0.4]), tau=0.08, eps=0.01)
    torch.testing.assert_close(finished.dual.multipliers, expected.multipliers, rtol=1e-6, atol=1e-8)
    assert expected.multipliers[1] > 0.5


def test_tokens_per_second_count_training_only(finished):
    assert steps_of(finished)[0]["tokens_per_second"] > 10


def test_logs_carry_every_objective(finished):
    logs = steps_of(finished)
    assert len(logs) == 3
    for entry in logs:
        assert {"ess", "kl", "dropped_mass", "tokens_per_second", "skipped_tokens"} <= set(entry)
        for name in ("friendly", "brief"):
            assert {f"win_rate/{name}", f"bound/{name}", f"multiplier/{name}"} <= set(entry)
            assert entry[f"bound/{name}"] < entry[f"win_rate/{name}"]
        assert entry["threshold/brief"] == 0.4
        assert entry["slack/brief"] == pytest.approx(entry["bound/brief"] - 0.4)
        assert "threshold/friendly" not in entry
    assert json.dumps(logs)


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_transformers_counts_of_tokens_and_operations_are_of_the_batch(tmp_path, tiny_model, tokenizer, pairs, kind):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, max_steps=2, include_num_input_tokens_seen=kind)
    trainer.train()
    tokens = sum(len(ids) for row in trainer.train_groups.dataset for ids in row["input_ids"])
    assert trainer.state.num_input_tokens_seen == tokens  # two steps of four groups are all eight
    assert trainer.state.total_flos == 6 * tokens * tiny_model.num_parameters(exclude_embeddings=True)


def test_the_loss_is_the_weighted_log_likelihood(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, per_device_train_batch_size=8)
    trainer.start_dual()
    labels = trainer.train_groups
    loss = trainer.compute_loss(tiny_model, first_batch(trainer))
    weights = mopo_weights(labels.win_rate, labels.group, trainer.dual.multipliers, tau=0.08)
    kept = weights > 1e-5
    logps = plain_logps(tiny_model, trainer.train_groups.sequences())
    torch.testing.assert_close(loss.double(), -(weights * logps)[kept].sum() / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy_step", ["contrast", "regress"])
def test_steps_against_a_reference_start_at_it(tmp_path, tiny_model, tokenizer, pairs, policy_step):
    trainer = make(
        tmp_path,
        tiny_model,
        tokenizer,
        pairs,
        policy_step=policy_step,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
    )
    trainer.start_dual()
    torch.testing.assert_close(
        trainer.reference["train"], plain_logps(tiny_model, trainer.train_groups.sequences()), rtol=1e-5, atol=1e-5
    )
    loss = trainer.compute_loss(tiny_model, first_batch(trainer))
    if policy_step == "contrast":  # h = 0 everywhere: uniform softmax over two responses
        torch.testing.assert_close(loss.item(), torch.tensor(2.0).log().item(), rtol=1e-4, atol=1e-4)
    trainer.train()
    losses = [entry["loss"] for entry in steps_of(trainer)]
    assert losses[-1] < losses[0]


def test_responses_without_weight_never_enter_the_model(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, thresholds=None, min_weight=1e-3)
    seen = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trainer.train()
    assert [shape[0] for shape in seen] == [4, 4, 4]  # one response of each pair
    logs = steps_of(trainer)
    lengths = {  # tokens of prompt + response
        name: [len(ids) for ids, _ in trainer.train_groups.sequences()[offset::2]]
        for name, offset in (("friendly", 0), ("brief", 1))
    }
    assert sum(entry["skipped_tokens"] for entry in logs[:2]) == sum(lengths["brief"])
    assert all(entry["tokens_per_second"] > 0 for entry in logs)


@pytest.mark.parametrize("policy_step", ["clone", "contrast"])
def test_sharing_prompts_trains_the_same_model_with_fewer_tokens(tmp_path, tiny_model, tokenizer, pairs, policy_step):
    trained, skipped = [], []
    for share in (False, True):
        model = copy.deepcopy(tiny_model)
        trainer = make(
            tmp_path / str(share),
            model,
            tokenizer,
            pairs,
            share_prompt=share,
            policy_step=policy_step,
            learning_rate=1e-3,
            min_weight=1e-9,
            optim="sgd",
        )
        trainer.train()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        skipped.append(sum(entry.get("skipped_tokens", 0) for entry in trainer.state.log_history))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-6)
    assert skipped[1] > skipped[0]


@pytest.mark.parametrize("dual_update", ["sgd", "barrier"])
def test_stepwise_duals_move(tmp_path, tiny_model, tokenizer, pairs, dual_update):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, dual_update=dual_update, eps="0.01", max_steps=2)
    trainer.train()
    multipliers = [entry["multiplier/brief"] for entry in steps_of(trainer)]
    assert len(set(multipliers)) > 1


def test_gradient_accumulation_is_one_large_batch(tmp_path, tiny_model, tokenizer, pairs):
    def trained(name, **options):
        model = copy.deepcopy(tiny_model)
        unclipped = {"max_grad_norm": 0.0, "learning_rate": 1e-3}  # clipping would hide a loss of twice the size
        trainer = make(tmp_path / name, model, tokenizer, pairs, max_steps=2, optim="sgd", **unclipped, **options)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = trained("whole", per_device_train_batch_size=4)
    parts = trained("parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert (whole - torch.cat([p.detach().flatten() for p in tiny_model.parameters()])).abs().max() > 1e-3


def test_reference_is_computed_once_and_cached(tmp_path, tiny_model, tokenizer, pairs, monkeypatch):
    made = []
    original = MOPOTrainer._response_logps
    monkeypatch.setattr(
        MOPOTrainer,
        "_response_logps",
        lambda self, groups, **k: made.append(len(groups.dataset)) or original(self, groups, **k),
    )

    def references_made(model, rows, **options):
        made.clear()
        make(tmp_path, copy.deepcopy(model), tokenizer, rows, policy_step="contrast", **options).start_dual()
        assert made[0] == 2, "what the model says now of the first groups"
        return len(made) - 1

    assert references_made(tiny_model, pairs) == 1
    assert references_made(tiny_model, pairs) == 0, "same model, same tokens: from the cache"
    assert references_made(tiny_model, pairs[:-1]) == 1, "other tokens"
    for seed, expected in ((0, 1), (1, 1), (0, 0)):  # the reference is the adapted model as it starts
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        assert references_made(tiny_model, pairs, peft_config=lora, seed=seed) == expected
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[7] += 0.1
    assert references_made(tiny_model, pairs) == 1, "another model"


def test_thresholds_that_fresh_texts_will_miss_are_said_so(tmp_path, tiny_model, tokenizer, pairs, caplog):
    make(tmp_path, tiny_model, tokenizer, pairs, thresholds=["brief=0.55"]).start_dual()
    assert (
        "brief 0.55 among 2 responses is about 0.52 against fresh texts; to hold 0.55 there too, ask 0.65."
        in caplog.text
    )
    caplog.clear()
    make(tmp_path, tiny_model, tokenizer, pairs, thresholds=["brief=0.4"]).start_dual()
    unsure = [row | {"preference": {name: 0.2 + 0.6 * p for name, p in row["preference"].items()}} for row in pairs]
    make(tmp_path, tiny_model, tokenizer, unsure, thresholds=["brief=0.55"]).start_dual()
    assert "fresh texts" not in caplog.text, "luck raises what is below a half, and labels that are no counts say less"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: save_file({"other": torch.zeros(16)}, file), "cannot be read"),
        (lambda file: save_file({"logp": torch.zeros(15)}, file), "holds 15 log-probs, not 16 numbers"),
        (lambda file: save_file({"logp": torch.full((16,), torch.nan)}, file), "holds 16 log-probs, not 16 numbers"),
        (lambda file: save_file({"logp": torch.zeros(16)}, file), "holds other log-probs than the model gives now"),
    ],
)
def test_a_damaged_cache_is_computed_anew(tmp_path, tiny_model, tokenizer, pairs, caplog, damage, said):
    def reference():
        made = make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, policy_step="contrast")
        made.start_dual()
        return made.reference["train"]

    expected = reference()
    (file,) = (tmp_path / "reference").iterdir()
    damage(file)
    torch.testing.assert_close(reference(), expected)
    assert said in caplog.text
    caplog.clear()
    torch.testing.assert_close(reference(), expected)
    assert said not in caplog.text, "the file was mended"


def test_a_changed_configuration_is_another_reference(tmp_path, tiny_model, tokenizer, pairs):
    def reference():
        made = make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, policy_step="contrast")
        made.start_dual()
        expected = plain_logps(made.model, made.train_groups.sequences())
        torch.testing.assert_close(made.reference["train"], expected, rtol=1e-5, atol=1e-4)
        return made.reference["train"]

    plain = reference()
    tiny_model.model.layers[0].self_attn.scaling = 50.0
    assert (reference() - plain).abs().max() > 1e-3
    with torch.no_grad():
        tiny_model.lm_head.weight.copy_(tiny_model.lm_head.weight.flip(0))  # of equal sums
    assert (reference() - plain).abs().max() > 1e-3
    assert len(list((tmp_path / "reference").iterdir())) == 3


@pytest.mark.parametrize("policy_step", ["clone", "contrast"])
def test_lag_refreshes_reference_and_ratchets_thresholds(tmp_path, tiny_model, tokenizer, pairs, policy_step):
    options = {"lag_steps": 2, "ratchet_beta": 0.9, "policy_step": policy_step, "lr_scheduler_type": "constant"}
    options["thresholds"] = ["brief=0.01"]
    after_two_steps = copy.deepcopy(tiny_model)
    make(tmp_path / "two", after_two_steps, tokenizer, pairs, max_steps=2, **options).train()
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, max_steps=5, **options)
    trainer.train()  # refreshes after steps 2 and 4; from then on the reference is the policy of step 2
    labels = trainer.train_groups
    torch.testing.assert_close(
        trainer.reference["lag"], plain_logps(after_two_steps, trainer.train_groups.sequences()), rtol=1e-4, atol=1e-4
    )
    ratio = trainer.reference["lag"] - trainer.reference["train"]
    assert ratio.abs().max() > 1e-2
    r = torch.softmax(ratio.clamp(-10, 10).view(8, 2), -1).flatten()
    reached = (r * labels.win_rate[:, 1]).sum() / 8
    assert reached > 0.02
    torch.testing.assert_close(trainer.dual.thresholds[0], 0.9 * reached, rtol=1e-6, atol=1e-7)


def test_evaluate_says_what_log_probs_imply(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, eval_dataset=pairs, thresholds=None, max_steps=12)
    before = trainer.evaluate()
    assert before["eval_win_rate/friendly"] == pytest.approx(0.5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_win_rate/friendly"] > 0.9
    assert after["eval_agreement/friendly"] > 0.9
    assert after["eval_loss"] < before["eval_loss"]


def test_the_evaluation_loss_is_under_the_multipliers_in_force(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, eval_dataset=pairs)
    trainer.dual.refresh(trainer.train_groups.win_rate, trainer.train_groups.group)
    assert trainer.dual.multipliers[1] > 0.1
    groups = trainer.eval_groups
    logp = plain_logps(tiny_model, groups.sequences())
    labels = (groups.win_rate, groups.group, trainer.dual.multipliers)
    expected = mopo_objective(logp.double(), *labels, tau=trainer.args.tau).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_evaluate_on_new_rows_needs_a_reference_that_is_still_there(tmp_path, tiny_model, tokenizer, pairs):
    trainer = make(tmp_path / "full", copy.deepcopy(tiny_model), tokenizer, pairs)
    trainer.train()
    with pytest.raises(ValueError, match="give them as eval_dataset when the trainer is made"):
        trainer.evaluate(pairs[:4])  # against the trained weights every win rate would be the mean label
    lora = LoraConfig(r=4, target_modules="all-linear")
    adapted = make(tmp_path / "lora", tiny_model, tokenizer, pairs, peft_config=lora, max_steps=12)
    adapted.train()
    assert adapted.evaluate(pairs[:4])["eval_win_rate/friendly"] > 0.6


def test_infeasible_thresholds_stop_before_the_first_step(tmp_path, tiny_model, tokenizer, pairs):
    for row in pairs:
        row["preference"]["brief"] = 0.5
    trainer = make(tmp_path, tiny_model, tokenizer, pairs, thresholds=["brief=0.9"])
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(InfeasibleThresholds, match="brief"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_an_adapter_on_the_head_trains_through_the_models_logits(
    tmp_path, tiny_model, tokenizer, pairs, caplog, policy_step
):
    fused = make(tmp_path / "fused", tiny_model, tokenizer, pairs, policy_step=policy_step)
    fused.start_dual()
    batch = first_batch(fused)
    expected = fused.compute_loss(tiny_model, batch)
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    trainer = make(tmp_path / "adapter", model, tokenizer, pairs, policy_step=policy_step)
    assert "its LM head is a peft Linear, no plain linear layer" in caplog.text
    trainer.start_dual()
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)  # the adapter starts at zero
    loss.backward()
    assert model.base_model.model.lm_head.lora_B["default"].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"primary": None}, "primary is not set; choose the objective to maximise among friendly, brief"),
        ({"primary": "funny"}, "primary names 'funny', which the data does not carry; it has: friendly, brief"),
        ({"thresholds": ["funny=0.5"]}, "thresholds names 'funny'"),
        ({"thresholds": ["friendly=0.5"]}, "thresholds name the primary objective 'friendly'"),
        ({"min_weight": 0.5}, r"min_weight=0.5 could drop all responses of a group of 2"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, tiny_model, tokenizer, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tiny_model, tokenizer, pairs, **options)


def test_options_reach_the_dual(tmp_path, tiny_model, tokenizer, pairs):
    options = {"tau": 0.3, "lag_steps": 7, "ratchet_beta": 0.9, "multiplier_lr": 0.3, "chi_lr": 0.2}
    barrier = {"eps": "0.02", "dual_update": "barrier", "barrier_sigma": 0.05, "barrier_delta": 0.06}
    dual = make(tmp_path, tiny_model, tokenizer, pairs, **options, **barrier).dual
    assert {name: getattr(dual, name) for name in options} == options
    assert (float(dual.eps), dual.rule, dual.sigma, dual.delta) == (0.02, "barrier", 0.05, 0.06)


def test_options_reach_the_data(tmp_path, tiny_model, tokenizer):
    ratings = {"friendly": [1, 2], "brief": [2, 1]}
    rows = [{"prompt": f"Question {i}?", "responses": ["No.", "Of course!"], "ratings": ratings} for i in range(2)]
    options = {"scorers": ["brevity"], "rating_scale": 2.0, "as_chat": True, "max_prompt_length": 5, "max_length": 8}
    trainer = make(tmp_path, tiny_model, tokenizer, rows, **options)
    assert trainer.dual.objectives == ["friendly", "brief", "brevity"]
    torch.testing.assert_close(trainer.train_groups.win_rate[1, 0], torch.tensor(0.5).double().sigmoid())
    for ids, prompt in trainer.train_groups.sequences():
        assert (len(ids), prompt) == (8, 5)
        assert tokenizer.convert_ids_to_tokens(ids)[prompt - 2 : prompt] == ["<|end|>", "<|assistant|>"]


def test_options_reach_the_head(tmp_path, tiny_model, tokenizer, pairs, monkeypatch):
    seen = {}
    for name in ("policy_loss", "response_logps"):
        call = getattr(trainer_module, name)
        monkeypatch.setattr(
            trainer_module,
            name,
            lambda *args, _name=name, _call=call, **k: seen.update({_name: k}) or _call(*args, **k),
        )
    head = {"backend": "reference", "workspace_bytes": 12345, "grad_sampling": 0.1}
    options = {"share_prompt": True, "per_device_eval_batch_size": 3, "reference_cache_dir": str(tmp_path / "cache")}
    trainer = make(tmp_path / "run", tiny_model, tokenizer, pairs, policy_step="contrast", **head, **options)
    trainer.start_dual()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    scored = seen["response_logps"]
    assert (scored["row_of"], scored["batch_size"]) == ([i // 2 for i in range(16)], 3)
    assert scored["scoring"] == Scoring(tokenizer.pad_token_id, share_prompt=True, backend="reference")
    trainer.compute_loss(tiny_model, first_batch(trainer))
    assert {name: seen["policy_loss"][name] for name in head} == head


def test_sampled_gradients_want_a_plain_head(tmp_path, tiny_model, tokenizer, pairs, monkeypatch):
    def forward(input_ids, **inputs):
        hidden = tiny_model.model(input_ids, attention_mask=inputs.get("attention_mask")).last_hidden_state
        return CausalLMOutput(logits=tiny_model.lm_head(hidden.flatten(0, 1)).view(*input_ids.shape, -1))

    monkeypatch.setattr(tiny_model, "forward", forward)
    with pytest.raises(ValueError, match=r"grad_sampling=0.1 needs a plain LM head, .* logits are its own; leave it"):
        make(tmp_path, tiny_model, tokenizer, pairs, grad_sampling=0.1).start_dual()


def test_the_least_weight_reaches_the_loss(tmp_path, tiny_model, tokenizer, pairs):
    def dropped(**options):
        trainer = make(tmp_path, tiny_model, tokenizer, pairs, thresholds=None, **options)
        return float(trainer.compute_loss(tiny_model, first_batch(trainer), return_outputs=True)[1].dropped_mass)

    assert dropped() > 0  # exp(-1 / 0.08) = 4e-6
    assert dropped(min_weight=0.0) == 0


def test_resuming_with_other_arguments_is_refused(tmp_path, tiny_model, tokenizer, pairs):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, **saved).train()
    changed = make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, thresholds=["brief=0.3"])
    with pytest.raises(ValueError, match=r"had other thresholds \(brief 0.4 → 0.3\)"):
        changed.train(resume_from_checkpoint=True)
    changed = make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, lag_steps=1)
    with pytest.raises(ValueError, match="holds no reference log-probs"):
        changed.train(resume_from_checkpoint=True)
    written = tmp_path / "checkpoint-2"
    (written / "optimizer.pt").rename(written / "global_step2")  # DeepSpeed's is a directory of this name
    (written / MANIFEST).unlink()
    write_manifest(written)
    with pytest.raises(ValueError, match="DeepSpeed wrote its state of the optimizer, which only DeepSpeed reads"):
        make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs).train(resume_from_checkpoint=True)
    only_model = make(tmp_path, copy.deepcopy(tiny_model), tokenizer, pairs, save_only_model=True, **saved)
    only_model.train()
    with pytest.raises(ValueError, match=r"holds no state of the optimizer \(save_only_model\)"):
        only_model.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("policy_step", "reference"), [("contrast", "train"), ("regress", "lag")])
def test_after_a_refresh_the_optimum_is_relative_to_the_lag_policy(
    tmp_path, tiny_model, tokenizer, pairs, policy_step, reference
):
    """Contrast's weights carry the lag ratio already (tests/objective/test_steps.py shows the optima)."""
    trainer = make(
        tmp_path, tiny_model, tokenizer, pairs, policy_step=policy_step, per_device_train_batch_size=8, lag_clip=0.5
    )
    trainer.start_dual()
    trainer.reference["lag"] = trainer.reference["train"] + torch.linspace(-2, 2, 16, dtype=torch.float64)
    loss = trainer.compute_loss(tiny_model, first_batch(trainer))
    labels = trainer.train_groups
    expected = mopo_objective(
        plain_logps(tiny_model, trainer.train_groups.sequences()),
        labels.win_rate,
        labels.group,
        trainer.dual.multipliers,
        tau=0.08,
        ref_logp=trainer.reference[reference],
        lag_log_ratio=(trainer.reference["lag"] - trainer.reference["train"]).clamp(-0.5, 0.5),
        policy_step=policy_step,
    )
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-4, atol=1e-4)


def test_positions_rescaled_for_a_whole_batch_are_refused_in_training_and_held_out_data(tmp_path, tokenizer, pairs):
    def model(positions):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
        return type_model("llama", rope_parameters=rope, **sizes)

    long = [pair | {"chosen": pair["chosen"] * 3} for pair in pairs]
    trainer = make(tmp_path, model(64), tokenizer, pairs)
    for refused in (
        lambda: make(tmp_path, model(64), tokenizer, long),
        lambda: make(tmp_path, model(64), tokenizer, pairs, eval_dataset=long),
        lambda: trainer.evaluate(long),
    ):
        with pytest.raises(ValueError, match=r"other hidden states beside one of \d+ than alone"):
            refused()


def test_sharing_is_decided_by_whole_rows(tmp_path, tokenizer, caplog):
    """The longest sequence stands in a narrow row; the widest row leaves GPT-Neo's window, which counts its places."""
    few, many = {"friendly": [1.0, 0.0], "brief": [0.0, 1.0]}, {"friendly": [1.0, 0.0] * 3, "brief": [0.0, 1.0] * 3}
    narrow = {"prompt": "Why?", "responses": ["Because it is so.", "No."], "ratings": few}
    wide = {"prompt": "Who?", "responses": [f"It was me {i}." for i in range(6)], "ratings": many}
    shared = []
    for rows in ([narrow], [narrow, wide]):
        model = type_model("gpt_neo", vocab_size=len(tokenizer), window_size=48)
        shared.append(make(tmp_path, model, tokenizer, rows, share_prompt=True).scoring.share_prompt)
    assert shared == [True, False]
    assert "share_prompt is off: hidden states of responses behind a shared prompt are" in caplog.text


@pytest.mark.parametrize("coefficient", [0.0, 10.0])
def test_the_router_loss_of_a_mixture_of_experts_is_added_and_logged(tmp_path, tokenizer, pairs, coefficient):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        num_local_experts=4,
        sliding_window=None,
        router_aux_loss_coef=coefficient,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config)
    trainer = make(tmp_path, model, tokenizer, pairs, share_prompt=True, max_steps=1, learning_rate=0.0)
    trainer.start_dual()
    loss, output = trainer.compute_loss(model, first_batch(trainer), return_outputs=True)
    packed = trainer.record._batches[0].packed
    assert not packed.is_shared
    own = model(**packed.model_inputs("sdpa", torch.float32)).aux_loss
    torch.testing.assert_close(loss, output.loss + coefficient * own)
    assert own > 1
    loss.backward()
    assert (model.model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-2) == (coefficient > 0)
    trainer.record = type(trainer.record)()
    trainer.train()
    assert ("router_loss" in steps_of(trainer)[0]) == (coefficient > 0)


def test_floating_point_operations_are_those_of_transformers(finished):
    batch = first_batch(finished)
    expected = Trainer.floating_point_ops(finished, trainer_module._as_tokens(batch))
    assert finished.floating_point_ops(batch) == expected > 0


def test_a_second_run_on_deepspeeds_engine_is_refused(finished, monkeypatch):
    monkeypatch.setattr(finished, "is_deepspeed_enabled", True)
    monkeypatch.setattr(finished, "model_wrapped", torch.nn.Identity())
    with pytest.raises(ValueError, match="make a new trainer"):
        finished.train()
