"""`mopo compare`: does a trained model hold its thresholds? Its texts, scored against those of the model it began as.

Thresholds are met on the labels, by the target; what the policy writes is another matter. Both models answer the same
held-out prompts, every text of one is compared with every text of the other by each scorer, and the win rates stand
beside the thresholds with intervals over prompts.

What to ask next. A trial is a threshold that the labels were asked (a) and the win rate w that was written for it. The
line through two trials, those next to b + m (b is wanted, m the standard error of w), says what to ask:

    a = a₁ + (b + m − w₁) (a₂ − a₁) / (w₂ − w₁)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, set_seed

from mopo_trainer.data import DataError, load_rows, plain_text, to_groups
from mopo_trainer.data.scorers import Scorer, load_scorers
from mopo_trainer.data.texts import Text
from mopo_trainer.data.tokens import Tokenizing
from mopo_trainer.files import atomic_path, write_json
from mopo_trainer.report.evaluate import bootstrap_interval, sampled_win_rates, verdict
from mopo_trainer.report.tables import MARKS, MARKS_EXPLAINED, new_table

NORMAL = 1.96  # half a 95% interval in standard errors

Texts = list[list[str]]  # [prompt][sample]


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn, of both models alike."""

    samples: int = 4  # texts of a model to a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 32  # texts drawn together
    seed: int = 0


class Trial(NamedTuple):
    """What the labels were asked, and the win rate that was written."""

    asked: float
    written: float


def run_compare(
    model: str,
    source: str,
    *,
    base: str | None,
    scorers: Sequence[str],
    thresholds: Mapping[str, float],
    asked: Mapping[str, float],
    before: Sequence[Path],
    how: Drawing,
    split: str = "train",
    max_prompts: int | None = None,
    as_chat: bool = False,
    dtype: str = "float32",
    output: Path,
) -> int:
    """Compare, print the table, write `compare.json` and `texts.jsonl` into `output`.

    Args:
        model: directory or name of a causal LM, or of a peft adapter.
        source: data whose prompts both answer; a prompt counts once.
        base: the model that training began with; an adapter has its own.
        scorers, thresholds: as `mopo train` takes them; what no scorer computes cannot be compared here.
        asked: the thresholds of training where they were others than those that are wanted.
        before: compare.json of earlier trials.

    Raises:
        ValueError: no scorer, a threshold that no scorer computes, a model that is no adapter without `base`, no model
            or no prompts where they are looked for, a file that is no compare.json.
    """
    by_name = load_scorers(scorers)
    if not by_name:
        raise ValueError("no scorer: texts are compared by numbers computed from them; give --scorer, say brevity")
    for name in thresholds:
        if name not in by_name:
            raise ValueError(f"no scorer computes {name}; the scorers are: {', '.join(by_name)}")
    for name in asked:
        if name not in thresholds:
            raise ValueError(f"asked names {name}, which has no threshold; give what is wanted of it too")
    prompts = load_prompts(source, split, max_prompts)
    fingerprint = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    circumstances = {"base": base, "prompts": fingerprint, "drawing": asdict(how), "as_chat": as_chat}
    trials = {name: [x for path in before for x in read_trials(path, name, circumstances)] for name in thresholds}
    console = Console()
    console.print(f"{model} against {base or 'its base'}: {len(prompts)} prompts × {how.samples} texts", soft_wrap=True)
    ours, theirs = draw_both(model, base, prompts, how, as_chat=as_chat, dtype=dtype)
    rows = compare(prompts, ours.texts, theirs.texts, by_name, thresholds)
    for name, bound in thresholds.items():
        row, trial = rows[name], Trial(asked.get(name, bound), rows[name]["mean"])
        margin = (row["high"] - row["low"]) / (2 * NORMAL)
        row |= {"asked": trial.asked, "advice": advice(bound, margin, [*trials[name], trial])}
    console.print(table(rows))
    for name in thresholds:
        console.print(f"{name}: {rows[name]['advice']}", soft_wrap=True)
    words = {"model": mean_words(ours.texts), "base": mean_words(theirs.texts)}
    cut = {"model": ours.cut, "base": theirs.cut}
    console.print(f"Words a text: {words['model']:.1f}, of the base {words['base']:.1f}.")
    if max(cut.values()) > 0:
        share = f"{cut['model']:.0%} of the model's texts and {cut['base']:.0%} of the base's"
        console.print(f"{share} reached max_new_tokens={how.max_new_tokens} and break off there.", style="yellow")
    found = {"model": model, **circumstances, "objectives": rows, "words": words, "cut": cut}
    files = [
        write_json(output / "compare.json", found),
        write_texts(output / "texts.jsonl", prompts, ours.texts, theirs.texts),
    ]
    console.print(f"Written: {', '.join(map(str, files))}", soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------------------------------- prompts


def load_prompts(source: str, split: str, most: int | None) -> list[Text]:
    """Prompts of any data that `mopo train` reads, or of a table with a column `prompt`, each once."""
    rows = load_rows(source, split=split)
    prompts: list[Text] = rows["prompt"] if "prompt" in rows.column_names else to_groups(rows)["prompt"]
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"{source}: prompt {index} is empty; leave the row out")
    once = {json.dumps(prompt): prompt for prompt in prompts}
    return list(once.values())[:most]


