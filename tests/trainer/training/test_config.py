"""MOPOConfig: its types on the command line, ranges."""

import copy
import dataclasses
import pickle

import pytest
import yaml
from transformers import HfArgumentParser

from mopo_trainer.training.config import MOPOConfig


def test_command_line(tmp_path):
    parser = HfArgumentParser(MOPOConfig)
    (args,) = parser.parse_args_into_dataclasses(
        f"--output_dir {tmp_path} --primary a --thresholds b=0.6 c=0.5 --eps auto --policy_step contrast "
        "--lag_steps 5 --scorers brevity short=brevity --use_cpu".split()
    )
    assert args.threshold_map() == {"b": 0.6, "c": 0.5}
    assert args.robust_radius() == "auto"
    assert (args.policy_step, args.lag_steps, args.scorers) == ("contrast", 5, ["brevity", "short=brevity"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": 0.0}, "tau=0.0 must be positive"),
        ({"eps": "-1"}, "eps='-1' must be a number"),
        ({"eps": "wide"}, "eps='wide' must be a number"),
        ({"min_weight": 1.0}, "min_weight=1.0 must lie in"),
        ({"grad_sampling": 1.0}, "grad_sampling must be a number between 0.00012207 and 1 .*got 1.0$"),
        (
            {"grad_sampling": True},
            "grad_sampling must be a number between 0.00012207 and 1 .*got True, a bool: give a float",
        ),
        ({"grad_sampling": "few"}, "grad_sampling='few' is not a number"),
        ({"ratchet_beta": 1.1}, "ratchet_beta=1.1 must lie in"),
        ({"lag_steps": 0}, "lag_steps=0 must be at least 1"),
        ({"remove_unused_columns": True}, "it would drop the labels"),
        ({"thresholds": ["b"]}, "not of the form"),
        ({"policy_step": "dpo"}, "policy_step='dpo' is none of clone, contrast, regress"),
        ({"dual_update": "newton"}, "dual_update='newton' is none of exact, sgd, barrier"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not a number"),
        ({"max_steps": "1e3"}, "max_steps='1e3' is not a whole number"),
    ],
)
def test_values_out_of_range_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_what_yaml_makes_of_a_file_is_understood(tmp_path):
    """`MOPOConfig(**yaml.safe_load(file))`: 1e-5 is text there, `no` is False, a lone name no list."""
    text = "{learning_rate: 1e-5, tau: 1e-1, eval_strategy: no, save_strategy: no, scorers: brevity, thresholds: b=0.5}"
    args = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **yaml.safe_load(text))
    assert (args.learning_rate, args.tau) == (1e-5, 0.1)
    assert (args.eval_strategy, args.save_strategy) == ("no", "no")
    assert (args.scorers, args.threshold_map()) == (["brevity"], {"b": 0.5})


def test_an_unknown_option_is_named_with_the_nearest(tmp_path):
    with pytest.raises(TypeError, match="MOPOConfig has no option 'learning_rates'; did you mean learning_rate"):
        MOPOConfig(output_dir=str(tmp_path), learning_rates=1.0)


def test_a_config_survives_what_transformers_does_with_it(tmp_path):
    args = MOPOConfig(output_dir=str(tmp_path), use_cpu=True, primary="a", max_length=None)
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert copied.to_dict() == args.to_dict()
