"""MOPO inside TRL's DPOTrainer, against log-probs the plain way: real runs of a tiny model."""

import copy
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from every_type import tiny_model as type_model
from peft import LoraConfig
from tiny import make_pairs, make_tiny_model, plain_logps
from transformers import AutoModelForCausalLM

from mopo_kernels import InfeasibleThresholds, label_statistics, mopo_objective, solve_dual
from mopo_trainer.data import labels, to_groups
from mopo_trainer.data.errors import DataError

pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from mopo_trainer.integrations.trl import MOPODPOTrainer, add_mopo_head
from mopo_trainer.integrations.trl.dpo import _pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """The model on disk, from where DPOTrainer loads its reference."""
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(tokenizer).save_pretrained(path)
    return path


def make(folder, tmp_path, tokenizer, *, rows=None, kind=MOPODPOTrainer, trainer=None, **options):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    defaults |= {"use_cpu": True, "report_to": "none", "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    mopo = {"primary": "friendly", "thresholds": {"brief": 0.4}} if kind is MOPODPOTrainer else {}
    return kind(
        AutoModelForCausalLM.from_pretrained(folder),
        args=DPOConfig(output_dir=str(tmp_path), **{**defaults, **options}),
        processing_class=tokenizer,
        **{"train_dataset": Dataset.from_list(make_pairs() if rows is None else rows), **mopo, **(trainer or {})},
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def sequences_of(batch):
    ids, response = batch["input_ids"], batch["completion_mask"].bool()
    ends = batch["attention_mask"].sum(1)
    return [(x[:end].tolist(), int(r.int().argmax())) for x, end, r in zip(ids, ends, response, strict=True)]


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_the_loss_is_mopos_on_the_plain_log_probs(folder, tmp_path, tokenizer, policy_step):
    trainer = make(folder, tmp_path, tokenizer, trainer={"policy_step": policy_step, "tau": 0.3})
    trainer.start_dual()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    logp, ref_logp = (plain_logps(model, sequences_of(batch)) for model in (trainer.model, trainer.ref_model))
    labels = batch["mopo_win_rate"], torch.arange(4).repeat(2), trainer.dual.multipliers
    reference = None if policy_step == "clone" else ref_logp
    expected = mopo_objective(logp, *labels, tau=0.3, ref_logp=reference, policy_step=policy_step).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_multipliers_are_those_of_all_labels(folder, tmp_path, tokenizer):
    trainer = make(folder, tmp_path, tokenizer, beta=0.2)
    trainer.train()
    chosen = torch.tensor([[row["preference"][name] for name in ("friendly", "brief")] for row in make_pairs()])
    win_rate = torch.stack([chosen, 1 - chosen], 1).flatten(0, 1).double()
    expected = solve_dual(win_rate, torch.arange(8).repeat_interleave(2), torch.tensor([0.4]), tau=0.2)
    torch.testing.assert_close(trainer.dual.multipliers, expected.multipliers, rtol=1e-6, atol=1e-8)
    logged = trainer.state.log_history[0]
    assert logged["multiplier/brief"] == pytest.approx(expected.multipliers[1].item())
    assert {"win_rate/friendly", "bound/brief", "threshold/brief", "slack/brief", "ess", "kl"} <= set(logged)
    assert {"rewards/margins", "entropy", "logps/chosen"} <= set(logged)  # TRL's own
    assert losses(trainer)[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("how", ["precomputed", "adapter", "adapter, precomputed"])
def test_the_reference_is_trls(folder, tmp_path, tokenizer, how):
    adapter = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if "adapter" in how else {}
    trainer = make(folder, tmp_path, tokenizer, precompute_ref_log_probs="precomputed" in how, trainer=adapter)
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-4)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_losses_of_trls_are_added(folder, tmp_path, tokenizer):
    values = []
    for kind, types, weights in (
        (MOPODPOTrainer, ["sft", "mopo"], [0.5, 2.0]),
        (MOPODPOTrainer, ["mopo"], None),
        (DPOTrainer, ["sft"], None),
    ):
        trainer = make(folder, tmp_path, tokenizer, kind=kind, loss_type=types, loss_weights=weights)
        if kind is MOPODPOTrainer:
            trainer.start_dual()
        values.append(trainer.compute_loss(trainer.model, batch_of(trainer)).detach())
    torch.testing.assert_close(values[0], 2 * values[1] + 0.5 * values[2])


def test_accumulation_is_one_large_batch(folder, tmp_path, tokenizer):
    runs = []
    for batch, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = make(folder, tmp_path, tokenizer, **options, trainer={"dual_update": "sgd"})
        trainer.train()
        runs.append((losses(trainer), trainer.dual.multipliers))
    torch.testing.assert_close(*(torch.tensor(x) for x, _ in runs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dual_update", ["exact", "sgd"])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, tokenizer, dual_update):
    mopo = {"dual_update": dual_update, "eps": 0.01}
    whole = make(folder, tmp_path, tokenizer, save_strategy="steps", save_steps=2, trainer=mopo)
    whole.train()
    resumed = make(folder, tmp_path / "again", tokenizer, trainer=mopo)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.dual.multipliers, whole.dual.multipliers)
    assert torch.equal(resumed.dual.chi, whole.dual.chi)
    others = make(folder, tmp_path / "other", tokenizer, rows=make_pairs()[1:], trainer=mopo)
    with pytest.raises(ValueError, match="its run had other labels"):
        others.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / "mopo_state.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no multipliers"):
        make(folder, tmp_path / "none", tokenizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_of_held_out_pairs(folder, tmp_path, tokenizer):
    """Figures are those of all rows, however they fall into batches."""
    preferences = [1.0, 1.0, 0.9, 1.0, 0.5]
    held_out = Dataset.from_list(
        [{**row, "preference": {"friendly": p}} for row, p in zip(make_pairs(), preferences, strict=False)]
    )
    trainer = make(folder, tmp_path, tokenizer, trainer={"eval_dataset": held_out}, per_device_eval_batch_size=4)
    trainer.train()
    found = trainer.evaluate()
    chosen = torch.tensor(preferences)[:, None].double()
    win_rate = torch.stack([chosen, 1 - chosen], 1).flatten(0, 1)
    expected = label_statistics(win_rate, torch.arange(5).repeat_interleave(2), torch.ones(1).double(), tau=0.1)
    assert found["eval_win_rate/friendly"] == pytest.approx(expected.values.win_rates.item())
    assert "eval_win_rate/brief" not in found  # no held-out row labels it
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(found["eval_loss"])


@pytest.mark.parametrize("kind", ["llama", "cohere", "gemma2", "adapter", "mixtral"])
def test_our_head_in_trls_trainer(kind, folder, tmp_path, tokenizer):
    """The same loss, gradients and metrics as TRL's own head gives."""
    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = type_model("llama" if kind == "adapter" else kind)
        adapter = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if kind == "adapter" else {}
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False)
        rows = Dataset.from_list(make_pairs())
        trainer = DPOTrainer(
            model, copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer, **adapter
        )
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.02 * torch.randn_like(p) * p.requires_grad)
        if ours:
            add_mopo_head(trainer.model)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
        loss.backward()
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        metrics = {key: values[0] for key, values in trainer._metrics["train"].items()}
        found.append((loss.detach(), torch.cat(gradients), metrics))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-6)
    for key, value in found[0][2].items():
        if kind == "gemma2" and key.startswith("logits/"):
            assert math.isnan(found[1][2][key])
        else:
            assert found[1][2][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_head_that_zero_3_has_split_stays_trls(tokenizer):
    model = make_tiny_model(tokenizer)
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3 has split the model; keep TRL's head"):
        add_mopo_head(model)


def test_a_heads_temperature_is_trls(folder, tokenizer):
    """GRPO and RLOO divide the logits: a head that does not would train on other probabilities without a word."""
    ids = torch.tensor([tokenizer("a friendly text")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    add_fused_lm_head(model, temperature=0.5)
    expected = model(ids, labels=ids, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"temperature=1.0: a log-prob is .* give the trainer's own temperature"):
        add_mopo_head(model)
    torch.testing.assert_close(model(ids, labels=ids, fused_lm_head=True).log_probs, expected.log_probs)
    add_mopo_head(model, temperature=0.5)
    found = model(ids, labels=ids, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_labels_that_are_win_rates_are_read_as_such(folder, tmp_path, tokenizer):
    """The column that the trainer adds has a name of its own."""
    kept = ("prompt", "chosen", "rejected")
    rows = [{**{key: row[key] for key in kept}, "win_rate": {"friendly": [0.8, 0.2]}} for row in make_pairs()]
    trainer = make(folder, tmp_path, tokenizer, rows=rows, trainer={"thresholds": None})
    assert trainer.dual.objectives == ["friendly", "preferred"]  # rows without `preference` prefer what is chosen
    assert batch_of(trainer)["mopo_win_rate"][:, 0].tolist() == [0.8] * 4 + [0.2] * 4


def groups_of(sizes):
    """Rows of several responses: the friendlier ones are longer."""
    texts = ["No.", "Well, no.", "I am afraid not.", "Sadly not, my dear friend!", "Oh no, my very dear friend, sorry!"]
    return [
        {
            "prompt": f"Question {i}?",
            "responses": texts[i % 2 :][:n],
            "ratings": {"friendly": list(range(n)), "brief": [0.5 * (j < 2) for j in range(n)]},
        }
        for i, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("policy_step", ["clone", "contrast", "regress"])
def test_groups_of_any_size(folder, tmp_path, tokenizer, policy_step):
    """Responses in pairs for TRL, in groups for the loss: that of the plain log-probs of each response once."""
    rows = groups_of([3, 2, 4, 3])
    trainer = make(folder, tmp_path, tokenizer, rows=rows, trainer={"policy_step": policy_step})
    trainer.start_dual()
    expected = solve_dual(*labels(to_groups(rows), ["friendly", "brief"]), torch.tensor([0.4]), tau=0.1)
    torch.testing.assert_close(trainer.dual.multipliers, expected.multipliers, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = batch_of(trainer)
    assert len(batch["input_ids"]) == 2 * (2 + 1 + 2 + 2)
    loss = trainer.compute_loss(trainer.model, batch)
    once = batch["mopo_group"] >= 0
    assert once.sum() == 3 + 2 + 4 + 3
    sequences = [x for x, kept in zip(sequences_of(batch), once, strict=True) if kept]
    assert len({tuple(ids) for ids, _ in sequences}) == 12
    logp, ref_logp = (plain_logps(model, sequences) for model in (trainer.model, trainer.ref_model))
    given = batch["mopo_win_rate"][once], batch["mopo_group"][once], trainer.dual.multipliers
    reference = None if policy_step == "clone" else ref_logp
    expected = mopo_objective(logp, *given, tau=0.1, ref_logp=reference, policy_step=policy_step).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for (ids, prompt), win_rate, group in zip(sequences, *given[:2], strict=True):  # each its own label
        row = rows[int(group)]
        place = [tokenizer(text + "<|end|>")["input_ids"] for text in row["responses"]].index(ids[prompt:])
        assert win_rate[0] == pytest.approx(place / (len(row["responses"]) - 1))


@pytest.mark.slow
def test_a_group_is_laid_out_the_best_beside_the_worst():
    """An unlabelled response counts as one half; the odd one out stands beside a copy of the worst."""
    assert _pairs(torch.tensor([0.2, 0.9, torch.nan, 0.4, 0.1])) == [(1, 4, False), (2, 0, False), (3, 4, True)]
    assert _pairs(torch.tensor([0.1, 0.9])) == [(0, 1, False)], "the user's chosen stays chosen"


def test_groups_train_evaluate_and_resume(folder, tmp_path, tokenizer):
    rows = groups_of([4, 3, 4, 2, 5, 4, 3, 3])
    options = {"rows": rows, "trainer": {"eval_dataset": Dataset.from_list(rows[:3]), "dual_update": "sgd"}}
    options |= {"precompute_ref_log_probs": True, "per_device_train_batch_size": 2, "remove_unused_columns": True}
    whole = make(folder, tmp_path, tokenizer, save_strategy="steps", save_steps=2, **options)
    whole.train()
    assert whole.evaluate()["eval_win_rate/friendly"] > 0.9
    resumed = make(folder, tmp_path / "again", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.dual.multipliers, whole.dual.multipliers)


@pytest.mark.parametrize("column", ["preference", "ratings", "comparisons", "ratings, soft", "scored"])
def test_every_kind_of_label(folder, tmp_path, tokenizer, column):
    """The same two objectives in each column that rows may carry."""
    kept, options = ("prompt", "chosen", "rejected"), {}
    rows = [{key: row[key] for key in kept} for row in make_pairs()]
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for row in rows:
        if column == "preference":
            row["preference"] = {"friendly": 1.0, "brief": 0.0}
        elif column == "comparisons":
            row["comparisons"] = {"friendly": [[0, 1, 1.0]], "brief": [[1, 0, 1.0]]}
        elif column != "scored":
            row["ratings"] = {"friendly": [4.0, 2.0], "brief": [1.0, 3.0]}
    if column == "ratings, soft":
        options["rating_scale"] = 2.0
        soft = torch.tensor([1.0, -1.0]).sigmoid()
        expected = torch.stack([soft, soft.flip(0)])
    if column == "scored":
        options["scorers"] = {"friendly": lambda _, text: len(text), "brief": lambda _, text: -len(text)}
    trainer = make(folder, tmp_path, tokenizer, rows=rows, trainer=options)
    assert ("preferred" in trainer.dual.objectives) == (column != "preference")  # what chosen beats rejected on
    found = batch_of(trainer)["mopo_win_rate"][:, [trainer.dual.objectives.index(x) for x in ("friendly", "brief")]]
    torch.testing.assert_close(found, expected.double().repeat_interleave(4, 0), atol=1e-6, rtol=0)


def test_a_group_that_trl_cuts_is_refused(folder, tmp_path, tokenizer, monkeypatch):
    """TRL leaves out rows whose prompt fills max_length, and where its tokens end depends on the response."""
    prepare = DPOTrainer._prepare_dataset
    monkeypatch.setattr(DPOTrainer, "_prepare_dataset", lambda *args: prepare(*args).select([0, 1, 3]))
    with pytest.raises(DataError, match="row 1 of the train data: max_length leaves out some of its responses"):
        make(folder, tmp_path, tokenizer, rows=groups_of([4, 4]))


def test_what_is_refused(folder, tmp_path, tokenizer):
    def refused(error, match, rows=None, trainer=None, **options):
        with pytest.raises(error, match=match):
            make(folder, tmp_path, tokenizer, rows=rows, trainer=trainer, **options)

    refused(ValueError, "ld_alpha=0.5 has no meaning", ld_alpha=0.5)
    refused(ValueError, "use_weighting=True has no meaning", use_weighting=True)
    refused(ValueError, "f_divergence_type=js_divergence has no meaning", f_divergence_type="js_divergence")
    refused(ValueError, "label_smoothing=0.1 has no meaning", label_smoothing=0.1)
    refused(ValueError, r"loss_type=\['ipo'\] does not name 'mopo' once", loss_type=["ipo"])
    refused(ValueError, "primary names 'kind', which the data does not carry", trainer={"primary": "kind"})
    refused(ValueError, "thresholds names 'short'", trainer={"thresholds": {"short": 0.5}})
    bad = [{**row, "preference": {"friendly": 2.0}} for row in make_pairs()]
    refused(DataError, "friendly", rows=bad)
    refused(ValueError, r"loss_type=\['sft'\] are losses of pairs", rows=groups_of([3]), loss_type=["mopo", "sft"])
    stream = Dataset.from_list(make_pairs()).to_iterable_dataset()
    refused(ValueError, "give a Dataset, all of whose labels count", trainer={"train_dataset": stream})
    ties = [{**row, "preference": {"friendly": 1.0, "brief": 0.5}} for row in make_pairs()]
    trainer = make(folder, tmp_path, tokenizer, rows=ties, trainer={"thresholds": {"brief": 0.6}})
    with pytest.raises(InfeasibleThresholds, match="brief"):
        trainer.train()


def in_processes(kind, directory, processes, **environment):
    """What each process of a run found."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] * (processes > 1)
    environment = os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(Path(__file__).with_name("trl_run.py")), kind, str(directory)]
    done = subprocess.run(command, env=environment | {"ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((directory / f"{rank}of{processes}.json").read_text()) for rank in range(processes)]


ZERO_3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, pytest.param(ZERO_3, marks=needs_deepspeed)], ids=["ddp", "deepspeed_zero3"])
def test_two_processes_do_what_one_does(tmp_path, tokenizer, engine):
    """Losses, logged estimates and multipliers of pairs; five held-out pairs, where the last batch is filled up."""
    make_tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    (one,), two = in_processes("dpo", tmp_path, 1), in_processes("dpo", tmp_path, 2, **engine)
    assert two[0]["multipliers"] == two[1]["multipliers"]
    assert two[0]["multipliers"] == pytest.approx(one["multipliers"], rel=1e-12)
    for ours, theirs in zip(two[0]["steps"], one["steps"], strict=True):
        for key in ("loss", "win_rate/friendly", "bound/brief", "slack/brief", "multiplier/brief", "ess", "kl"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), key
    for key in ("eval_win_rate/friendly", "eval_win_rate/brief"):
        assert two[0]["eval"][key] == pytest.approx(one["eval"][key])


@pytest.mark.slow
def test_two_processes_share_prompts_and_multipliers(tmp_path, tokenizer):
    """Each samples half of a prompt's four texts, so a group and its opponents are spread over both."""
    make_tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    first, second = in_processes("grpo", tmp_path, 2)
    assert first["multipliers"] == second["multipliers"]
    slack = [step["slack/digits"] for step in first["steps"]]
    assert first["multipliers"][1] == pytest.approx(-0.1 * sum(slack))
