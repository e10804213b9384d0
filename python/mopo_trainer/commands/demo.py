"""`mopo demo`: the whole way on a small real model, from labels to texts, with and without thresholds.

SmolLM2-135M-Instruct learns to write friendlier messages. The data (demo_data/: prompts written for this demo, four
responses of the model itself to each) carry three objectives that conflict, computed from the text: friendliness,
brevity and plain language. Friendliness alone is bought with length; under thresholds it must not be.

1. the labels: which thresholds are attainable, what they cost (`mopo_trainer.commands.solve`);
2. two LoRA adapters: the primary alone, and MOPO under thresholds (`MOPOTrainer`), for which the labels are asked what
   groups of their size need if fresh texts shall hold them;
3. held-out prompts: texts of the base model and of both, and win rates against the base model with intervals.

How many steps, prompts and texts fit the minutes is decided once, from a few steps and tokens timed on the machine. The
decision stands in progress.json beside the texts that are there already: a demo that was killed goes on from it.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from numpy.typing import NDArray
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from mopo_kernels import mopo_weights
from mopo_trainer.commands.demo_budget import MODELS, Journal, Rates, Sizes, describe, drawing_rates, fit
from mopo_trainer.commands.pareto import front
from mopo_trainer.commands.sampling import DEMO_DATA, Sampling, sample_responses
from mopo_trainer.commands.smollm import smollm2
from mopo_trainer.commands.solve import LabelProblem, analyse, print_report
from mopo_trainer.data import labels, load_rows, split_groups, to_groups
from mopo_trainer.data.scorers import BUILT_IN
from mopo_trainer.files import atomic_path, write_json
from mopo_trainer.report import plots
from mopo_trainer.report.evaluate import bootstrap_interval, sampled_win_rates, verdict
from mopo_trainer.report.evidence import within_group
from mopo_trainer.report.tables import MARKS, MARKS_EXPLAINED, new_table
from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer

PRIMARY = "friendliness"
THRESHOLDS = {"brevity": 0.6, "plain_language": 0.55}
OBJECTIVES = (PRIMARY, *THRESHOLDS)
SCORERS = {name: BUILT_IN[name] for name in OBJECTIVES}
BASE, ALONE, MOPO = "base", "primary alone", "MOPO"
# Texts drawn together. A larger batch reads the weights once for more texts: 48 prompts × 4 on one core took 202 s of
# CPU time in batches of 32, 146 in 64, 109 in 192. What is faster on a machine is tried on a few tokens.
BATCH_SIZES = (32, 192)
TIMED_TOKENS = 3


@dataclass(frozen=True)
class Settings:
    """What decides how long the demo takes and what it can show.

    The held-out texts are drawn as the training responses were: win rates in the labels are against those, and at a
    lower temperature the base model writes shorter texts, another opponent than the thresholds speak of.
    """

    steps: int = 28
    groups_per_micro_batch: int = 4
    micro_batches: int = 2
    learning_rate: float = 1e-3
    lora_rank: int = 16
    tau: float = 0.08
    # A bound on the labels has to hold on other prompts: with 500 responses this radius, χ²(1; 0.90) / (2 · 500), makes
    # the robust bound a lower 95% confidence bound of the win rate (empirical likelihood, Duchi et al. 2021).
    eps: float = 0.0027
    # Of four responses this keeps 1.0 (primary alone) or 1.6 (under thresholds); 1.5% of the weight is dropped.
    min_weight: float = 0.05
    test_fraction: float = 0.25
    num_samples: int = 4  # per held-out prompt and model
    batch_size: int = 64  # texts drawn together
    max_new_tokens: int = 80
    temperature: float = 1.0
    top_p: float = 0.95
    num_groups: int | None = None  # all
    sweep_points: int = 21
    front_points: int = 15


TINY = Settings(
    steps=2,
    groups_per_micro_batch=1,
    lora_rank=2,
    num_samples=2,
    max_new_tokens=8,
    num_groups=12,
    sweep_points=3,
    front_points=4,
)


def run_demo(
    *,
    minutes: float = 10,
    steps: int | None = None,
    tiny: bool = False,
    seed: int = 0,
    output: Path = Path("mopo-demo"),
) -> int:
    """Runs the demo and writes results.json, texts.jsonl, front.png and training.png to `output`.

    Args:
        minutes: how long it may take; steps, prompts and texts are cut to that.
        steps: training steps of each run; as many as fit if None.
        tiny: a random tiny model made in this process instead of SmolLM2: seconds, no download, no meaning.
    """
    start = time.perf_counter()
    transformers_logging.disable_progress_bar()  # its bars of loaded weights, not the Trainer's
    console = Console()
    settings = TINY if tiny else Settings()
    settings = settings if steps is None else replace(settings, steps=steps)
    train_groups, test_groups = _load_groups(settings, seed)
    options = {"minutes": minutes, "steps": steps, "tiny": tiny, "seed": seed, "version": version("mopo-kernels")}
    journal = Journal.of(output / "progress.json", options)
    run = Run(output, console, tiny, seed)

    console.rule("1. What the labels allow")
    problem = LabelProblem("demo", OBJECTIVES, *labels(train_groups, OBJECTIVES), settings.tau, settings.eps)
    console.print(problem.headline, style="bold", soft_wrap=True)
    analysis = analyse(problem, THRESHOLDS, points=settings.sweep_points)
    print_report(analysis, console)
    asked = what_labels_need(THRESHOLDS, train_groups)
    console.print(f"Training asks these labels for {_list(asked)}: so much is {_list(THRESHOLDS)} against new texts.")

    console.rule("2. Training and sampling")
    whole = Sizes(settings.steps, len(test_groups), settings.num_samples)
    if journal.decision is None:
        rates = _measure(run, problem, train_groups, asked, test_groups["prompt"], settings, start)
        sizes = fit(rates, minutes, whole, keep_steps=steps is not None)
        journal.decide(rates, sizes)
    else:
        rates, sizes = journal.decision
        console.print(f"Going on with what {journal.path} holds.", soft_wrap=True)
    console.print(describe(rates, sizes, minutes, whole), soft_wrap=True)
    settings = replace(settings, steps=sizes.steps, num_samples=sizes.num_samples, batch_size=rates.batch_size)
    prompts = spread(test_groups["prompt"], sizes.prompts)
    for name, thresholds in {BASE: None, ALONE: {}, MOPO: asked}.items():
        if name not in journal.done:
            journal.finish(name, _stage(run, name, thresholds, train_groups, prompts, settings))

    console.rule("3. Held-out prompts")
    texts, logs, seconds = (
        {name: done[key] for name, done in journal.done.items()} for key in ("texts", "log", "seconds")
    )
    compared = compare(prompts, texts)
    console.print(_win_rate_table(compared))
    console.print(_difference_table(compared))
    _print_texts(console, prompts, texts)
    seconds["total"] = time.perf_counter() - start
    results = {
        "settings": asdict(settings) | {"tiny": tiny, "seed": seed, "thresholds": THRESHOLDS, "asked": asked},
        "budget": {
            "minutes": minutes,
            "rates": asdict(rates),
            "sizes": asdict(sizes),
            "predicted": sizes.seconds(rates),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("mopo-kernels", "torch", "transformers", "peft")},
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "cpu_seconds": time.process_time(),
        "held_out": compared,
        "labels": analysis,
        "log_history": {name: logs[name] for name in (ALONE, MOPO)},
    }
    subtitle = f"{len(prompts)} held-out prompts × {settings.num_samples} samples; line: what the training labels allow"
    files = [
        write_json(output / "results.json", results),
        _write_texts(output / "texts.jsonl", prompts, texts),
        plots.save_figure(_front_figure(problem, compared, settings.front_points, subtitle), output / "front.png"),
        plots.save_figure(plots.plot_training(logs[MOPO], objectives=OBJECTIVES), output / "training.png"),
    ]
    journal.path.unlink()
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)
    console.print(f"{seconds['total']:.0f} s in all.")
    return 0


def what_labels_need(thresholds: Mapping[str, float], groups: Dataset) -> dict[str, float]:
    """What the labels are asked so that texts the model has yet to write hold `thresholds`: `mopo solve` says why."""
    size = len(groups[0]["responses"])
    return {name: round(within_group(bound, size), 3) for name, bound in thresholds.items()}


@dataclass(frozen=True)
class Run:
    """Where, and with which model and seed."""

    output: Path
    console: Console
    tiny: bool
    seed: int


# ----------------------------------------------------------------------------------------------------------------- time


def _measure(
    run: Run,
    problem: LabelProblem,
    groups: Dataset,
    asked: Mapping[str, float],
    prompts: Sequence[str],
    settings: Settings,
    start: float,
) -> Rates:
    """Times a few tokens of sampling in batches of each size, and three steps of a training under thresholds."""
    run.console.print("Timing a few tokens and three training steps on this machine", style="dim")
    labels_seconds = time.perf_counter() - start
    with Stopwatch() as loading:
        model, tokenizer = _load_model(run.tiny, run.seed)
    ids = tokenizer([text for responses in groups["responses"] for text in responses])["input_ids"]
    tokens = float(np.mean([min(len(x) + 1, settings.max_new_tokens) for x in ids]))

    def draw(batch_size: int) -> tuple[int, float]:
        """How many texts a batch holds, and its seconds: those of its prompts, and of every token after the first."""
        some, ends = prompts[: max(1, batch_size // settings.num_samples)], [time.perf_counter()]
        brief = replace(settings, batch_size=batch_size, max_new_tokens=1 + TIMED_TOKENS)
        hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
        _sample(None, model, tokenizer, some, brief, run.seed)
        hook.remove()
        token = (ends[-1] - ends[1]) / TIMED_TOKENS
        return len(some) * settings.num_samples, ends[1] - ends[0] + (tokens - 1) * token

    batch, text, batch_size = drawing_rates(*map(draw, BATCH_SIZES))
    with Stopwatch() as training:
        timed = _train(run, model, tokenizer, groups, asked, replace(settings, steps=3))[2]
    enter = [_characters(problem, groups, thresholds, settings) for thresholds in ({}, asked)]
    return Rates(
        spent=time.perf_counter() - start,
        # the figure at the end solves about as often as the tables at the beginning
        fixed=MODELS * loading.seconds + 2 * (training.seconds - sum(timed)) + labels_seconds,
        steps=median(timed) * sum(enter) / enter[1],  # batches differ by half in length, and other work holds one up
        batch=batch,
        text=text,
        batch_size=batch_size,
    )


def _characters(problem: LabelProblem, groups: Dataset, thresholds: Mapping[str, float], settings: Settings) -> int:
    """Length of the prompts and of the responses whose weight lets them enter the model under `thresholds`."""
    multipliers = problem.solve(thresholds).multipliers
    weights = mopo_weights(problem.win_rate, problem.group, multipliers, tau=settings.tau)
    texts = [text for responses in groups["responses"] for text in responses]
    entering = sum(len(texts[i]) for i in (weights > settings.min_weight).nonzero()[:, 0].tolist())
    return entering + sum(map(len, groups["prompt"]))


class Stopwatch:
    """Seconds that a `with` block takes."""

    seconds: float

    def __enter__(self) -> Stopwatch:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """`count` of the prompts, evenly over the list."""
    return [prompts[i * len(prompts) // count] for i in range(count)]


# ------------------------------------------------------------------------------------------------ data and training


def _load_groups(settings: Settings, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held-out) groups, labelled by the scorers."""
    rows = load_rows(str(DEMO_DATA / "responses.jsonl"))
    if settings.num_groups is not None:
        rows = rows.select(range(settings.num_groups))
    return split_groups(to_groups(rows, scorers=SCORERS), settings.test_fraction, seed)


