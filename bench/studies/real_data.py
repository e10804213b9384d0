"""Is what the log-probs imply also what the model writes? After `mopo train CONFIG.yaml`, on the held-out groups:

    python -m bench.studies.real_data examples/qa-feedback.yaml bench/results/qa-feedback [OPTIONS OF mopo train]

- win rates implied by log π − log π_ref, summed over the response (what `evaluate` logs) and per token;
- texts sampled from the model with its adapter on and off, compared by the objectives that are scorers.

Writes evaluation.json to the given directory and prints it.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel

from mopo_trainer.commands.sampling import Sampling, sample_responses
from mopo_trainer.commands.train import load_groups, load_model, parse_arguments
from mopo_trainer.data import objectives, plain_text
from mopo_trainer.data.scorers import load_scorers
from mopo_trainer.data.tokens import tokenize_groups
from mopo_trainer.files import write_json
from mopo_trainer.report.evaluate import bootstrap_interval, label_win_rates, sampled_win_rates
from mopo_trainer.training.reference import response_logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="the YAML file that the run was made with")
    parser.add_argument("output", type=Path, help="directory for evaluation.json")
    parser.add_argument("--samples", type=int, default=2, help="texts per held-out prompt and model; 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options, overrides = parser.parse_known_args()  # what else is given are options of mopo train, as the run had them

    script, config = parse_arguments([options.config, *overrides])
    scorers = load_scorers(config.scorers or [])
    _, held_out = load_groups(script, config)
    base, tokenizer = load_model(script)
    model = PeftModel.from_pretrained(base, config.output_dir).eval()
    names = [config.primary, *(name for name in objectives(held_out) if name != config.primary)]
    found = {
        "groups": len(held_out),
        "implied": implied(model, tokenizer, held_out, names, config),
    }
    if options.samples:
        found["sampled"] = sampled(model, tokenizer, held_out, scorers, config, options)
    write_json(options.output / "evaluation.json", found)
    print(json.dumps(found, indent=1))


def implied(model, tokenizer, held_out, names, config):
    """Win rates that log-ratios imply, the log-ratio summed over tokens and averaged over them."""
    groups = tokenize_groups(
        held_out,
        names,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        as_chat=config.as_chat,
    )
    sequences = groups.sequences()
    score = {
        "accelerator": Accelerator(cpu=config.use_cpu),
        "batch_size": config.per_device_eval_batch_size,
        "pad_token_id": tokenizer.pad_token_id,
        "row_of": groups.group.tolist() if config.share_prompt else None,
    }
    logp = response_logps(model, sequences, **score)
    with model.disable_adapter():
        ref_logp = response_logps(model, sequences, **score)
    tokens = torch.tensor([len(ids) - prompt for ids, prompt in sequences])
    return {
        "summed": label_win_rates(logp, ref_logp, groups.win_rate, groups.group, names),
        "per_token": label_win_rates(logp / tokens, ref_logp / tokens, groups.win_rate, groups.group, names),
        "correlation of log-ratio and length": torch.corrcoef(torch.stack([logp - ref_logp, tokens.double()]))[
            0, 1
        ].item(),
    }


def sampled(model, tokenizer, held_out, scorers, config, options):
    """Win rates of the adapted model's texts against the base model's, per objective that is a scorer."""
    prompts = [shorten(plain_text(prompt), tokenizer, config.max_prompt_length) for prompt in held_out["prompt"]]
    how = Sampling(num_samples=options.samples, max_new_tokens=options.max_new_tokens, temperature=0.7)
    texts = sample_responses(model, tokenizer, prompts, how, description="Sampling: adapted")
    with model.disable_adapter():
        base = sample_responses(model, tokenizer, prompts, how, description="Sampling: base")
    words = [sum(len(text.split()) for row in side for text in row) / sum(map(len, side)) for side in (base, texts)]
    win_rates = sampled_win_rates(prompts, texts, base, scorers)
    return {
        "win rate against base": {name: bootstrap_interval(values) for name, values in win_rates.items()},
        "mean words, base and adapted": words,
    }


def shorten(prompt, tokenizer, max_tokens):
    ids = tokenizer(prompt)["input_ids"]
    return prompt if len(ids) <= max_tokens - 32 else tokenizer.decode(ids[-(max_tokens - 32) :])


if __name__ == "__main__":
    main()
