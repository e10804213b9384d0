"""MOPOTrainer: the Hugging Face Trainer with `mopo_loss` in compute_loss and the dual as a callback."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from mopo_kernels import MOPODual, MOPOOutput
from mopo_kernels.loss import policy_loss
from mopo_trainer.data import objectives
from mopo_trainer.data.packing import GroupBatch, SequenceBatch, collate
from mopo_trainer.data.tokens import TokenizedGroups
from mopo_trainer.names import it_has
from mopo_trainer.report.evidence import are_sure, usual_size, worth_of_threshold
from mopo_trainer.training.adapter import (
    carries_adapter,
    check_trainable,
    read_adapter,
    starting_weights,
    with_adapter,
    write_adapter,
)
from mopo_trainer.training.batches import deal
from mopo_trainer.training.callbacks import DualCallback
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.datasets import read_groups, tokenize
from mopo_trainer.training.engines import check_engine, check_loaded
from mopo_trainer.training.evaluation import (
    EvalGroups,
    by_prefix,
    check_best_metric,
    datasets_of,
    eval_metrics,
    read_eval_groups,
)
from mopo_trainer.training.fit import check_positions, check_tokens, pad_token
from mopo_trainer.training.head import Scoring, as_head_pass, head_arguments
from mopo_trainer.training.probe import check_lengths, probe_scoring, sharing_obstacle
from mopo_trainer.training.reference import frozen_fingerprint, initial_logps, policy_fingerprint, response_logps
from mopo_trainer.training.resume import RunState, resolve_checkpoint, write_manifest
from mopo_trainer.training.split import gathered_passes, parameter_count
from mopo_trainer.training.step import StepBatch, StepLabels, StepRecord

logger = logging.getLogger(__name__)


class MOPOTrainer(Trainer):
    """Trains a causal language model with MOPO (arXiv 2505.10892) on groups of labelled responses.

    Args:
        model: a causal LM, a peft model, or a name or path to load.
        args: MOPOConfig; `primary` must be set.
        train_dataset, eval_dataset: rows in any format that `mopo_trainer.data.to_groups` reads, in any container that
            `read_rows` takes (Dataset, stream, table, path …); of a DatasetDict `train` is trained on. {name: rows} as
            eval_dataset are evaluated each under its name: eval_NAME_loss, eval_NAME_win_rate/…
        processing_class: the tokenizer; loaded from the model's path if absent.
        peft_config: wraps the model in an adapter. The reference policy is the model as it stands when training
            starts, with its adapter: a copy of the adapter's starting weights is kept (`adapter.StartingWeights`).
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
        model: str | Path | PreTrainedModel,
        args: MOPOConfig,
        train_dataset: Any,
        eval_dataset: Any | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, MOPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; give a MOPOConfig, which takes the same options")
        if isinstance(model, str | Path):
            model = AutoModelForCausalLM.from_pretrained(model)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
        model = with_adapter(model, peft_config, args.seed)
        check_loaded(model, has_adapter=carries_adapter(model))
        check_trainable(model, share_prompt=args.share_prompt, gradient_checkpointing=args.gradient_checkpointing)
        groups = read_groups(train_dataset, "train_dataset", args)
        names = _objective_order(objectives(groups), args)
        self.train_groups = tokenize(groups, names, tokenizer, args)
        _check_min_weight(self.train_groups, args)
        self.eval_groups: EvalGroups | None = None
        if eval_dataset is not None:
            self.eval_groups = read_eval_groups(eval_dataset, names, tokenizer, args)
        check_best_metric(args, self.eval_groups, names)
        self.dual = _dual(names, args)
        self.reference: dict[str, Tensor] = {}  # [M] of π_ref0: train, eval.…; of π_lag: lag; of the next lag: now
        self._resumed = False
        self.record = StepRecord(args.min_weight if args.policy_step == "clone" else None)
        self._staging: Path | None = None
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=self.train_groups.dataset,
            eval_dataset=datasets_of(self.eval_groups),
            processing_class=tokenizer,
            callbacks=[DualCallback(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        self._parameter_count = parameter_count(model)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the groups of the whole step
        self.label_names: list[str] = []
        check_engine(self.accelerator, has_adapter=carries_adapter(model))
        self.start = starting_weights(model)
        with gathered_passes(model):
            self._check_fit(self.train_groups, *by_prefix(self.eval_groups, "eval").values())
            self.scoring = self._probe(Scoring(pad_token(model, tokenizer), backend=args.backend))
            self._check_lengths(self.train_groups, *by_prefix(self.eval_groups, "eval").values())

    # ------------------------------------------------------------------------------------------------- the step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, GroupBatch],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, MOPOOutput | None]:
        """The policy step on a batch from `collate`; only the responses whose weight counts enter the model.

        The loss is a mean over groups: over those of all micro-batches of all ranks, `num_items_in_batch`, where the
        batch is one of several.
        """
        args, batch, device = self.args, inputs["batch"], self.accelerator.device
        if batch.groups == 0:
            loss = self._idle_loss(model)
            return (loss, None) if return_outputs else loss
        labels = StepLabels(
            self.train_groups.win_rate[batch.response], batch.group, self._lag_log_ratio(batch.response)
        )
        step = StepBatch.of(batch, labels, self.dual, args, self.scoring)
        packed = step.packed.to(device)
        plain = self.accelerator.unwrap_model(model)
        forward = self.scoring.forward(model, plain, packed)
        ref_logp = self._reference_logp(batch.response, device)
        with self.accelerator.autocast():
            if self.scoring.transform is None:
                logp = self.scoring.logp(plain, forward.states, packed)
                output = step.objective(logp, self.dual, ref_logp=ref_logp, policy_step=args.policy_step)
            else:
                head = head_arguments(plain, forward.states, packed, self.scoring.transform)
                output = self._fused_loss(plain, head, step, ref_logp)
        loss = output.loss
        if self.scoring.router_weight and forward.router_loss is not None:
            loss = loss + self.scoring.router_weight * forward.router_loss
            step = replace(step, router_loss=forward.router_loss.detach().double().cpu())
        self.record.add(step)
        if num_items_in_batch is not None:  # gradients are averaged over ranks
            loss = loss * (batch.groups * self.accelerator.num_processes / int(num_items_in_batch))
        return (loss, output) if return_outputs else loss

    def _fused_loss(
        self, plain: PreTrainedModel, head: dict[str, Any], step: StepBatch, ref_logp: Tensor | None
    ) -> MOPOOutput:
        args, device = self.args, self.accelerator.device
        outputs: list[MOPOOutput] = []

        def loss(hidden: Tensor) -> Tensor:
            output = policy_loss(
                **head | {"hidden": hidden},
                labels=step.statistics.to(device),
                ref_logp=ref_logp,
                policy_step=args.policy_step,
                min_weight=args.min_weight,
                index=None if step.index is None else step.index.to(device),
                backend=args.backend,
                workspace_bytes=args.workspace_bytes,
                grad_sampling=args.grad_sampling,
            )
            outputs.append(output)
            return output.loss

        whole_loss = as_head_pass(plain, loss, head["hidden"])
        return replace(outputs[0], loss=whole_loss)

    def _idle_loss(self, model: nn.Module) -> Tensor:  # [] 0
        """What a rank without a group computes, because the others wait for its pass and its gradients."""
        plain = self.accelerator.unwrap_model(model)
        packed = self.scoring.pack(SequenceBatch.of([self.train_groups.shortest()]), None).to(self.accelerator.device)
        states = self.scoring.forward(model, plain, packed).states
        with self.accelerator.autocast():
            return self.scoring.logp(plain, states, packed).sum() * 0

    def get_train_dataloader(self) -> DataLoader:
        """As transformers.Trainer's, but that no group stands for one that is not there (`batches`)."""
        loader, ranks = super().get_train_dataloader(), self.accelerator.num_processes
        return loader if ranks == 1 else deal(loader, self.accelerator.process_index, ranks)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        """The micro-batches of a step, and the groups that they hold on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(inputs["batch"].groups for inputs in batches), device=device)
        return batches, int(self.accelerator.reduce(groups, reduction="sum"))

    def _check_fit(self, *data: TokenizedGroups) -> None:
        """Raise for tokens and lengths that the model's tables do not hold."""
        plain = self.accelerator.unwrap_model(self.model)
        for groups in data:
            check_tokens(plain, groups, self.processing_class)
        check_positions(plain, max(len(groups.longest_group()[-1][0]) for groups in data))

    def _check_lengths(self, *data: TokenizedGroups) -> None:
        plain = self.accelerator.unwrap_model(self.model)
        for groups in data:
            check_lengths(plain, groups.shortest(), groups.longest_group()[-1], self.scoring)

    def _probe(self, scoring: Scoring) -> Scoring:
        """How this model's log-probabilities are computed, and whether its prompts can be shared."""
        plain = self.accelerator.unwrap_model(self.model)
        scoring = probe_scoring(plain, self.train_groups.longest_group()[-1][0], scoring)
        if scoring.transform is None and self.args.grad_sampling is not None:
            raise ValueError(
                f"grad_sampling={self.args.grad_sampling} needs a plain LM head, and this model's logits are its own; "
                "leave it unset"
            )
        return replace(scoring, share_prompt=self.args.share_prompt and self._can_share(self.train_groups, scoring))

    def _can_share(self, groups: TokenizedGroups, scoring: Scoring) -> bool:
        plain = self.accelerator.unwrap_model(self.model)
        rows = (groups.longest_group(), groups.widest_group())
        obstacle = next(filter(None, (sharing_obstacle(plain, row, scoring) for row in rows)), "")
        if obstacle:
            logger.warning("share_prompt is off: %s", obstacle)
        return not obstacle

    def floating_point_ops(self, inputs: dict[str, GroupBatch]) -> int:
        return 6 * inputs["batch"].sequences.ids.numel() * self._parameter_count

    def _track_num_input_tokens(self, inputs: dict[str, GroupBatch]) -> None:
        super()._track_num_input_tokens(_as_tokens(inputs))

    def _reference_logp(self, response: Tensor, device: torch.device) -> Tensor | None:
        """log π_ref of responses: what regress compares with is the policy of one lag ago, contrast the initial one.

        Contrast's weights carry ω = π_lag/π_ref0; against π_lag it would count twice, with π_lag ω exp(s/τ) as optimum.
        """
        if self.args.policy_step == "clone":
            return None
        lagged = self.args.policy_step == "regress" and "lag" in self.reference
        return self.reference["lag" if lagged else "train"][response].to(device)

    def _lag_log_ratio(self, response: Tensor | slice) -> Tensor | None:
        """Clipped log ω = log π_lag − log π_ref0, None before the first refresh."""
        if "lag" not in self.reference:
            return None
        ratio = self.reference["lag"][response] - self.reference["train"][response]
        return ratio.clamp(-self.args.lag_clip, self.args.lag_clip)

    # -------------------------------------------------------------------------------------- dual and reference

    def start_dual(self) -> None:
        """Before the first step: reference log-probs where the run needs them, then the multipliers on all labels."""
        if not self._resumed:
            self.reference, self.start = {}, starting_weights(self.accelerator.unwrap_model(self.model))
        for prefix, groups in by_prefix(self.eval_groups, "eval").items():
            self._eval_reference(groups, prefix)
        if self._resumed:
            return
        _warn_of_luck(self.train_groups, self.dual.objectives, self.args)
        if self._needs_reference():
            self.reference["train"] = self._initial_logps(self.train_groups, "train")
        self.dual.refresh(self.train_groups.win_rate, self.train_groups.group)

    def step_dual(self) -> None:
        """After an optimizer step: move the multipliers; at every lag, refresh the reference and the thresholds.

        The new reference is the policy as it was one lag ago (arXiv 2505.10892, Algorithm 1), scored then.
        """
        self.record.move(self.dual)
        if self.dual.lag_due:
            self.reference["lag"] = self.reference.get("now", self.reference["train"])
            self.reference["now"] = self._response_logps(self.train_groups, description="Reference refresh")
            self.dual.refresh(
                self.train_groups.win_rate,
                self.train_groups.group,
                self._lag_log_ratio(slice(None)),
                ratchet=True,
            )

    def _response_logps(self, groups: TokenizedGroups, *, description: str) -> Tensor:
        with self._passes():
            return response_logps(
                self.model_wrapped if self.is_in_train else self.model,
                groups.sequences(),
                scoring=self._scoring_of(groups),
                accelerator=self.accelerator,
                batch_size=self.args.per_device_eval_batch_size,
                row_of=groups.group.tolist(),
                description=description,
            )

    def _passes(self) -> AbstractContextManager[None]:
        """While open, the model runs forward, before its engine is there too."""
        return gathered_passes(self.model) if self.model_wrapped is self.model else nullcontext()

    def _scoring_of(self, groups: TokenizedGroups) -> Scoring:
        """The trainer's, without shared prompts where these data are longer than those it was probed with."""
        if groups is self.train_groups or not self.scoring.share_prompt:
            return self.scoring
        return replace(self.scoring, share_prompt=self._can_share(groups, self.scoring))

    def _initial_logps(self, groups: TokenizedGroups, split: str) -> Tensor:
        """log π_ref0, from the cache if the same model has scored the same tokens."""
        plain = self.accelerator.unwrap_model(self.model)
        if self.start is None and self.state.global_step > 0:
            raise ValueError(
                f"the {split} data need the log-probs of the policy before training, which this run has overwritten; "
                "give them as eval_dataset when the trainer is made, or train an adapter"
            )
        with self.start.in_place(plain) if self.start else nullcontext():
            policy = policy_fingerprint(plain, self.accelerator.mixed_precision)
            directory = Path(self.args.reference_cache_dir or Path(self.args.output_dir) / "reference")
            return initial_logps(
                directory / f"{policy[:16]}-{groups.fingerprint()[:16]}.safetensors",
                groups,
                partial(self._response_logps, description=f"Reference log-probs ({split})"),
                self.accelerator,
            )

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(
        self,
        eval_dataset: Any | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss, and what the policy's log-probs imply about the labels (`report.evaluate.label_win_rates`).

        Both against the initial policy, after a lag refresh too. `eval_dataset` is what the trainer takes under this
        name, or the name of one of its sets; several sets are logged each for itself.

        Returns:
            {prefix}_loss, and per objective {prefix}_win_rate/NAME and {prefix}_agreement/NAME; of a set among several
            with the prefix {prefix}_SET.

        Raises:
            ValueError: no data; or, once a run without an adapter has moved the weights, data that were not given when
                the trainer was made: nothing is left to measure the policy against.
        """
        given = self.eval_groups
        if isinstance(eval_dataset, str) and isinstance(given, dict) and eval_dataset in given:
            given = given[eval_dataset]
        elif eval_dataset is not None and eval_dataset is not self.eval_dataset:
            given = read_eval_groups(eval_dataset, self.dual.objectives, self.processing_class, self.args)
            with self._passes():
                self._check_fit(*by_prefix(given, "eval").values())
                self._check_lengths(*by_prefix(given, "eval").values())
        if given is None:
            raise ValueError("evaluate needs an eval_dataset, here or when the trainer is made")
        metrics: dict[str, float] = {}
        for prefix, groups in by_prefix(given, metric_key_prefix).items():
            reference = self._eval_reference(groups, prefix)
            logp = self._response_logps(groups, description="Evaluation")
            found = eval_metrics(groups, logp, reference, dual=self.dual, args=self.args, prefix=prefix)
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            metrics |= found
        return metrics

    def _eval_reference(self, groups: TokenizedGroups, prefix: str) -> Tensor:
        """log π_ref0 of held-out responses, kept under their fingerprint: a resumed run may bring others."""
        key = f"eval.{groups.fingerprint()[:16]}"
        if key not in self.reference:
            self.reference[key] = self._initial_logps(groups, prefix)
        return self.reference[key]

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
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:
            raise ValueError("DeepSpeed has wrapped this trainer's model for its first run; make a new trainer")
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
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
            identity = self._identity  # which all ranks must ask for where they share the weights
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(self._staging / name, run_dir / name, identity)
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
        self.state.best_model_checkpoint = broadcast_object_list([self.state.best_model_checkpoint])[0]

    def _publish(self, written: Path, final: Path, identity: dict[str, str]) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        RunState(self.dual.state_dict(), self.reference, identity).write(written)
        if self.start:
            write_adapter(written, self.start, self.accelerator.unwrap_model(self.model))
        write_manifest(written)
        if final.exists():
            final.rename(written.parent / "replaced")
        os.replace(written, final)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.start:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:  # called under every engine
        if checkpoint is not None:
            if self.start:
                self.start = read_adapter(Path(checkpoint), self.accelerator.unwrap_model(self.model))
            state = RunState.read(Path(checkpoint))
            state.check(
                self.dual,
                checkpoint,
                self._identity,
                needs_reference=self._needs_reference(),
                by_deepspeed=self.is_deepspeed_enabled,
            )
            self.dual.load_state_dict(state.dual)
            self.reference = state.reference
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if self.start:
            read_adapter(Path(self.state.best_model_checkpoint), self.accelerator.unwrap_model(self.model))
        else:
            super()._load_best_model()

    @cached_property
    def _identity(self) -> dict[str, str]:
        """Hashes of what a resumed run must share with its checkpoint, which does not hold it."""
        model = self.accelerator.unwrap_model(self.model)
        return {"model": frozen_fingerprint(model), "train": self.train_groups.fingerprint()}

    def _needs_reference(self) -> bool:
        return self.args.policy_step != "clone" or self.args.lag_steps is not None


def _as_tokens(inputs: dict[str, GroupBatch]) -> dict[str, Tensor]:
    """A batch as transformers.Trainer counts tokens in it."""
    ids = inputs["batch"].sequences.ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


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
                raise ValueError(f"{argument} names {name!r}, which the data does not carry; {it_has(name, names)}")
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


def _warn_of_luck(groups: TokenizedGroups, names: Sequence[str], args: MOPOConfig) -> None:
    """Say of thresholds that labels meet and fresh texts will not what they are worth there."""
    for name, bound in args.threshold_map().items():
        if bound > 0.5 and are_sure(groups.win_rate[:, names.index(name)], groups.group):
            logger.warning("%s", worth_of_threshold(name, bound, usual_size(groups.group)))


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
