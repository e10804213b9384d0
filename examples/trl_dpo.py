"""TRL's DPO script with several labels: python examples/trl_dpo.py --model_name_or_path MODEL --dataset_name ROWS ...

--primary helpful --held concise --threshold 0.6 are the only arguments that TRL's own script does not have.
"""

from dataclasses import dataclass

from datasets import load_dataset
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from mopo_trainer.integrations.trl import MOPODPOTrainer


@dataclass
class Held:
    """What is maximised, and what is held."""

    primary: str
    held: str
    threshold: float


script, training, model, held = TrlParser((ScriptArguments, DPOConfig, ModelConfig, Held)).parse_args_and_config()
trainer = MOPODPOTrainer(
    model.model_name_or_path,
    args=training,
    train_dataset=load_dataset("json", data_files=script.dataset_name, split="train"),
    peft_config=get_peft_config(model),
    primary=held.primary,
    thresholds={held.held: held.threshold},
)
trainer.train()
trainer.save_model(training.output_dir)
