"""MOPOTrainer: the Hugging Face Trainer with `mopo_loss` in compute_loss and the dual as a callback."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from mopo_kernels import MOPODual, MOPOOutput, mopo_loss, mopo_objective, mopo_weights
from mopo_trainer.checkpoint import resolve_checkpoint, write_manifest
from mopo_trainer.config import MOPOConfig
from mopo_trainer.data import objectives, to_groups
from mopo_trainer.evaluate import label_win_rates
from mopo_trainer.files import atomic_path
from mopo_trainer.logps import (
    LMHead,
    TokenizedGroups,
    batch_sequences,
    collate,
    pack,
    parameters_fingerprint,
    response_hidden_states,
    response_logps,
    tokenize_groups,
)
from mopo_trainer.scorers import load_scorers

STATE_FILE = "mopo_state.safetensors"


class MOPOTrainer(Trainer):
    """Trains a causal language model with MOPO (arXiv 2505.10892) on groups of labelled responses.

    Args:
        model: a causal LM, a peft model, or a name or path to load.
        args: MOPOConfig; `primary` must be set.
        train_dataset, eval_dataset: rows in any format that `mopo_trainer.data.to_groups` reads.
        processing_class: the tokenizer; loaded from the model's path if absent.
        peft_config: wraps the model in an adapter; the reference policy is then the model with the adapter off.
            Without an adapter the reference is the model as it stands when training starts.
        callbacks, optimizers: as in transformers.Trainer.

    Raises:
        ValueError: objectives or thresholds that the data does not carry, a min_weight that would drop every response.
        DataError: rows that cannot be read.
        InfeasibleThresholds: (from `train`, before the first step) thresholds above what the labels allow.
    """

    args: MOPOConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MOPOConfig,
        train_dataset: Dataset | Sequence[Mapping[str, Any]],
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        LMHead.of(model)
        groups = _read(train_dataset, args)
        names = _objective_order(objectives(groups), args)
        self.train_groups = _tokenize(groups, names, tokenizer, args)
        _check_min_weight(self.train_groups, args)
        self.eval_groups: TokenizedGroups | None = None
        if eval_dataset is not None:
            self.eval_groups = _tokenize(_read(eval_dataset, args), names, tokenizer, args)
        self.dual = _dual(names, args)
        pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = pad_token_id
        self.reference: dict[str, Tensor] = {}  # log-probs [M]: train, eval of π_ref0; lag of π_lag; now, the next lag
        self._resumed = False
        self.record = StepRecord()
        self._staging: Path | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate, pad_token_id=pad_token_id),
            train_dataset=self.train_groups.dataset,
            eval_dataset=self.eval_groups.dataset if self.eval_groups else None,
            processing_class=tokenizer,
            callbacks=[DualCallback(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        self.loss_is_scaled_for_ga = False  # the loss is a mean over groups, averaged over micro-batches by the Trainer
        self.label_names: list[str] = []

    # ------------------------------------------------------------------------------------------------- the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, MOPOOutput]:
        """`mopo_loss` of a batch from `collate`; only the responses whose weight counts enter the model."""
        args, device = self.args, inputs["input_ids"].device
        response = inputs["response"].cpu()
        labels = StepLabels(self.train_groups.win_rate[response], inputs["group"].cpu(), self._lag_log_ratio(response))
        win_rate, group, lag_log_ratio = labels.to(device)
        multipliers = self.dual.multipliers.to(device)
        index = None
        if args.policy_step == "clone":
            weights = mopo_weights(win_rate, group, multipliers, tau=args.tau, lag_log_ratio=lag_log_ratio)
            index = (weights > args.min_weight).nonzero().squeeze(-1)

        row_of = None
        if args.share_prompt:
            row_of = (group if index is None else group[index]).tolist()
        packed = pack(batch_sequences(inputs, index), row_of, self.pad_token_id).to(device)
        plain = self.accelerator.unwrap_model(model)
        hidden = response_hidden_states(model, plain, packed)
        head = LMHead.of(plain)
        with self.accelerator.autocast():
            output = mopo_loss(
                hidden.to(head.weight.dtype),
                head.weight,
                packed.target,
                win_rate,
                group,
                multipliers,
                tau=args.tau,
                eps=float(self.dual.eps),
                ref_logp=self._reference_logp(response, device),
                lag_log_ratio=lag_log_ratio,
                policy_step=args.policy_step,
                min_weight=args.min_weight,
                index=index,
                workspace_bytes=args.workspace_bytes,
                grad_filter=args.grad_filter,
                backend=args.backend,
                **head.options,
            )
        self.record.add(labels, output, all_tokens=int(inputs["attention_mask"].sum()), tokens=packed.tokens)
        return (output.loss, output) if return_outputs else output.loss

    def _reference_logp(self, response: Tensor, device: torch.device) -> Tensor | None:
        """log π_ref of responses for contrast and regress: the policy of one lag ago, or the initial one."""
        if self.args.policy_step == "clone":
            return None
        return self.reference.get("lag", self.reference["train"])[response].to(device)

    def _lag_log_ratio(self, response: Tensor | slice) -> Tensor | None:
        """Clipped log ω = log π_lag − log π_ref0, None before the first refresh."""
        if "lag" not in self.reference:
            return None
        ratio = self.reference["lag"][response] - self.reference["train"][response]
        return ratio.clamp(-self.args.lag_clip, self.args.lag_clip)

    # -------------------------------------------------------------------------------------- dual and reference

    def start_dual(self) -> None:
        """Before the first step: reference log-probs where the run needs them, then the multipliers on all labels."""
        if self._resumed:
            return
        if self._needs_reference():
            self.reference["train"] = self._initial_logps(self.train_groups, "train")
        if self.eval_groups is not None:
            self.reference["eval"] = self._initial_logps(self.eval_groups, "eval")
        self.dual.refresh(self.train_groups.win_rate, self.train_groups.group)

    def step_dual(self) -> None:
        """After an optimizer step: move the multipliers; at every lag, refresh the reference and the thresholds.

        The new reference is the policy as it was one lag ago (arXiv 2505.10892, Algorithm 1), scored then.
        """
        self.dual.update(*self.record.labels())
        if self.dual.lag_due:
            self.reference["lag"] = self.reference.get("now", self.reference["train"])
            self.reference["now"] = self._response_logps(self.train_groups, description="Reference refresh")
            self.dual.refresh(
                self.train_groups.win_rate,
                self.train_groups.group,
                self._lag_log_ratio(slice(None)),
                ratchet=True,
            )

    def _response_logps(self, groups: TokenizedGroups, *, description: str, adapter_off: bool = False) -> Tensor:
        return response_logps(
            self.model_wrapped if self.is_in_train else self.model,
            groups.sequences(),
            accelerator=self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            pad_token_id=self.pad_token_id,
            row_of=groups.group.tolist() if self.args.share_prompt else None,
            backend=self.args.backend,
            adapter_off=adapter_off,
            description=description,
        )

    def _initial_logps(self, groups: TokenizedGroups, split: str) -> Tensor:
        """log π_ref0, from the cache if the same model has scored the same tokens."""
        plain = self.accelerator.unwrap_model(self.model)
        adapter = hasattr(plain, "disable_adapter")
        if not adapter and self.state.global_step > 0:
            raise ValueError(
                f"the {split} data need the log-probs of the policy before training, which this run has overwritten; "
                "give them as eval_dataset when the trainer is made, or train an adapter"
            )
        weights = parameters_fingerprint(plain, lambda parameter: not (adapter and parameter.requires_grad))
        directory = Path(self.args.reference_cache_dir or Path(self.args.output_dir) / "reference")
        file = directory / f"{weights[:16]}-{groups.fingerprint()[:16]}.safetensors"
        if broadcast_object_list([file.is_file()])[0]:  # one rank decides: a forward pass needs all of them
            return load_file(file)["logp"]
        logp = self._response_logps(groups, description=f"Reference log-probs ({split})", adapter_off=adapter)
        if self.args.should_save:
            with atomic_path(file) as temporary:
                save_file({"logp": logp}, temporary)
        self.accelerator.wait_for_everyone()
        return logp

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | Sequence[Mapping[str, Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, and what the policy's log-probs imply about the labels (`mopo_trainer.evaluate.label_win_rates`).

        Both against the initial policy, after a lag refresh too.

        Returns:
            {prefix}_loss, and per objective {prefix}_win_rate/NAME and {prefix}_agreement/NAME.

        Raises:
            ValueError: no data; or, once a run without an adapter has moved the weights, data that were not given when
                the trainer was made: nothing is left to measure the policy against.
        """
        groups, reference = self.eval_groups, self.reference.get("eval")
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            rows = _read(eval_dataset, self.args)
            groups, reference = _tokenize(rows, self.dual.objectives, self.processing_class, self.args), None
        if groups is None:
            raise ValueError("evaluate needs an eval_dataset, here or when the trainer is made")
        if reference is None:
            reference = self._initial_logps(groups, metric_key_prefix)
            if groups is self.eval_groups:
                self.reference["eval"] = reference
        logp = self._response_logps(groups, description="Evaluation")
        output = mopo_objective(
            logp,
            groups.win_rate,
            groups.group,
            self.dual.multipliers,
            tau=self.args.tau,
            ref_logp=reference,
            policy_step=self.args.policy_step,
        )
        metrics = {f"{metric_key_prefix}_loss": output.loss.item()}
        implied = label_win_rates(logp, reference, groups.win_rate, groups.group, self.dual.objectives)
        for name, found in implied.items():
            metrics[f"{metric_key_prefix}_win_rate/{name}"] = found["win_rate"].mean
            if found["agreement"] is not None:
                metrics[f"{metric_key_prefix}_agreement/{name}"] = found["agreement"].mean
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ------------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's objectives, multipliers and token counts to the training logs.

        win_rate, bound, slack and kl are those of the target, the weighted responses of the batch, which the policy is
        trained towards; `evaluate` says where the policy itself is.
        """
        if "loss" in logs:
            logs |= self.record.metrics(self.dual, self.accelerator)
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------------------- checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers.Trainer.train; refuses half-written checkpoints, `True` takes the newest whole one."""
        if resume_from_checkpoint:
            resume_from_checkpoint = str(resolve_checkpoint(Path(self.args.output_dir), resume_from_checkpoint))
        self._resumed = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the whole checkpoint, the dual's state and a manifest into a staging directory, then rename it."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run_dir / ".checkpoint-staging"
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(self._staging / name, run_dir / name)
        finally:
            staging, self._staging = self._staging, None
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _publish(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        dual = {f"dual.{name}": value for name, value in self.dual.state_dict().items()}
        reference = {f"reference.{name}": value for name, value in self.reference.items()}
        save_file({k: v.clone() for k, v in (dual | reference).items()}, written / STATE_FILE)  # no shared storage
        write_manifest(written)
        if final.exists():
            final.rename(written.parent / "replaced")
        os.replace(written, final)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = load_file(Path(resume_from_checkpoint) / STATE_FILE)
        self._check_resumable(state, resume_from_checkpoint)
        self.dual.load_state_dict({k.removeprefix("dual."): v for k, v in state.items() if k.startswith("dual.")})
        self.reference = {k.removeprefix("reference."): v for k, v in state.items() if k.startswith("reference.")}

    def _check_resumable(self, state: Mapping[str, Tensor], checkpoint: str) -> None:
        """Raises ValueError where the arguments have changed in a way that the checkpoint's state cannot follow."""
        saved = dict(zip(self.dual.secondaries, state["dual.floors"].tolist(), strict=True))
        wanted = dict(zip(self.dual.secondaries, self.dual.floors.tolist(), strict=True))
        changed = [f"{name} {saved[name]:g} → {wanted[name]:g}" for name in saved if saved[name] != wanted[name]]
        if changed:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: its run had other thresholds ({', '.join(changed)}); "
                "resume with the same, or start a new run from its model"
            )
        if self._needs_reference() and "reference.train" not in state:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint}: it holds no reference log-probs, which policy_step="
                f"{self.args.policy_step!r} or lag_steps need; resume with the options it was written with"
            )

    def _needs_reference(self) -> bool:
        return self.args.policy_step != "clone" or self.args.lag_steps is not None


