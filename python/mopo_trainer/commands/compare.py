"""`mopo compare`: does a trained model hold its thresholds? Its texts, scored against those of the model it began as.

Thresholds are met on the labels, by the target; what the policy writes is another matter. Both models answer the same
held-out prompts, every text of one is compared with every text of the other by each scorer, and the win rates stand
beside the thresholds with intervals over prompts.

What to ask next. A trial is a threshold that the labels were asked (a) and the win rate w that was written for it. The
line through the two trials around b + s (b is wanted, s the standard error of w), or the two nearest to it, says

    a = a₁ + (b + s − w₁) (a₂ − a₁) / (w₂ − w₁),    if w₁ and w₂ differ by more than chance, 2 √2 s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import find_adapter_config_file

from mopo_trainer.data import DataError, load_rows, plain_text, to_groups
from mopo_trainer.data.errors import OnBadRow, one_line
from mopo_trainer.data.scorers import Scorer, checked, load_scorers
from mopo_trainer.data.texts import Text
from mopo_trainer.data.tokens import Tokenizing
from mopo_trainer.files import atomic_path, write_json
from mopo_trainer.report.evaluate import bootstrap_interval, sampled_win_rates, verdict
from mopo_trainer.report.tables import MARKS, MARKS_EXPLAINED, new_table
from mopo_trainer.training.fit import check_positions, pad_token

OTHER_STREAM = 2**31  # added to the seed of the base: texts that are compared must not share their draws
DIFFER = 2 * math.sqrt(2)  # standard errors between two win rates that differ by more than chance
UNLABELLED: dict[str, Scorer] = {"no label": lambda prompt, response: 0.0}  # prompts count, whatever their labels
FEW_PROMPTS = 20  # below it, bootstrap intervals over prompts are too narrow

Texts = list[list[str]]  # [prompt][sample]


@dataclass(frozen=True)
class Models:
    """Who is compared with whom: directories or names of causal LMs or peft adapters; the type of the weights."""

    model: str
    base: str | None = None  # what training began with; None: the base that the adapter names
    dtype: str = "float32"


@dataclass(frozen=True)
class Questions:
    """Where the prompts come from, and how the models see them: the options of `mopo train`."""

    source: str
    split: str = "train"
    adapter: str | None = None
    on_bad_row: OnBadRow = "error"
    max_prompts: int | None = None
    as_chat: bool = False
    max_prompt_length: int = 512


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn, of both models alike."""

    samples: int = 4  # texts of a model to a prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Wanted:
    """Thresholds, what training asked the labels for where that was something else, and files of earlier trials."""

    thresholds: Mapping[str, float]
    asked: Mapping[str, float]
    before: Sequence[Path]


class Trial(NamedTuple):
    """What the labels were asked, and the win rate that was written."""

    asked: float
    written: float


