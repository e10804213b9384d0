"""`mopo train`: data, model, MOPOTrainer, curves, as the arguments say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
)
from transformers.trainer_utils import set_seed

from mopo_kernels.objective.dual import auto_eps
from mopo_trainer import data
from mopo_trainer.commands import findings
from mopo_trainer.commands.arguments import parse_arguments, target_modules
from mopo_trainer.commands.options import ScriptArguments
from mopo_trainer.commands.solve import LabelProblem, infeasibility_explained, objectives_table, summary
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.files import write_json
from mopo_trainer.names import it_has
from mopo_trainer.report import plots
from mopo_trainer.report.tables import new_table
from mopo_trainer.training.callbacks import Bar, StepLines
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.resume import resolve_checkpoint
from mopo_trainer.training.trainer import MOPOTrainer

# ---------------------------------------------------------------------------------------------------------- the run


def run_train(arguments: Sequence[str]) -> int:
    """Train as the arguments say; returns the exit code."""
    script, config = parse_arguments(arguments)
    set_seed(config.seed)
    if not torch.accelerator.is_available():
        config.dataloader_pin_memory = False  # torch warns on every run otherwise
    if config.resume_from_checkpoint:
        resolve_checkpoint(Path(config.output_dir), config.resume_from_checkpoint)  # fails before the data are read
    train_groups, eval_groups = load_groups(script, config)
    console = Console(quiet=config.process_index != 0)
    print_plan(script.dataset or "", train_groups, config, console)
    model, tokenizer = load_model(script)
    trainer = MOPOTrainer(
        model, config, train_groups, eval_groups, processing_class=tokenizer, peft_config=lora_config(script)
    )
    trainer.remove_callback(PrinterCallback if config.disable_tqdm else ProgressCallback)
    trainer.add_callback(StepLines)
    if not config.disable_tqdm:
        trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    history = trainer.state.log_history
    if eval_groups is not None and not _evaluated_at(history, trainer.state.global_step):
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        objectives, output = trainer.dual.objectives, Path(config.output_dir)
        plots.plot_training(history, output / "training.png", objectives=objectives)
        write_json(output / "training_log.json", history)
        console.print(summary_table(history, objectives))
        console.print(f"Written: {output} (model, training.png, training_log.json)", soft_wrap=True)
    return 0


def load_groups(script: ScriptArguments, config: MOPOConfig) -> tuple[Dataset, Dataset | dict[str, Dataset] | None]:
    """Training groups and held-out groups, or sets of them by name, scorers applied (the trainer is told so)."""

    def read(source: str, split: str) -> Dataset:
        rows = data.load_rows(source, split=split, name=script.dataset_config, on_bad_row=config.on_bad_row)
        scorers = load_scorers(config.scorers or [])
        return data.to_groups(
            rows,
            scorers=scorers,
            rating_scale=config.rating_scale,
            adapter=script.adapter,
            preferred=script.preferred,
            on_bad_row=config.on_bad_row,
        )

    groups = read(script.dataset or "", script.dataset_split)
    held_out: Dataset | dict[str, Dataset] | None = None
    if script.eval_dataset:
        sets = {name: read(source, script.eval_split) for name, source in script.eval_sets().items()}
        held_out = sets.get("") or sets
    elif script.eval_fraction:
        groups, held_out = data.split_groups(groups, script.eval_fraction, config.data_seed or config.seed)
    if script.max_train_samples is not None:
        groups = groups.select(range(min(script.max_train_samples, len(groups))))
    config.scorers = None
    return groups, held_out


def print_plan(source: str, groups: Dataset, config: MOPOConfig, console: Console) -> None:
    """Solve the labels before the model is loaded: what the run aims at, or at once why it cannot get there."""
    names = data.objectives(groups)
    if config.primary is None:
        raise ValueError(f"primary is not set; choose the objective to maximise among {', '.join(names)}")
    if config.primary not in names:
        raise ValueError(f"primary {config.primary!r} is not in the data; {it_has(config.primary, names)}")
    order = (config.primary, *(name for name in names if name != config.primary))
    win_rate, group = data.labels(groups, order)
    radius = config.robust_radius()
    if radius == "auto":
        radius = auto_eps(win_rate, group, beta=config.ratchet_beta)
    problem = LabelProblem(source, order, win_rate, group, config.tau, radius)
    with infeasibility_explained(problem, config.threshold_map()):
        found = summary(problem, config.threshold_map())
    console.print(problem.headline, style="bold", soft_wrap=True)
    console.print(objectives_table(found))
    console.print()
    console.print(findings.table(found))


def load_model(script: ScriptArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer.

    Raises:
        ValueError: neither a directory with a model nor a name that can be fetched.
    """
    source = script.model_name_or_path or ""
    if source == "smollm2":
        from mopo_trainer.commands.smollm import smollm2  # downloads and converts: only for those who ask

        source = str(smollm2())
    origin = {"revision": script.model_revision, "trust_remote_code": script.trust_remote_code}
    dtype = script.dtype if script.dtype == "auto" else getattr(torch, script.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=script.attn_implementation, **origin
        )
        return model, AutoTokenizer.from_pretrained(source, **origin)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model_name_or_path={source}: no such directory, or no model in it ({reason})") from error


def lora_config(script: ScriptArguments) -> Any:
    """peft's LoraConfig, or None without an adapter."""
    if script.lora_r == 0:
        return None
    from peft import LoraConfig  # optional dependency

    alpha = 2 * script.lora_r if script.lora_alpha is None else script.lora_alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # peft and those who read its files expect an int
        lora_dropout=script.lora_dropout,
        target_modules=target_modules(script.lora_target_modules) or "all-linear",
    )


# ---------------------------------------------------------------------------------------------------------- reporting


def summary_table(history: Sequence[Mapping[str, Any]], objectives: Sequence[str]) -> Table:
    """Last thresholds, multipliers and held-out win rates of a run."""
    last: dict[str, Any] = {}
    for row in history:
        last.update(row)
    prefixes = [key.removesuffix("loss") for key in last if re.fullmatch(r"eval_(.+_)?loss", key)] or ["eval_"]
    held_out = {
        f"held-out {kind.replace('_', ' ')} {prefix[len('eval_') : -1]}".strip(): f"{prefix}{kind}"
        for prefix in prefixes
        for kind in ("win_rate", "agreement")
    }
    table = new_table("At the end", "objective", "threshold", "multiplier", *held_out)
    for name in objectives:
        keys = [f"{kind}/{name}" for kind in ("threshold", "multiplier", *held_out.values())]
        table.add_row(name, *(f"{last[key]:.3f}" if key in last else "–" for key in keys))
    return table


def _evaluated_at(history: Sequence[Mapping[str, Any]], step: int) -> bool:
    return any(row["step"] == step and any(key.startswith("eval_") for key in row) for row in history)
