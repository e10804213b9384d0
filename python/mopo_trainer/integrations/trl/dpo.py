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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from mopo_kernels import MOPODual, MOPOOutput, label_statistics, mopo_objective
from mopo_trainer.data import labels, objectives, to_groups
from mopo_trainer.data.errors import DataError
from mopo_trainer.integrations.online import scored_groups
from mopo_trainer.integrations.trl.state import KeepsDual
from mopo_trainer.names import it_has

COLUMN = "mopo_win_rate"  # of a row: P(wins) of chosen and of rejected by each objective, NaN where unlabelled
GROUP = "mopo_group"  # of a row: the group of chosen and of rejected; COPY where rejected is one that stands elsewhere
COPY = -1
KEPT = ("tools", "chat_template_kwargs")  # columns that TRL's tokenization reads
LOSS = "mopo"  # its name in DPOConfig's loss_type


class MOPODPOTrainer(KeepsDual, DPOTrainer):
    """TRL's DPOTrainer that maximises one objective while others stay above thresholds (arXiv 2505.10892).

    Rows hold what DPOTrainer takes (prompt, chosen, rejected) and their labels as `preference` ({objective: P(chosen
    beats rejected)}), `ratings` or `comparisons`, as everywhere here (`mopo_trainer.data.to_groups`). A row with
    `responses` instead is a group of as many: batch sizes count groups, and TRL's metrics of chosen and rejected
    compare the pairs that a group is laid out in, the best response by the primary objective beside the worst, and on.
    Everything else is DPOTrainer's and keeps its meaning: reference models and precomputed reference log-probs, PEFT,
    accumulation, evaluation, checkpoints, metrics.

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
        DataError: rows whose responses or labels cannot be read.
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
        self._grouped = False  # whether any row has more responses than two
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
        if self.loss_types and self._grouped:
            raise ValueError(
                f"loss_type={self.loss_types} are losses of pairs; with groups of more give ['{LOSS}'] alone"
            )
        self._labels: list[tuple[Tensor, Tensor]] = []  # [M, K], [M] of the running step's micro-batches
        self.data_collator: Any = LabelledCollator(self.data_collator)
        self.add_callback(_MovesDual(self))

    # ------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Any:
        labelled = self._labelled(dataset, dataset_name)
        prepared = super()._prepare_dataset(labelled, processing_class, args, dataset_name)
        left, whole = Counter(_first_groups(prepared)), Counter(_first_groups(labelled))
        cut = next((group for group in left if left[group] != whole[group]), None)
        if cut is not None:
            raise DataError(
                f"row {cut} of the {dataset_name} data: max_length leaves out some of its responses; raise it"
            )
        return prepared

    def _labelled(self, dataset: Any, name: str) -> Dataset:
        """Rows of two responses each, with their win rates and groups as columns."""
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"the {name} data are a {type(dataset).__name__}; give a Dataset, all of whose labels count"
            )
        if COLUMN in dataset.column_names:
            return dataset
        groups = self._read(dataset)
        known = objectives(groups)
        if not self._objectives:
            self._objectives = _in_order(known, self._wanted)
        there = [k for k, objective in enumerate(self._objectives) if objective in known]
        values, group = labels(groups, [self._objectives[k] for k in there])
        win_rate = torch.full((len(values), len(self._objectives)), torch.nan, dtype=torch.float64)
        win_rate[:, there] = values.double()
        layout = [_pairs(of_group[:, 0]) for of_group in win_rate.split(group.bincount().tolist())]
        self._grouped |= any(len(pairs) > 1 for pairs in layout)
        if "responses" in dataset.column_names:
            dataset = _rows_of_pairs(dataset, groups, layout)
        first = (group.bincount().cumsum(0) - group.bincount()).tolist()
        index = [[first[g] + i, first[g] + j] for g, pairs in enumerate(layout) for i, j, _ in pairs]
        of_row = [[g, COPY if copy else g] for g, pairs in enumerate(layout) for _, _, copy in pairs]
        return dataset.add_column(COLUMN, win_rate[torch.tensor(index)].tolist()).add_column(GROUP, of_row)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        """Batches of whole groups."""
        groups = _WholeGroups(self._remove_unused_columns(dataset, description))
        if self.accelerator.num_processes > 1 and len(set(groups.sizes)) > 1:
            raise ValueError(
                "several processes need groups of one size, since TRL gathers its metrics response by response; "
                "MOPOTrainer takes any"
            )
        return super()._get_dataloader(groups, description, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in (COLUMN, GROUP) if name not in self._signature_columns]

    # ------------------------------------------------------------------------------------------------------- loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Labels and stored log-probs stay as exact as they are; under DeepSpeed they would get the model's dtype."""
        exact = {key: x for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return super()._prepare_inputs(inputs) | {key: x.to(self.args.device) for key, x in exact.items()}

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(model, {key: x for key, x in inputs.items() if key not in (COLUMN, GROUP)})

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's forward passes, metrics and other losses, and our loss of the log-probs that these made."""
        inputs = dict(inputs)
        win_rate, group = inputs.pop(COLUMN), inputs.pop(GROUP)
        with self._captured() as log_probs:
            found = super()._compute_loss(model, inputs, return_outputs)
        others, outputs = found if return_outputs else (found, None)
        length = inputs["completion_mask"].shape[1] - 1
        logp, *reference = (x[:, -length:].sum(1) for x in log_probs[:2])
        if self.precompute_ref_logps:
            reference = [torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])]
        kept = group != COPY
        output = self._objective(logp[kept], reference[0][kept], win_rate[kept], group[kept])
        self._remember(win_rate, group)
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

    def _objective(self, logp: Tensor, ref_logp: Tensor, win_rate: Tensor, group: Tensor) -> MOPOOutput:
        return mopo_objective(
            logp,
            win_rate,
            group,
            self.dual.multipliers.to(logp.device),
            tau=self.dual.tau,
            eps=float(self.dual.eps),
            ref_logp=None if self.policy_step == "clone" else ref_logp,
            policy_step=self.policy_step,
        )

    def _remember(self, win_rate: Tensor, group: Tensor) -> None:
        """What the dual moves by, and what is logged: estimates of the batches of all processes."""
        training, dual = self.model.training, self.dual
        if training:
            self._labels.append((win_rate[group != COPY].cpu(), group[group != COPY].cpu()))
        win_rate, group = self._of_all_processes(win_rate, group)
        win_rate, group = win_rate[group != COPY].cpu(), group[group != COPY].cpu()
        found = label_statistics(win_rate, group, dual.multipliers.cpu(), tau=dual.tau, eps=float(dual.eps)).values
        values = {"ess": found.ess.item(), "kl": found.kl.item()}
        thresholds = dict(zip(dual.secondaries, dual.thresholds.tolist(), strict=True))
        for k, name in enumerate(dual.objectives):
            values |= {f"win_rate/{name}": found.win_rates[k].item(), f"bound/{name}": found.lower_bounds[k].item()}
            values[f"multiplier/{name}"] = dual.multipliers[k].item()
            if thresholds.get(name, -torch.inf) > -torch.inf:
                values |= {f"threshold/{name}": thresholds[name]}
                values |= {f"slack/{name}": values[f"bound/{name}"] - thresholds[name]}
        counts = dict(zip(dual.objectives, scored_groups(win_rate, group), strict=True))
        metrics = self._metrics["train" if training else "eval"]
        for key, value in values.items():
            if value == value:  # an objective that the batch does not label has no estimate
                metrics[key] += [value] * max(1, counts.get(key.partition("/")[2], 1))  # TRL logs the mean of these

    def _of_all_processes(self, win_rate: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of every process; in evaluation without the groups that fill up the last batch."""
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return win_rate, group
        count = len(group.chunk(2)[0].unique_consecutive())  # of groups, all of one size
        own = (group * accelerator.num_processes + accelerator.process_index).where(group != COPY, COPY)
        gather = accelerator.gather if self.model.training else accelerator.gather_for_metrics
        by_group = (x.unflatten(0, (2, count, -1)).transpose(0, 1).contiguous() for x in (win_rate, own))
        win_rate, group = (gather(x).flatten(0, 2) for x in by_group)
        return win_rate, group

    # ------------------------------------------------------------------------------------------------------- dual

    def start_dual(self) -> None:
        """Before the first step: the multipliers on all labels, unless a checkpoint has brought them."""
        if not self.resumed:
            self.dual.refresh(*self._all_labels())
        self.resumed = False

    def step_dual(self) -> None:
        """After an optimizer step: move the multipliers by the labels of all its micro-batches."""
        win_rate, group = (torch.cat(x) for x in zip(*self._labels, strict=True))
        self._labels = []
        self.dual.update(win_rate, group)

    def stands_on(self) -> dict[str, str]:
        labels = hashlib.sha256(b"".join(x.numpy().tobytes() for x in self._all_labels())).hexdigest()
        return super().stands_on() | {"labels": labels}

    def _all_labels(self) -> tuple[Tensor, Tensor]:  # [M, K], [M]
        win_rate = torch.tensor(self.train_dataset[COLUMN], dtype=torch.float64).flatten(0, 1)
        group = torch.tensor(self.train_dataset[GROUP]).flatten()
        return win_rate[group != COPY], group[group != COPY]


class LabelledCollator:
    """TRL's collator, and the win rates [2·B, K] and groups [2·B] of its rows: the chosen's, then the rejected's."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        rows = [row for group in examples for row in (group if isinstance(group, list) else [group])]
        win_rate = torch.tensor([row[COLUMN] for row in rows], dtype=torch.float64)  # [B, 2, K]
        group = torch.tensor([row[GROUP] for row in rows])  # [B, 2]
        return self.collate(rows) | {COLUMN: win_rate.transpose(0, 1).flatten(0, 1), GROUP: group.T.flatten()}


class _WholeGroups(torch.utils.data.Dataset):
    """The rows of each group, as one example."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.sizes = list(Counter(_first_groups(rows)).values())
        self.ends = np.cumsum(self.sizes).tolist()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.rows[i] for i in range(self.ends[index] - self.sizes[index], self.ends[index])]


def _first_groups(rows: Dataset) -> list[int]:
    return [first for first, _ in rows[GROUP]]


def _pairs(primary: Tensor) -> list[tuple[int, int, bool]]:  # [n]
    """A group laid out in pairs, the best by the primary beside the worst; the second of an odd one out is a copy."""
    if len(primary) == 2:
        return [(0, 1, False)]
    order = primary.nan_to_num(0.5).argsort(descending=True, stable=True).tolist()
    half = len(order) // 2
    pairs = [(order[i], order[-1 - i], False) for i in range(half)]
    return pairs + [(order[half], order[-1], True)] * (len(order) % 2)


def _rows_of_pairs(dataset: Dataset, groups: Dataset, layout: list[list[tuple[int, int, bool]]]) -> Dataset:
    kept = [name for name in KEPT if name in dataset.column_names]
    rows: dict[str, list[Any]] = {name: [] for name in ("prompt", "chosen", "rejected", *kept)}
    for group, row, pairs in zip(groups, dataset.select_columns(kept or dataset.column_names), layout, strict=True):
        for chosen, rejected, _ in pairs:
            rows["prompt"].append(group["prompt"])
            rows["chosen"].append(group["responses"][chosen])
            rows["rejected"].append(group["responses"][rejected])
            for name in kept:
                rows[name].append(row[name])
    return Dataset.from_dict(rows)


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
    refused: dict[str, tuple[Any, str]] = {
        "ld_alpha": (None, "it discounts tokens beyond the shorter response; leave it unset"),
        "use_weighting": (False, "WPO's weights belong to TRL's losses; leave it False"),
        "sync_ref_model": (False, "the labels' weights are relative to the first reference; leave it False"),
        "f_divergence_type": ("reverse_kl", "its target policy is that of the KL penalty; leave it 'reverse_kl'"),
    }
    if len(config.loss_type) == 1:  # others of TRL's may need it
        refused["label_smoothing"] = (0.0, "soft labels are the rows': give P(chosen beats rejected) as `preference`")
    for name, (default, mend) in refused.items():
        if getattr(config, name) != default:
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
