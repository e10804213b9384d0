"""A thin trainer and the `mopo` command on top of mopo_kernels.

`MOPOTrainer` and `MOPOConfig` load on first use, so that `mopo --help` does not wait for transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopo_trainer.training.config import MOPOConfig
    from mopo_trainer.training.trainer import MOPOTrainer

__all__ = ["MOPOConfig", "MOPOTrainer"]


def __getattr__(name: str) -> Any:
    if name == "MOPOConfig":
        from mopo_trainer.training.config import MOPOConfig

        return MOPOConfig
    if name == "MOPOTrainer":
        from mopo_trainer.training.trainer import MOPOTrainer

        return MOPOTrainer
    raise AttributeError(f"module 'mopo_trainer' has no attribute {name!r}")
