"""MOPO inside TRL's DPOTrainer: its data preparation, reference, head, logging and checkpoints, our labels and loss.

from mopo_trainer.integrations.trl import MOPODPOTrainer

trainer = MOPODPOTrainer(
    model, args=DPOConfig(...), train_dataset=rows, processing_class=tokenizer,
    primary="helpful", thresholds={"concise": 0.6},
)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from mopo_kernels import MOPODual, MOPOOutput, mopo_objective
from mopo_trainer.data import labels, objectives, to_groups
from mopo_trainer.data.errors import DataError
from mopo_trainer.integrations.trl.state import KeepsDual
from mopo_trainer.names import it_has

COLUMN = "mopo_win_rate"  # of a row: P(wins) of chosen and of rejected by each objective, NaN where unlabelled
LOSS = "mopo"  # its name in DPOConfig's loss_type


class MOPODPOTrainer(KeepsDual, DPOTrainer):
    """TRL's DPOTrainer that maximises one objective while others stay above thresholds (arXiv 2505.10892).

    Rows hold what DPOTrainer takes (prompt, chosen, rejected) and their labels as `preference` ({objective: P(chosen
    beats rejected)}), `ratings` or `comparisons`, as everywhere here (`mopo_trainer.data.to_groups`); each row is a
    group of two. Everything else is DPOTrainer's and keeps its meaning: reference models and precomputed reference
    log-probs, PEFT, accumulation, evaluation, checkpoints, metrics.

    Args:
        args, kwargs: DPOTrainer's. In `DPOConfig`, `loss_type=["mopo", "sft"], loss_weights=[1.0, 0.1]` adds losses of
            TRL's to ours; its default ["sigmoid"] is replaced by ours.
        primary: the objective to maximise.
        thresholds: {objective: win rate} to hold for others.
        tau: temperature of the KL penalty; None takes DPOConfig's `beta`, which has that part in DPO.
        eps: radius of the robust bounds, or "auto".
        policy_step: "contrast" (DPO whose labels are those of the target policy), "regress" (IPO likewise) or "clone".
        dual_update: how the multipliers move: "exact" (solved on all labels before the first step), "sgd", "barrier".
        scorers: {objective: function of (prompt, response)} computed from the texts.
        rating_scale: ratings become P = sigmoid(difference / scale).

    Logged beside TRL's metrics, under MOPOTrainer's names: win_rate/, bound/, multiplier/, threshold/, slack/ of each
    objective, ess and kl: those of the target, which the policy is trained towards.

    Raises:
        DataError: rows that hold no pair, or whose labels cannot be read.
        ValueError: an objective that the data does not carry; options of DPOConfig that have no meaning here.
        InfeasibleThresholds: (from `train`, before the first step) thresholds above what the labels allow.
    """

    _tag_names = ["trl", "mopo"]  # noqa: RUF012
    _name = "MOPO"

    def __init__(
        self,
        *args: Any,
        primary: str,
        thresholds: Mapping[str, float] | None = None,
        tau: float | None = None,
        eps: float | Literal["auto"] = 0.0,
        policy_step: Literal["clone", "contrast", "regress"] = "contrast",
        dual_update: Literal["exact", "sgd", "barrier"] = "exact",
        scorers: Mapping[str, Callable[[str, str], float]] | None = None,
        rating_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(DPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        _check_config(given.get("args"))
        self.policy_step: Literal["clone", "contrast", "regress"] = policy_step
        self._read = partial(to_groups, adapter="none", scorers=scorers, rating_scale=rating_scale)
        self._wanted = [primary, *(thresholds or {})]
        self._objectives: list[str] = []  # of the training data, the primary first
        super().__init__(*args, **kwargs)
        self.loss_types, self.loss_weights, self.share = _losses(self.loss_types, self.loss_weights)
        self.dual = MOPODual(
            self._objectives,
            primary=primary,
            thresholds=thresholds or {},
            tau=self.beta if tau is None else tau,
            eps=eps,
            update=dual_update,
        )
        self._labels: list[Tensor] = []  # [2·B, K] of the running step's micro-batches
        self.data_collator: Any = LabelledCollator(self.data_collator)
        self.add_callback(_MovesDual(self))

    # ------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        return super()._prepare_dataset(self._labelled(dataset, dataset_name), processing_class, args, dataset_name)

    def _labelled(self, dataset: Any, name: str) -> Dataset:
        """The rows with their win rates as a column."""
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"the {name} data are a {type(dataset).__name__}; give a Dataset, all of whose labels count"
            )
        if COLUMN in dataset.column_names:
            return dataset
        groups = self._read(dataset)
        if len(groups) != len(dataset) or any(len(responses) != 2 for responses in groups["responses"]):
            raise DataError(f"the {name} data hold rows without exactly two responses; MOPOTrainer takes larger groups")
        known = objectives(groups)
        if not self._objectives:
            self._objectives = _in_order(known, self._wanted)
        win_rate = torch.full((len(dataset), 2, len(self._objectives)), torch.nan, dtype=torch.float64)
        for k, objective in enumerate(self._objectives):
            if objective in known:
                win_rate[:, :, k] = labels(groups, [objective])[0].view(-1, 2)
        return dataset.add_column(COLUMN, win_rate.tolist())

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    # ------------------------------------------------------------------------------------------------------- loss

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(model, {key: x for key, x in inputs.items() if key != COLUMN})

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's forward passes, metrics and other losses, and our loss of the log-probs that these made."""
        inputs = dict(inputs)
        win_rate = inputs.pop(COLUMN)
        with self._captured() as log_probs:
            found = super()._compute_loss(model, inputs, return_outputs)
        others, outputs = found if return_outputs else (found, None)
        length = inputs["completion_mask"].shape[1] - 1
        logp, *reference = (x[:, -length:].sum(1) for x in log_probs[:2])
        if self.precompute_ref_logps:
            reference = [torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])]
        output = self._objective(logp, reference[0], win_rate)
        self._remember(output, win_rate)
        loss = others + self.share * output.loss
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """Per-token log-probs of the forward passes in this context: the policy's, then the reference's."""
        found: list[Tensor] = []

        def remember(module: nn.Module, given: Any, output: Any) -> None:
            found.append(output.log_probs)

        with ExitStack() as hooks:
            for model in {self.accelerator.unwrap_model(self.model), self.ref_model} - {None}:
                hooks.callback(model.register_forward_hook(remember).remove)
            yield found

    def _objective(self, logp: Tensor, ref_logp: Tensor, win_rate: Tensor) -> MOPOOutput:
        return mopo_objective(
            logp,
            win_rate,
            torch.arange(len(logp) // 2, device=logp.device).repeat(2),
            self.dual.multipliers.to(logp.device),
            tau=self.dual.tau,
            eps=float(self.dual.eps),
            ref_logp=None if self.policy_step == "clone" else ref_logp,
            policy_step=self.policy_step,
        )

    def _remember(self, output: MOPOOutput, win_rate: Tensor) -> None:
        """What the dual moves by, and what is logged."""
        training = self.model.training
        if training:
            self._labels.append(win_rate.cpu())
        dual, metrics = self.dual, self._metrics["train" if training else "eval"]
        values = {"ess": output.ess.item(), "kl": output.kl.item()}
        thresholds = dict(zip(dual.secondaries, dual.thresholds.tolist(), strict=True))
        for k, name in enumerate(dual.objectives):
            values |= {f"win_rate/{name}": output.win_rates[k].item(), f"bound/{name}": output.lower_bounds[k].item()}
            values[f"multiplier/{name}"] = dual.multipliers[k].item()
            if thresholds.get(name, -torch.inf) > -torch.inf:
                values |= {f"threshold/{name}": thresholds[name]}
                values |= {f"slack/{name}": values[f"bound/{name}"] - thresholds[name]}
        for key, value in values.items():
            if value == value:  # an objective that the batch does not label has no estimate
                metrics[key].append(value)

    # ------------------------------------------------------------------------------------------------------- dual

    def start_dual(self) -> None:
        """Before the first step: the multipliers on all labels, unless a checkpoint has brought them."""
        if not self.resumed:
            win_rate = torch.tensor(self.train_dataset[COLUMN], dtype=torch.float64)  # [P, 2, K]
            group = torch.arange(len(win_rate)).repeat_interleave(2)
            self.dual.refresh(win_rate.flatten(0, 1), group)
        self.resumed = False

    def step_dual(self) -> None:
        """After an optimizer step: move the multipliers by the labels of all its micro-batches."""
        pairs = torch.cat([x.unflatten(0, (2, -1)) for x in self._labels], 1)  # [2, B, K]
        self._labels = []
        self.dual.update(pairs.flatten(0, 1), torch.arange(pairs.shape[1]).repeat(2))

    def stands_on(self) -> dict[str, str]:
        win_rate = torch.tensor(self.train_dataset[COLUMN], dtype=torch.float64)
        return super().stands_on() | {"labels": hashlib.sha256(win_rate.numpy().tobytes()).hexdigest()}


class LabelledCollator:
    """A collator of preference pairs, and their win rates [2·B, K]: the chosen's, then the rejected's."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        win_rate = torch.tensor([example[COLUMN] for example in examples], dtype=torch.float64)  # [B, 2, K]
        return self.collate(examples) | {COLUMN: win_rate.transpose(0, 1).flatten(0, 1)}


class _MovesDual(TrainerCallback):
    def __init__(self, trainer: MOPODPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.start_dual()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.trainer.step_dual()


def _check_config(config: DPOConfig | None) -> None:
    """Raise ValueError for options that would change what a sequence's log-prob or the reference is."""
    if config is None:
        return
    refused = {
        "ld_alpha": "it discounts tokens beyond the shorter response; leave it unset",
        "use_weighting": "WPO's weights belong to TRL's losses; leave it False",
        "sync_ref_model": "the labels' weights are relative to the first reference; leave it False",
    }
    for name, mend in refused.items():
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} has no meaning for MOPO's loss: {mend}")
    _losses(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type))


def _losses(types: Sequence[str], weights: Sequence[float]) -> tuple[list[str], list[float], float]:
    """TRL's losses and their weights, and the weight of ours."""
    if list(types) == ["sigmoid"]:  # DPOConfig's default
        return [], [], 1.0
    if list(types).count(LOSS) != 1:
        raise ValueError(f"loss_type={list(types)} does not name {LOSS!r} once; give for example ['{LOSS}', 'sft']")
    others = [(name, weight) for name, weight in zip(types, weights, strict=True) if name != LOSS]
    return [name for name, _ in others], [weight for _, weight in others], weights[list(types).index(LOSS)]


def _in_order(known: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The objectives of the data, the primary first."""
    for argument, name in zip(("primary", *["thresholds"] * len(wanted)), wanted, strict=False):
        if name not in known:
            raise ValueError(f"{argument} names {name!r}, which the data does not carry; {it_has(name, known)}")
    return [wanted[0], *(name for name in known if name != wanted[0])]