def run_compare(
    models: Models,
    questions: Questions,
    wanted: Wanted,
    how: Drawing,
    *,
    scorers: Sequence[str],
    batch_size: int,
    output: Path,
) -> int:
    """Compare, print the table, write `texts.jsonl` and `compare.json` into `output`.

    Args:
        scorers: as `mopo train` takes them; what no scorer computes cannot be compared here.
        batch_size: texts drawn together, those of one prompt at least.

    Raises:
        ValueError: no scorer, a threshold that no scorer computes, a whole model without its base, models of
            two vocabularies, fewer than two prompts, a file that is no compare.json or of other circumstances.
    """
    by_name = {name: checked(name, scorer) for name, scorer in load_scorers(scorers).items()}
    _check_names(by_name, wanted)
    model, dtype = models.model, models.dtype
    tokenizer = _load(AutoTokenizer, model)
    began_as = models.base or base_of(model)
    if began_as is None:
        raise ValueError(f"{model} is no adapter: give --base, the model that training began with")
    if tokenizer.get_vocab() != _load(AutoTokenizer, began_as).get_vocab():
        raise ValueError(f"{began_as} has another vocabulary than {model}; give --base, what training began with")
    prompts = read_prompts(questions)
    ids, prompts = prompt_tokens(prompts, tokenizer, questions)
    for score in by_name.values():
        score(plain_text(prompts[0]), "A text.")
    circumstances = {
        "base": str(Path(began_as).resolve()) if Path(began_as).exists() else began_as,
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "scorers": sorted(scorers),
        "drawing": asdict(how) | {"dtype": dtype},
    }
    if (output / "compare.json").resolve() in [path.resolve() for path in wanted.before]:
        raise ValueError(f"--before {output / 'compare.json'} would be overwritten; give another --output")
    trials: dict[str, list[Trial]] = {name: [] for name in wanted.thresholds}
    for path in wanted.before:
        for name, trial in read_trials(path, circumstances, list(wanted.thresholds)).items():
            trials[name].append(trial)
    output.mkdir(parents=True, exist_ok=True)

    say = Console(markup=False, soft_wrap=True)
    say.print(f"{model} against {began_as}: {len(prompts)} prompts × {how.samples} texts")
    if models.base is None:
        say.print("(the base that the adapter names; where training began otherwise, give --base)", style="dim")
    theirs, ours = (
        draw(load(source, dtype), tokenizer, ids, how, seed, batch_size, description)
        for source, seed, description in (
            (began_as, how.seed + OTHER_STREAM, "The base"),
            (model, how.seed, "The model"),
        )
    )
    files = [write_texts(output / "texts.jsonl", prompts, ours.texts, theirs.texts)]

    rows = compare(prompts, ours.texts, theirs.texts, by_name, wanted.thresholds)
    for name, bound in wanted.thresholds.items():
        trial = Trial(wanted.asked.get(name, bound), rows[name]["mean"])
        rows[name]["asked"] = trial.asked
        rows[name]["advice"] = advice(bound, rows[name]["standard_error"], [*trials[name], trial])
    sides = {"model": ours.figures(), "base": theirs.figures()}
    Console().print(table(rows))
    for name in wanted.thresholds:
        say.print(f"{name}: {rows[name]['advice']}")
    _say_of_texts(say, sides, how)
    if len(prompts) < FEW_PROMPTS:
        say.print(f"{len(prompts)} prompts are few: their intervals are too narrow; take {FEW_PROMPTS}", style="yellow")
    found = {"model": model, **circumstances, "objectives": rows, "texts": sides}
    files.append(write_json(output / "compare.json", found))
    say.print(f"Written: {', '.join(map(str, files))}")
    return 0


def _check_names(scorers: Mapping[str, Scorer], wanted: Wanted) -> None:
    if not scorers:
        raise ValueError("no scorer: texts are compared by numbers computed from them; give --scorer, say brevity")
    for name in wanted.thresholds:
        if name not in scorers:
            raise ValueError(f"no scorer computes {name}; the scorers are: {', '.join(scorers)}")
    for name in wanted.asked:
        if name not in wanted.thresholds:
            raise ValueError(f"--asked names {name}, which has no threshold; give what is wanted of it too")
    if wanted.before and not wanted.thresholds:
        raise ValueError("--before without a threshold says nothing; give --threshold")


def _say_of_texts(say: Console, sides: Mapping[str, Mapping[str, float]], how: Drawing) -> None:
    ours, theirs = sides["model"], sides["base"]
    say.print(f"Words a text: {ours['words']:.1f}, of the base {theirs['words']:.1f}.")
    for what, hint in (
        ("cut", f"reached max_new_tokens={how.max_new_tokens} and break off there; a larger one lets them end"),
        ("empty", "are empty: to write nothing is brief, and no good text"),
    ):
        if max(ours[what], theirs[what]) > 0:
            share = f"{ours[what]:.0%} of the model's texts, {theirs[what]:.0%} of the base's"
            say.print(f"{share} {hint}.", style="yellow")