class DualCallback(TrainerCallback):
    """Moves the multipliers: solved before the first step, updated after every step, refreshed at every lag."""

    def __init__(self, trainer: MOPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.start_dual()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.record.start_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.step_dual()


class StepLabels(NamedTuple):
    """The labels of a batch, on the CPU in float64."""

    win_rate: Tensor  # [B, K]
    group: Tensor  # [B]
    lag_log_ratio: Tensor | None  # [B]

    def to(self, device: torch.device) -> StepLabels:
        lag = None if self.lag_log_ratio is None else self.lag_log_ratio.to(device)
        return StepLabels(self.win_rate.to(device), self.group.to(device), lag)


class StepRecord:
    """What the micro-batches of the running step hold for the dual, and of the steps since the last log for the log."""

    def __init__(self) -> None:
        self._labels: list[StepLabels] = []
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens = {"tokens": 0, "skipped_tokens": 0}
        self._since = time.perf_counter()

    def start_clock(self) -> None:
        """Tokens per second count from the first step after a log: evaluation and reference passes are not training."""
        if not self._values:
            self._since = time.perf_counter()

    def add(self, labels: StepLabels, output: MOPOOutput, *, all_tokens: int, tokens: int) -> None:
        self._labels.append(labels)
        for name in ("win_rates", "lower_bounds", "ess", "kl", "dropped_mass"):
            self._values[name].append(getattr(output, name).detach().double().cpu())
        self._tokens["tokens"] += tokens
        self._tokens["skipped_tokens"] += all_tokens - tokens

    def labels(self) -> StepLabels:
        """The labels of the whole step, groups of its micro-batches kept apart; then forgets them."""
        parts, self._labels = self._labels, []
        offset = max(int(part.group.max()) for part in parts) + 1
        lags = [part.lag_log_ratio for part in parts if part.lag_log_ratio is not None]
        return StepLabels(
            torch.cat([part.win_rate for part in parts]),
            torch.cat([part.group + i * offset for i, part in enumerate(parts)]),
            torch.cat(lags) if lags else None,
        )

    def metrics(self, dual: MOPODual, accelerator: Any) -> dict[str, float]:
        """Means since the last log over steps and ranks, token counts summed; then starts over."""
        if not self._values:
            return {}
        mean = {name: torch.stack(values).nanmean(0) for name, values in self._values.items()}
        counts = torch.tensor([float(self._tokens["tokens"]), float(self._tokens["skipped_tokens"])])
        if accelerator.num_processes > 1:
            device = accelerator.device
            mean = {k: accelerator.gather(v[None].to(device)).nanmean(0).cpu() for k, v in mean.items()}
            counts = accelerator.reduce(counts.to(device), reduction="sum").cpu()
        seconds = time.perf_counter() - self._since
        logs = {name: mean[name].item() for name in ("ess", "kl", "dropped_mass")}
        logs |= {"tokens_per_second": counts[0].item() / seconds, "skipped_tokens": counts[1].item()}
        thresholds = dict(zip(dual.secondaries, dual.thresholds.tolist(), strict=True))
        for k, name in enumerate(dual.objectives):
            logs[f"win_rate/{name}"] = mean["win_rates"][k].item()
            logs[f"multiplier/{name}"] = dual.multipliers[k].item()
            logs[f"bound/{name}"] = mean["lower_bounds"][k].item()
            if thresholds.get(name, -torch.inf) > -torch.inf:
                logs[f"threshold/{name}"] = thresholds[name]
                logs[f"slack/{name}"] = logs[f"bound/{name}"] - thresholds[name]
        self._values.clear()
        self._tokens = {"tokens": 0, "skipped_tokens": 0}
        return logs


def _read(rows: Dataset | Sequence[Mapping[str, Any]], args: MOPOConfig) -> Dataset:
    return to_groups(rows, scorers=load_scorers(args.scorers or []), rating_scale=args.rating_scale)


def _tokenize(groups: Dataset, names: Sequence[str], tokenizer: Any, args: MOPOConfig) -> TokenizedGroups:
    return tokenize_groups(
        groups,
        names,
        tokenizer,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        as_chat=args.as_chat,
    )


def _objective_order(names: Sequence[str], args: MOPOConfig) -> list[str]:
    """The primary first, then the others as the data has them.

    Raises:
        ValueError: the primary or a threshold names an objective that the data does not carry.
    """
    if args.primary is None:
        raise ValueError(f"primary is not set; choose the objective to maximise among {', '.join(names)}")
    for argument, wanted in (("primary", [args.primary]), ("thresholds", args.threshold_map())):
        for name in wanted:
            if name not in names:
                raise ValueError(f"{argument} names {name!r}, which the data does not carry; it has {', '.join(names)}")
    if args.primary in args.threshold_map():
        raise ValueError(f"thresholds name the primary objective {args.primary!r}; it is maximised, not held")
    return [args.primary, *(name for name in names if name != args.primary)]


def _check_min_weight(groups: TokenizedGroups, args: MOPOConfig) -> None:
    largest = int(groups.group.bincount().max())
    if args.policy_step == "clone" and args.min_weight >= 1 / largest:
        raise ValueError(
            f"min_weight={args.min_weight} could drop all responses of a group of {largest}; "
            f"give less than {1 / largest:.3g}"
        )


def _dual(names: Sequence[str], args: MOPOConfig) -> MOPODual:
    return MOPODual(
        names,
        primary=names[0],
        thresholds=args.threshold_map(),
        tau=args.tau,
        eps=args.robust_radius(),
        update=args.dual_update,
        lag_steps=args.lag_steps,
        ratchet_beta=args.ratchet_beta,
        multiplier_lr=args.multiplier_lr,
        chi_lr=args.chi_lr,
        sigma=args.barrier_sigma,
        delta=args.barrier_delta,
    )