def prompt_tokens(prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, as_chat: bool) -> list[list[int]]:
    """What the model sees when it is asked, as in training."""
    tokenizing = Tokenizing.by(tokenizer, max_prompt_length=None, max_length=None, as_chat=as_chat)
    found = []
    for index, prompt in enumerate(prompts):
        reply: Text = "." if isinstance(prompt, str) else [{"role": "assistant", "content": "."}]
        try:
            ((ids, length),) = tokenizing.group(prompt, [reply])
        except DataError as error:
            raise DataError(f"prompt {index}: {error}") from None
        found.append(ids[:length])
    return found


# ------------------------------------------------------------------------------------------------------------- drawing


class Drawn(NamedTuple):
    """Texts of a model, and the share of them that broke off at max_new_tokens."""

    texts: Texts
    cut: float


def draw_both(
    model: str, base: str | None, prompts: Sequence[Text], how: Drawing, *, as_chat: bool, dtype: str
) -> tuple[Drawn, Drawn]:
    """Texts of the model and of its base, which is loaded after it or is the model without its adapter."""
    loaded, tokenizer = load(model, dtype)
    ids = prompt_tokens(prompts, tokenizer, as_chat)
    is_adapter = hasattr(loaded, "disable_adapter")
    if base is None and not is_adapter:
        raise ValueError(f"{model} is no adapter: give --base, the model that training began with")
    ours = draw(loaded, tokenizer, ids, how, "The model")
    other = replace(how, seed=how.seed + 1)  # else texts that are compared would share their draws
    if base is None:
        with loaded.disable_adapter():
            return ours, draw(loaded, tokenizer, ids, other, "Its base")
    del loaded
    loaded, tokenizer = load(base, dtype)
    return ours, draw(loaded, tokenizer, prompt_tokens(prompts, tokenizer, as_chat), other, "Its base")