# ------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(questions: Questions) -> list[Text]:
    """The prompts of labelled rows as training reads them, or of a table that has nothing but a column `prompt`."""
    rows = load_rows(questions.source, split=questions.split, on_bad_row=questions.on_bad_row)
    if set(rows.column_names) <= {"prompt", "system"}:
        replies: dict[str, Text] = {"chosen": ".", "rejected": ","}  # they make a prompt a row
        if any(isinstance(row["prompt"], list) for row in rows):
            replies = {name: [{"role": "assistant", "content": text}] for name, text in replies.items()}
        rows = [row | replies for row in rows]
    try:
        groups = to_groups(rows, scorers=UNLABELLED, adapter=questions.adapter, on_bad_row=questions.on_bad_row)
    except DataError as error:
        where = "" if questions.source in str(error) else f"{questions.source}: "
        raise DataError(f"{where}{error}") from None
    return groups["prompt"]


def prompt_tokens(
    prompts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, questions: Questions
) -> tuple[list[list[int]], list[Text]]:
    """What a model sees when it is asked, as in training, each once; and the prompts that these are.

    Raises:
        DataError: a prompt that the tokenizer or its chat template refuses, fewer than two prompts.
    """
    tokenizing = Tokenizing.by(
        tokenizer, max_prompt_length=questions.max_prompt_length, max_length=None, as_chat=questions.as_chat
    )
    found: dict[tuple[int, ...], Text] = {}
    for prompt in prompts:
        reply: Text = " ." if isinstance(prompt, str) else [{"role": "assistant", "content": "."}]
        try:
            ((ids, length),) = tokenizing.group(prompt, [reply])
        except DataError as error:
            raise DataError(f"{questions.source}: prompt {plain_text(prompt)[:40]!r}: {error}") from None
        found.setdefault(tuple(ids[:length]), prompt)
    tokenizing.say()
    chosen = list(found.items())[: questions.max_prompts]
    if len(chosen) < 2:
        number = f"{len(chosen)} prompt, which gives no interval"
        raise DataError(f"{questions.source}: {number}; give at least 2, better {FEW_PROMPTS}")
    return [list(ids) for ids, _ in chosen], [prompt for _, prompt in chosen]


# -------------------------------------------------------------------------------------------------------------- models


def base_of(source: str) -> str | None:
    """The base that an adapter names; None for a whole model."""
    if find_adapter_config_file(_located(source)) is None:
        return None
    from peft import PeftConfig  # optional dependency

    named = PeftConfig.from_pretrained(source).base_model_name_or_path
    if not named:
        raise ValueError(f"{source}: its adapter_config.json names no base")
    return named


def _located(source: str) -> str:
    if source != "smollm2":
        return source
    from mopo_trainer.commands.smollm import smollm2  # downloads and converts: only for those who ask

    return str(smollm2())