def _load_model(tiny: bool, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if tiny:
        return _tiny_model(seed)
    source = smollm2()
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)


def _tiny_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random two-layer model over bytes."""
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def _stage(
    run: Run,
    name: str,
    thresholds: Mapping[str, float] | None,
    groups: Dataset,
    prompts: Sequence[str],
    settings: Settings,
) -> dict[str, Any]:
    """Texts, training log and seconds of one model; the base model has no thresholds and no training."""
    with Stopwatch() as stage:
        model, tokenizer = _load_model(run.tiny, run.seed)
        log: list[dict[str, Any]] = []
        if thresholds is not None:
            run.console.print(f"Training: {name} {_describe(thresholds)}", style="bold", soft_wrap=True)
            model, log, _ = _train(run, model, tokenizer, groups, thresholds, settings)
        seed = run.seed + (name == BASE)  # else a text and the base's it is compared with would share their draws
        texts = _sample(f"Sampling: {name}", model, tokenizer, prompts, settings, seed)
    return {"texts": texts, "log": log, "seconds": stage.seconds}


def _train(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    groups: Dataset,
    thresholds: Mapping[str, float],
    settings: Settings,
) -> tuple[PreTrainedModel, list[dict[str, Any]], list[float]]:
    """The model with a trained LoRA adapter merged into it, the training log, and the seconds of every step."""
    set_seed(run.seed)
    adapter = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")
    args = MOPOConfig(
        output_dir=str(run.output / "trainer"),
        primary=PRIMARY,
        thresholds=[f"{name}={value}" for name, value in thresholds.items()],
        tau=settings.tau,
        eps=str(settings.eps),
        min_weight=settings.min_weight,
        as_chat=True,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.groups_per_micro_batch,
        gradient_accumulation_steps=settings.micro_batches,
        learning_rate=settings.learning_rate,
        seed=run.seed,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = MOPOTrainer(model, args, train_dataset=groups, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(ProgressCallback)
    bar = Bar()
    trainer.add_callback(bar)
    trainer.train()
    return trainer.model.merge_and_unload(), trainer.state.log_history, bar.seconds


def _sample(
    description: str | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: Settings,
    seed: int,
) -> list[list[str]]:
    how = Sampling(
        num_samples=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        batch_size=settings.batch_size,
    )
    return sample_responses(model, tokenizer, prompts, how, description=description)


class Bar(ProgressCallback):
    """The Trainer's progress bar, with the last loss and speed behind it instead of a line per log; times the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        super().on_step_end(*args, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.1f}", "tokens/s": f"{logs['tokens_per_second']:.0f}"}
            self.training_bar.set_postfix(shown, refresh=False)


