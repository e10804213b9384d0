"""How long does the LM head take in the demo's training, in plain torch and in the engine? On the demo's micro-batches:

    python -m bench.studies.demo_head bench/results/demo

Trains SmolLM2-135M for a few steps as the demo does (under thresholds, LoRA, frozen head), keeps what `policy_loss` was
given, and times its forward and backward on that, the backends in turn. Writes head.json to the given directory.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console

from bench import harness
from mopo_kernels.loss import policy_loss
from mopo_trainer.commands import demo
from mopo_trainer.files import write_json
from mopo_trainer.training import trainer

BACKENDS = {"before: plain torch": "reference", "after: the engine": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory for head.json")
    parser.add_argument("--steps", type=int, default=2, help="training steps whose micro-batches are kept")
    options = parser.parse_args()
    batches = micro_batches(options.steps)
    runs = {name: head_of(batches, backend) for name, backend in BACKENDS.items()}
    results = harness.hold({name: lambda run=run: run for name, run in runs.items()})
    found = {
        "micro_batches": len(batches),
        "rows that count": [int((arguments[2] != -100).sum()) for arguments, _ in batches],
        "hidden": list(batches[0][0][0].shape),
        "vocab": len(batches[0][0][1]),
        "threads": torch.get_num_threads(),
        "seconds": {name: [time / len(batches) for time in result.rounds] for name, result in results.items()},
        "peak_bytes": {name: result.peak_bytes for name, result in results.items()},
    }
    print(write_json(options.output / "head.json", found).read_text())


def micro_batches(steps: int) -> list[tuple[tuple, dict]]:
    """Arguments of `policy_loss` in the demo's first steps."""
    given = []

    def keep(*arguments, **options):
        given.append((arguments, options))
        return policy_loss(*arguments, **options)

    settings = replace(demo.Settings(), steps=steps)
    groups, _ = demo._load_groups(settings, seed=0)
    with mock.patch.object(trainer, "policy_loss", keep), tempfile.TemporaryDirectory() as directory:
        model, tokenizer = demo._load_model(tiny=False, seed=0)
        run = demo.Run(Path(directory), Console(), tiny=False, seed=0)
        demo._train(run, model, tokenizer, groups, demo.THRESHOLDS, settings)
    return given


def head_of(batches, backend):
    """Forward and backward of the loss, as far as the hidden states."""
    leaves = [arguments[0].detach().requires_grad_() for arguments, _ in batches]

    def run():
        for leaf, ((_, *arguments), options) in zip(leaves, batches, strict=True):
            policy_loss(leaf, *arguments, **options | {"backend": backend}).loss.backward()
            leaf.grad = None

    return run


if __name__ == "__main__":
    main()