def load(source: str, dtype: str) -> Any:
    """A model; an adapter on the base that it names."""
    named = base_of(source)
    model = _load(AutoModelForCausalLM, named or source, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if named:
        from peft import PeftModel  # optional dependency

        try:
            model = PeftModel.from_pretrained(model, source)
        except Exception as error:  # adapters of any kind
            problem = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(f"{source}: no weights there, or none that fit its base {named} ({problem})") from error
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model.eval()


def _load(kind: Any, source: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(_located(source), **options)
    except Exception as error:  # what a directory may hold raises anything
        what = "model" if kind is AutoModelForCausalLM else "tokenizer"
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{source}: no such directory or name, or no {what} that can be read ({problem})") from error


# ------------------------------------------------------------------------------------------------------------- drawing


class Drawn(NamedTuple):
    """Texts of a model, and the share of them that broke off at max_new_tokens."""

    texts: Texts
    cut: float

    def figures(self) -> dict[str, float]:
        words = [len(text.split()) for samples in self.texts for text in samples]
        return {"words": float(np.mean(words)), "empty": float(np.mean([not x for x in words])), "cut": self.cut}


@torch.no_grad()
def draw(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    how: Drawing,
    seed: int,
    batch_size: int,
    description: str,
) -> Drawn:
    """Texts from the distribution that `how` says; the model's own generation settings give their end tokens alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends, padding = end_tokens(inner, tokenizer), pad_token(inner, tokenizer)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    longest = max(map(len, prompts)) + virtual + how.max_new_tokens
    try:
        check_positions(inner, longest)
    except ValueError as error:
        raise ValueError(f"--max-new-tokens {how.max_new_tokens} behind the longest prompt: {error}") from None
    settings = GenerationConfig(
        do_sample=True,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        num_return_sequences=how.samples,
        max_new_tokens=how.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding,
    )
    model.generation_config = inner.generation_config = settings  # `generate` fills in what is not set from there
    set_seed(seed)
    texts: Texts = []
    cut = 0
    with tqdm(total=len(prompts), desc=description) as bar:
        for start in range(0, len(prompts), max(1, batch_size // how.samples)):
            some = prompts[start : start + max(1, batch_size // how.samples)]
            longest = max(map(len, some))
            ids = torch.tensor([[padding] * (longest - len(x)) + list(x) for x in some], device=inner.device)
            mask = torch.tensor([[0] * (longest - len(x)) + [1] * len(x) for x in some], device=inner.device)
            new = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
            if len(new) != len(some) * how.samples:
                raise ValueError(f"{type(model).__name__} drew {len(new)} texts, not {len(some)} × {how.samples}")
            cut += sum(not set(x) & set(ends) for x in new)
            decoded = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            texts += [decoded[i : i + how.samples] for i in range(0, len(decoded), how.samples)]
            bar.update(len(some))
    return Drawn(texts, cut / (len(prompts) * how.samples))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a reply: EOS, the ends of the model's generation settings, what the chat template writes behind it."""
    theirs = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "."}], [[{"role": "assistant", "content": "."}]]
        ((ids, _),) = Tokenizing.by(tokenizer, max_prompt_length=None, max_length=None).group(*chat)
        ends += [x for x in ids[-1:] if x in tokenizer.all_special_ids]
    found = list(dict.fromkeys(x for x in ends if x is not None))
    if not found:
        raise ValueError("neither the tokenizer nor the model's generation_config names an end token; set eos_token")
    return found


# -------------------------------------------------------------------------------------------------------------- figures


