"""Draw responses from a chat model; run as a module, it makes the demo's data.

    python -m mopo_trainer.commands.sampling                                   # the shipped demo_data/responses.jsonl
    python -m mopo_trainer.commands.sampling --prompts mine.txt --output mine.jsonl --num-samples 8

The responses go to a JSONL file (`prompt`, `responses`) and the settings that made them to the JSON file beside it.
"""

import argparse
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mopo_trainer.commands.smollm import WHEEL, smollm2
from mopo_trainer.files import atomic_path, write_json

DEMO_DATA = Path(__file__).parent / "demo_data"
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: from the smallest set of at most `top_k` tokens whose probability reaches `top_p`."""

    num_samples: int = 4  # of a prompt
    max_new_tokens: int = 80
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64  # sequences generated together (prompts × samples)


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    how: Sampling,
    *,
    description: str | None = None,
) -> list[list[str]]:
    """Samples responses to every prompt, each prompt being the user's turn of a chat.

    A response that reaches `max_new_tokens` is cut back to its last full sentence, so that no text breaks off in the
    middle. The draws depend on the seed alone, not on the random state outside, which they leave untouched.

    Against `model.generate` this loop reads a prompt once for all its samples and drops sequences that have ended from
    the batch: 1.7 times faster on short texts (one core, SmolLM2-135M, 32 sequences of at most 80 tokens).

    Args:
        description: label of the progress bar; None for no bar.

    Returns:
        responses[prompt][sample].
    """
    prompts_per_batch = max(1, how.batch_size // how.num_samples)
    generator = torch.Generator(model.device).manual_seed(how.seed)
    draw = partial(_draw, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p, generator=generator)
    responses: list[list[str]] = []
    was_training = model.training
    model.eval()
    with tqdm(total=len(prompts), desc=description, disable=description is None) as bar:
        for start in range(0, len(prompts), prompts_per_batch):
            batch = prompts[start : start + prompts_per_batch]
            chats = tokenizer.apply_chat_template(
                [[{"role": "user", "content": prompt}] for prompt in batch], add_generation_prompt=True, tokenize=False
            )
            inputs = tokenizer(
                chats, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
            ).to(model.device)
            tokens = _generate(model, inputs, how.num_samples, how.max_new_tokens, tokenizer.eos_token_id, draw)
            finished = [ids[-1] == tokenizer.eos_token_id for ids in tokens]
            texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
            texts = [text.strip() if done else full_sentences(text) for text, done in zip(texts, finished, strict=True)]
            responses += [texts[i : i + how.num_samples] for i in range(0, len(texts), how.num_samples)]
            bar.update(len(batch))
    model.train(was_training)
    return responses


def _generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],  # input_ids, attention_mask [P, L], padded on the left
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int,
    draw: Callable[[Tensor], Tensor],
) -> list[list[int]]:
    """New tokens (with the end token where it came) of P × num_samples sequences; a prompt's samples are neighbours."""
    mask = inputs["attention_mask"]
    position = mask.cumsum(1) - 1
    cache = DynamicCache(config=model.config)
    output = model(
        input_ids=inputs["input_ids"],
        attention_mask=mask,
        position_ids=position.clamp(min=0),
        past_key_values=cache,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(num_samples)
    mask, position, logits = (
        t.repeat_interleave(num_samples, dim=0) for t in (mask, position[:, -1:], output.logits[:, -1])
    )
    tokens: list[list[int]] = [[] for _ in range(len(mask))]
    alive = list(range(len(mask)))
    for step in range(max_new_tokens):
        drawn = draw(logits)
        for sequence, token in zip(alive, drawn.tolist(), strict=True):
            tokens[sequence].append(token)
        (going,) = torch.nonzero(drawn != eos_token_id, as_tuple=True)
        if step == max_new_tokens - 1 or len(going) == 0:
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive = [alive[i] for i in going.tolist()]
            drawn, mask, position = drawn[going], mask[going], position[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        logits = model(
            input_ids=drawn[:, None], attention_mask=mask, position_ids=position, past_key_values=cache
        ).logits[:, -1]
    return tokens


def _draw(
    logits: Tensor,  # [B, V]
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Tensor:  # [B]
    """One token per row; top_k comes first because sorting the whole vocabulary would cost as much as the model."""
    values, candidates = logits.float().topk(min(top_k, logits.shape[-1]))
    probability = (values / temperature).softmax(-1)
    before = probability.cumsum(-1) - probability
    choice = probability.masked_fill(before >= top_p, 0).multinomial(1, generator=generator)
    return candidates.gather(-1, choice).squeeze(-1)


def full_sentences(text: str) -> str:
    """`text` up to its last sentence end, or all of it where no sentence ends."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text.strip()


def write_responses(path: Path, prompts: Sequence[str], responses: Sequence[Sequence[str]], settings: dict) -> None:
    """Writes the JSONL file `path` and the settings beside it (`.settings.json`), each through a temporary name."""
    rows = [{"prompt": prompt, "responses": list(texts)} for prompt, texts in zip(prompts, responses, strict=True)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    write_json(path.with_suffix(".settings.json"), settings)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m mopo_trainer.commands.sampling``."""
    parser = argparse.ArgumentParser(
        prog="python -m mopo_trainer.commands.sampling", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--model", help="a model directory or name (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--prompts", type=Path, default=DEMO_DATA / "prompts.txt", help="one prompt per line")
    parser.add_argument("--output", type=Path, default=DEMO_DATA / "responses.jsonl")
    for option in fields(Sampling):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    args = parser.parse_args(argv)

    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    source = args.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    how = Sampling(**{option.name: getattr(args, option.name) for option in fields(Sampling)})
    responses = sample_responses(model, tokenizer, prompts, how, description="Sampling")
    settings = {
        "model": args.model or f"SmolLM2-135M-Instruct ({WHEEL}, dequantised to float32)",
        **asdict(how),
        "cut_responses": "those that reached max_new_tokens end at their last full sentence",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "tokenizers")},
    }
    write_responses(args.output, prompts, responses, settings)
    print(f"{len(prompts)} prompts × {args.num_samples} responses written to {args.output}")


if __name__ == "__main__":
    main()
