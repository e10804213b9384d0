"""MOPO inside TRL (1.16): its DPO, GRPO and RLOO trainers with thresholds, and our head in any of its models."""

from mopo_trainer.integrations.trl.dpo import MOPODPOTrainer
from mopo_trainer.integrations.trl.head import add_mopo_head
from mopo_trainer.integrations.trl.online import MOPOGRPOTrainer, MOPORLOOTrainer

__all__ = ["MOPODPOTrainer", "MOPOGRPOTrainer", "MOPORLOOTrainer", "add_mopo_head"]