# ------------------------------------------------------------------------------------------------------- evaluation


def compare(prompts: Sequence[str], texts: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    """Win rates of every model's texts against the base model's, on the same prompts.

    The base model's own row compares each of its texts with its others; it is ½ by symmetry and has no interval.

    Returns:
        models: per model `words` (mean per text), and per objective its win rate, interval and `verdict`;
        difference: MOPO − primary alone per objective, paired by prompt, with its interval.
    """
    rates = {name: sampled_win_rates(prompts, texts[name], texts[BASE], SCORERS) for name in (ALONE, MOPO)}
    found: dict[str, Any] = {BASE: {"words": _mean_words(texts[BASE])}}
    for name, by_objective in rates.items():
        found[name] = {"words": _mean_words(texts[name])}
        for objective, values in by_objective.items():
            interval = bootstrap_interval(values)
            found[name][objective] = interval._asdict() | {"verdict": verdict(interval, THRESHOLDS.get(objective))}
    difference = {
        objective: bootstrap_interval(rates[MOPO][objective] - rates[ALONE][objective])._asdict()
        for objective in OBJECTIVES
    }
    return {"models": found, "difference": difference}


def _mean_words(texts: Sequence[Sequence[str]]) -> float:
    return float(np.mean([len(text.split()) for samples in texts for text in samples]))


# ----------------------------------------------------------------------------------------------------------- output


def _describe(thresholds: Mapping[str, float]) -> str:
    return f"under {_list(thresholds)}" if thresholds else ""


def _list(thresholds: Mapping[str, float]) -> str:
    return " and ".join(f"{name} ≥ {bound:g}" for name, bound in thresholds.items())


def _win_rate_table(results: Mapping[str, Any]) -> Table:
    headings = [f"{name} ≥ {THRESHOLDS[name]:g}" if name in THRESHOLDS else f"{name} (primary)" for name in OBJECTIVES]
    table = new_table("Win rate against the base model, 95% interval over held-out prompts", "", *headings, "words")
    for model, row in results["models"].items():
        cells = [f"{_interval(row[k])} {MARKS[row[k]['verdict']]}" if k in row else "0.50" for k in OBJECTIVES]
        table.add_row(model, *cells, f"{row['words']:.0f}")
    table.caption = MARKS_EXPLAINED
    return table


def _difference_table(results: Mapping[str, Any]) -> Table:
    table = new_table("What the thresholds changed, paired by prompt", "", *OBJECTIVES)
    table.add_row(f"{MOPO} − {ALONE}", *(_interval(results["difference"][name], "+.2f") for name in OBJECTIVES))
    return table


def _interval(values: Mapping[str, Any], spec: str = ".2f") -> str:
    bounds = f"{values['low']:{spec}}, {values['high']:{spec}}".replace("0.", ".")  # three columns in 80 characters
    return f"{values['mean']:{spec}} \\[{bounds}]"


def _print_texts(console: Console, prompts: Sequence[str], texts: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """The first sample of up to three prompts, spread over the held-out ones: chosen by position, not by content."""
    for i in sorted({0, len(prompts) // 2, len(prompts) - 1}):
        table = Table(title=prompts[i], title_justify="left", show_header=False, show_lines=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name in texts:
            table.add_row(name, Text(texts[name][i][0]))
        console.print(table)


def _write_texts(path: Path, prompts: Sequence[str], texts: Mapping[str, Sequence[Sequence[str]]]) -> Path:
    with atomic_path(path) as temporary:
        rows = ({"prompt": prompt} | {name: texts[name][i] for name in texts} for i, prompt in enumerate(prompts))
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _front_figure(problem: LabelProblem, results: Mapping[str, Any], points: int, subtitle: str) -> Figure:
    """The front of the training labels, and where the models came out on held-out prompts."""
    marked: dict[str, tuple[NDArray[np.float64], NDArray[np.float64] | None]] = {
        BASE: (np.full(len(OBJECTIVES), 0.5), None)
    }
    for name in (ALONE, MOPO):
        rows = [results["models"][name][objective] for objective in OBJECTIVES]
        marked[name] = (
            np.array([row["mean"] for row in rows]),
            np.array([(row["high"] - row["low"]) / 2 for row in rows]),
        )
    found = [point["win_rates"] for point in front(problem, points=points)["points"]]
    return plots.plot_front(found, OBJECTIVES, marked=marked, thresholds=THRESHOLDS, subtitle=subtitle)
