"""Two reward functions, one held: python examples/trl_grpo.py --model_name_or_path MODEL --dataset_name ROWS ...

Rows hold `prompt`. The initial model answers every prompt twice first: these are the opponents that win rates count.
"""

from datasets import load_dataset
from transformers import AutoTokenizer, pipeline
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from mopo_trainer.integrations.trl import MOPOGRPOTrainer

script, training, model = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config()
rows = load_dataset("json", data_files=script.dataset_name, split="train").select_columns(["prompt"])
start = pipeline(
    "text-generation",
    model.model_name_or_path,
    tokenizer=AutoTokenizer.from_pretrained(model.model_name_or_path, padding_side="left"),
    max_new_tokens=training.max_completion_length,
)
answers = start(list(rows["prompt"]), num_return_sequences=2, return_full_text=False, do_sample=True, batch_size=16)
rows = rows.add_column("opponents", [[answer["generated_text"] for answer in two] for two in answers])


def vowels(completions, **_):
    return [sum(text.count(letter) for letter in "aeiou") for text in completions]


def brevity(completions, **_):
    return [-len(text) for text in completions]


trainer = MOPOGRPOTrainer(
    model.model_name_or_path,
    reward_funcs=[vowels, brevity],
    args=training,
    train_dataset=rows,
    primary="vowels",
    thresholds={"brevity": 0.5},
)
trainer.train()