def load(source: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a directory or name; an adapter on its base."""
    if source == "smollm2":
        from mopo_trainer.commands.smollm import smollm2  # downloads and converts: only for those who ask

        source = str(smollm2())
    kind: Any = AutoModelForCausalLM
    if (Path(source) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM  # optional dependency

        kind = AutoPeftModelForCausalLM
    try:
        model = kind.from_pretrained(source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source}: no such directory, or no model in it ({reason})") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


@torch.no_grad()
def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    how: Drawing,
    description: str,
) -> Drawn:
    """Texts from the distribution that `how` says; the model's own generation settings are its end tokens, no more."""
    ends = end_tokens(model, tokenizer)
    longest, most = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    if most is not None and longest + how.max_new_tokens > most:
        raise ValueError(
            f"a prompt has {longest} tokens: max_new_tokens={how.max_new_tokens} more are beyond the model's {most}; "
            "lower it or leave the prompt out"
        )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    settings = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    model.generation_config = GenerationConfig(
        **settings,
        num_return_sequences=how.samples,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding,
    )
    set_seed(how.seed)
    texts: Texts = []
    cut = 0
    with tqdm(total=len(prompts), desc=description) as bar:
        for some in batches(prompts, max(1, how.batch_size // how.samples)):
            longest = max(map(len, some))
            ids = torch.tensor([[padding] * (longest - len(x)) + list(x) for x in some], device=model.device)
            mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in some], device=model.device)
            new = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
            cut += sum(not set(x) & set(ends) for x in new)
            decoded = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            texts += [decoded[i : i + how.samples] for i in range(0, len(decoded), how.samples)]
            bar.update(len(some))
    return Drawn(texts, cut / (len(prompts) * how.samples))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the tokenizer's EOS and those of the model's generation settings."""
    theirs = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])]
    found = list(dict.fromkeys(x for x in ends if x is not None))
    if not found:
        raise ValueError("neither the tokenizer nor the model's generation_config names an end token; set eos_token")
    return found


def batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[Sequence[Sequence[int]]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


# -------------------------------------------------------------------------------------------------------------- figures


def compare(
    prompts: Sequence[Text], ours: Texts, theirs: Texts, scorers: Mapping[str, Scorer], thresholds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Objective → win rate with its interval, its threshold and whether it is met."""
    rates = sampled_win_rates([plain_text(prompt) for prompt in prompts], ours, theirs, scorers)
    rows = {}
    for name, values in rates.items():
        interval, bound = bootstrap_interval(values), thresholds.get(name)
        rows[name] = interval._asdict() | {"threshold": bound, "verdict": verdict(interval, bound)}
    return rows


def advice(bound: float, margin: float, trials: Sequence[Trial]) -> str:
    """What to ask the labels next, from the trials so far, the last one being that of now.

    Args:
        bound: the win rate that is wanted.
        margin: a standard error of what was written.
    """
    asked, written = trials[-1]
    aim = bound + margin
    if written >= aim:
        return f"held by more than a standard error, {margin:.3f}: nothing to ask again."
    found = "held by less than a standard error" if written >= bound else f"missed by {bound - written:.3f}"
    (a, w), *others = sorted(set(trials), key=lambda trial: abs(trial.written - aim))
    other = next((trial for trial in others if trial.asked != a), None)
    if other is None:
        return (
            f"{found}. Train once more, asking the labels for more than {asked:g}, and give this compare.json as "
            "--before: the line between two trials says what to ask."
        )
    a2, w2 = other
    line = f"the line between {a:g}, written {w:.3f}, and {a2:g}, written {w2:.3f}"
    if (a2 - a) * (w2 - w) <= 0:
        return f"{found}. {line.capitalize()}, does not rise: ask for more, or train longer."
    needed = a + (aim - w) * (a2 - a) / (w2 - w)
    if not 0 < needed < 1:
        return f"{found}. By {line}, no threshold is enough: train longer, or on larger groups."
    return f"{found}. Ask the labels for {needed:.3f}, by {line}."


def read_trials(path: Path, objective: str, circumstances: Mapping[str, Any]) -> list[Trial]:
    """The trial of an earlier compare.json, if it had a threshold on the objective.

    Raises:
        ValueError: not such a file, or its texts were drawn under other circumstances.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        row = found["objectives"].get(objective, {})
        trials = [Trial(float(row["asked"]), float(row["mean"]))] if "asked" in row else []
        differs = [name for name, value in circumstances.items() if found[name] != value]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--before {path}: not a compare.json that mopo compare wrote ({error!r})") from None
    if differs:
        was, now = found[differs[0]], circumstances[differs[0]]
        raise ValueError(f"--before {path}: {differs[0]} was {was} and is {now} now; compare like with like")
    return trials


def mean_words(texts: Texts) -> float:
    lengths = [len(text.split()) for samples in texts for text in samples]
    return sum(lengths) / len(lengths)


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    found = new_table("Win rate against the base", "objective", "win rate", "95% interval", "threshold", "asked")
    for name, row in rows.items():
        bound, was_asked = row["threshold"], row.get("asked")
        found.add_row(
            name,
            f"{row['mean']:.3f} {MARKS[row['verdict']]}",
            f"{row['low']:.3f} – {row['high']:.3f}",
            "–" if bound is None else f"{bound:g}",
            "–" if was_asked is None else f"{was_asked:g}",
        )
    found.caption = MARKS_EXPLAINED
    return found


def write_texts(path: Path, prompts: Sequence[Text], ours: Texts, theirs: Texts) -> Path:
    rows = [{"prompt": x, "model": y, "base": z} for x, y, z in zip(prompts, ours, theirs, strict=True)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
