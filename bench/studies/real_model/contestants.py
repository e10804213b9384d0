"""The methods: MOPOTrainer's policy steps, and DPO by the same trainer, all within one number of tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed

from bench.studies.real_model.data import DEMO, Data
from mopo_kernels import mopo_weights
from mopo_trainer.data.tokens import TokenizedGroups
from mopo_trainer.report.evidence import within_group
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.datasets import tokenize
from mopo_trainer.training.step import StepBatch, StepLabels
from mopo_trainer.training.trainer import MOPOTrainer

FORWARD_ALONE = 0.45  # of forward and backward: 6 against 13.4 ms a token, LoRA on one core
DPO_BETA = 0.1


@dataclass(frozen=True)
class Contestant:
    """A policy step and what it asks of the labels."""

    step: str  # clone, contrast, dpo
    ask: str  # nothing: the primary alone; asked: the thresholds; fresh: what fresh texts need for them
    length: int = 1  # so many times the tokens by as many times the groups of a step: the steps stay as many
    steps: int = 1  # so many times the tokens by as many times the steps
    tau: float = DEMO.tau

    def thresholds(self, data: Data, group_size: int) -> dict[str, float]:
        if self.ask == "nothing":
            return {}
        if self.ask == "asked":
            return dict(data.thresholds)
        return {name: round(within_group(bound, group_size), 4) for name, bound in data.thresholds.items()}


CONTESTANTS = {
    "clone, primary alone": Contestant("clone", "nothing"),
    "clone": Contestant("clone", "asked"),
    "clone, fresh": Contestant("clone", "fresh"),
    "clone, fresh, twice as long": Contestant("clone", "fresh", length=2),  # as long as the demo
    "clone, no labels": Contestant("clone", "nothing", tau=1e6),  # equal weights: what cloning alone does
    "contrast": Contestant("contrast", "asked"),
    "contrast, fresh": Contestant("contrast", "fresh"),
    "DPO, primary alone": Contestant("dpo", "nothing"),
    "DPO, weights": Contestant("dpo", "fresh"),  # the multipliers of these thresholds are the weights
    "DPO, weights as asked": Contestant("dpo", "asked"),
    "contrast, five times as long": Contestant("contrast", "asked", steps=5),
    "DPO, weights as asked, five times as long": Contestant("dpo", "asked", steps=5),
    "DPO, primary alone, five times as long": Contestant("dpo", "nothing", steps=5),
}


class Trained(NamedTuple):
    model: PreTrainedModel  # with its adapter merged
    multipliers: list[float]
    steps: int
    tokens: float  # forward and backward, and the share of those that went forward alone
    cpu_seconds: float
    losses: list[float]
    implied: dict[str, dict[str, list[float]]]  # see `implied`


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Dataset,
    held_out: Dataset,
    data: Data,
    contestant: Contestant,
    learning_rate: float,
    seed: int,
    output_dir: str,
) -> Trained:
    """The model after as many steps as the data's budget of tokens allows.

    Raises:
        InfeasibleThresholds: the labels do not allow what the contestant asks.
    """
    start = time.process_time()
    set_seed(seed)
    clones = contestant.step == "clone"
    groups_per_step = data.groups_per_step[contestant.step]
    per_step = contestant.length * groups_per_step
    micro_batch = min(per_step, 2)
    size = len(groups["responses"][0])
    args = MOPOConfig(
        output_dir=output_dir,
        primary=data.primary,
        thresholds=[f"{name}={bound}" for name, bound in contestant.thresholds(data, size).items()],
        tau=contestant.tau,
        eps=str(data.eps),
        policy_step="clone" if clones else "contrast",
        min_weight=DEMO.min_weight,
        share_prompt=True,
        as_chat=True,
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=per_step // micro_batch,
        learning_rate=learning_rate,
        max_steps=1,
        seed=seed,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    adapter = LoraConfig(r=DEMO.lora_rank, lora_alpha=2 * DEMO.lora_rank, target_modules="all-linear")
    kind = MOPOTrainer if clones else PairTrainer
    trainer = kind(model, args, train_dataset=groups, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.start_dual()
    if isinstance(trainer, PairTrainer) and contestant.step == "dpo":
        trainer.weights = trainer.dual.multipliers / trainer.dual.multipliers.sum()
    cost = tokens_of_a_group(trainer, clones, contestant.tau)
    args.max_steps = max(1, round(contestant.steps * data.budget / (groups_per_step * cost)))
    trainer.train()
    seconds = time.process_time() - start
    found = implied(trainer, held_out) if data.human else {}
    return Trained(
        trainer.model.merge_and_unload(),
        trainer.dual.multipliers.tolist(),
        args.max_steps,
        args.max_steps * per_step * cost,
        seconds,
        [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row],
        found,
    )


def implied(trainer: MOPOTrainer, held_out: Dataset) -> dict[str, dict[str, list[float]]]:
    """Win rates of held-out groups that h = log π − log π_ref implies, Σ_i softmax_group(h)_i v_i, group by group.

    Returns:
        {"summed", "per token" (h divided by the tokens of the response)} → objective → win rates.
    """
    names = trainer.dual.objectives
    groups = tokenize(held_out, names, trainer.processing_class, trainer.args)
    policy = trainer._response_logps(groups, description="Held-out groups")
    with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        h = policy - trainer._response_logps(groups, description="Held-out groups, reference")
    size = len(held_out["responses"][0])
    tokens = torch.tensor([len(ids) - prompt for ids, prompt in groups.sequences()])
    v = groups.win_rate.nan_to_num(nan=0.5).view(-1, size, len(names))
    found = {}
    for how, ratio in (("summed", h), ("per token", h / tokens)):
        rates = (ratio.view(-1, size, 1).softmax(1) * v).sum(1)
        found[how] = {name: [round(x, 4) for x in rates[:, k].tolist()] for k, name in enumerate(names)}
    return found


def tokens_of_a_group(trainer: MOPOTrainer, clones: bool, tau: float) -> float:
    """Mean over the training groups: the prompt once, and the responses that enter the model."""
    groups: TokenizedGroups = trainer.train_groups
    weights = mopo_weights(groups.win_rate, groups.group, trainer.dual.multipliers, tau=tau)
    enters = (weights > DEMO.min_weight).tolist() if clones else [True] * len(weights)
    sequences, number = groups.sequences(), groups.group.tolist()
    prompts = {g: prompt for g, (_, prompt) in zip(number, sequences, strict=True)}
    responses = sum(len(ids) - prompt for (ids, prompt), x in zip(sequences, enters, strict=True) if x)
    tokens = (sum(prompts.values()) + responses) / len(prompts)
    return tokens if clones else (1 + FORWARD_ALONE) * tokens


class PairTrainer(MOPOTrainer):
    """Contrast, or DPO where it has weights; the reference scores the responses that come, by the adapter switched off.

    MOPOTrainer scores all responses before the first step, which short runs do not come to.
    """

    weights: Tensor | None = None  # [K] of the objectives' labels

    def _needs_reference(self) -> bool:
        return False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        batch, plain = inputs["batch"], self.accelerator.unwrap_model(model)
        labels = StepLabels(self.train_groups.win_rate[batch.response], batch.group, None)
        step = StepBatch.of(batch, labels, self.dual, self.args, self.scoring)

        def logp() -> Tensor:
            return self.scoring.logp(plain, self.scoring.forward(model, plain, step.packed).states, step.packed)

        with torch.no_grad(), plain.disable_adapter():
            ref_logp = logp()
        self.record.add(step)
        if self.weights is not None:
            return dpo(logp() - ref_logp, labels, self.weights)
        return step.objective(logp(), self.dual, ref_logp=ref_logp, policy_step="contrast").loss


def dpo(log_ratio: Tensor, labels: StepLabels, weights: Tensor) -> Tensor:
    """DPO over all pairs of a group; P(i beats j) is the weighted mean of the objectives' orders, ties ½."""
    i, j = torch.triu_indices(len(log_ratio), len(log_ratio), offset=1)
    same = labels.group[i] == labels.group[j]
    i, j = i[same], j[same]
    order = (labels.win_rate[i] - labels.win_rate[j]).sign().nan_to_num()
    p = (1 + order @ weights.to(order)) / 2
    z = DPO_BETA * (log_ratio[i] - log_ratio[j])
    return -(p * logsigmoid(z) + (1 - p) * logsigmoid(-z)).mean()