def compare(
    prompts: Sequence[Text], ours: Texts, theirs: Texts, scorers: Mapping[str, Scorer], thresholds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Objective → win rate, its interval and standard error over prompts, its threshold and whether it is met."""
    rates = sampled_win_rates([plain_text(prompt) for prompt in prompts], ours, theirs, scorers)
    rows = {}
    for name, values in rates.items():
        interval, bound = bootstrap_interval(values), thresholds.get(name)
        rows[name] = interval._asdict() | {
            "standard_error": float(values.std(ddof=1) / math.sqrt(len(values))),
            "threshold": bound,
            "verdict": verdict(interval, bound),
        }
    return rows


def advice(bound: float, error: float, trials: Sequence[Trial]) -> str:
    """What to ask the labels next, from the trials so far, the last one being that of now.

    Args:
        bound: the win rate that is wanted.
        error: a standard error of what was written.
    """
    asked, written = trials[-1]
    aim, pair = min(1.0, bound + error), around(min(1.0, bound + error), trials)
    if written > bound + error or written == 1:
        found = f"held by more than a standard error ({error:.3f})"
        if pair is None or not is_line(pair, error) or not pair[0].written > aim > pair[1].written:
            return f"{found}; nothing to ask again."
        return f"{found}; {on_the_line(pair, aim):.3f} would have been enough, by {line(pair)}."
    found = f"held by no more than a standard error ({error:.3f})"
    if written < bound:
        found = f"missed by {bound - written:.3f}"
    if pair is None:
        if asked >= 1:
            return f"{found}, and more than 1 cannot be asked: train longer, or on larger groups."
        return (
            f"{found}. Train once more, asking the labels for more than {asked:g}, and give this compare.json as "
            "--before: the line between two trials says what to ask."
        )
    if not is_line(pair, error):
        (a, w), (a2, w2) = pair
        what = "as chance may" if abs(w2 - w) <= DIFFER * error else "against what was asked: something else differs"
        return f"{found}. Asked {a:g} and {a2:g}, it writes {w:.3f} and {w2:.3f}, {what}; try a threshold farther away."
    needed = on_the_line(pair, aim)
    if not 0 <= needed <= 1 - 1e-6:
        return f"{found}. By {line(pair)} no threshold is enough: train longer, or on larger groups."
    beyond = "" if min(w for _, w in pair) <= aim <= max(w for _, w in pair) else ", beyond both"
    return f"{found}. Ask the labels for {needed:.3f}, by {line(pair)}{beyond}."


def is_line(pair: tuple[Trial, Trial], error: float) -> bool:
    """Whether what was written rises with what was asked, by more than chance."""
    (a, w), (a2, w2) = pair
    return abs(w2 - w) > DIFFER * error and (a2 - a) * (w2 - w) > 0


def on_the_line(pair: tuple[Trial, Trial], aim: float) -> float:
    (a, w), (a2, w2) = pair
    return a + (aim - w) * (a2 - a) / (w2 - w)


def line(pair: tuple[Trial, Trial]) -> str:
    (a, w), (a2, w2) = sorted(pair)
    return f"the line between {a:g} (written {w:.3f}) and {a2:g} ({w2:.3f})"


def around(aim: float, trials: Sequence[Trial]) -> tuple[Trial, Trial] | None:
    """The nearest trials written on both sides of the aim, or the two nearest; None if all asked the same."""
    nearest = sorted(set(trials), key=lambda trial: abs(trial.written - aim))
    first = nearest[0]
    others = [trial for trial in nearest if trial.asked != first.asked]
    if not others:
        return None
    return first, next((x for x in others if (x.written - aim) * (first.written - aim) <= 0), others[0])


def read_trials(path: Path, circumstances: Mapping[str, Any], names: Sequence[str]) -> dict[str, Trial]:
    """The trials of an earlier compare.json, by objective.

    Raises:
        ValueError: not such a file, none of these objectives had a threshold there, or base, prompts, scorers or
            drawing were others.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: row for name, row in found["objectives"].items() if name in names and "asked" in row}
        trials = {name: Trial(float(row["asked"]), float(row["mean"])) for name, row in rows.items()}
        differ = [name for name, value in circumstances.items() if found[name] != value]
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"--before {path}: not a compare.json of mopo compare ({one_line(error)})") from None
    if differ:
        raise ValueError(f"--before {path}: not the same {' and '.join(differ)} as now; compare like with like")
    if not trials:
        raise ValueError(f"--before {path}: no threshold on {' or '.join(names)}; leave it out")
    if not all(0 <= x <= 1 for trial in trials.values() for x in trial):
        raise ValueError(f"--before {path}: win rates outside [0, 1]; was it edited?")
    return trials


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    found = new_table("Win rate against the base", "objective", "win rate", "95% interval", "threshold", "asked")
    for name, row in rows.items():
        bound, asked = row["threshold"], row.get("asked")
        found.add_row(
            escape(name),
            f"{row['mean']:.3f} {MARKS[row['verdict']]}",
            f"{row['low']:.3f} – {row['high']:.3f}",
            "–" if bound is None else f"{bound:g}",
            "–" if asked is None else f"{asked:g}",
        )
    if any(row["threshold"] is not None for row in rows.values()):
        found.caption = MARKS_EXPLAINED
    return found


def write_texts(path: Path, prompts: Sequence[Text], ours: Texts, theirs: Texts) -> Path:
    rows = [{"prompt": x, "model": y, "base": z} for x, y, z in zip(prompts, ours, theirs, strict=True)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
