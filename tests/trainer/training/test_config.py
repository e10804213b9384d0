"""MOPOConfig: its types on the command line, ranges."""

import pytest
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
        ({"ratchet_beta": 1.1}, "ratchet_beta=1.1 must lie in"),
        ({"lag_steps": 0}, "lag_steps=0 must be at least 1"),
        ({"remove_unused_columns": True}, "would drop the labels"),
        ({"thresholds": ["b"]}, "not of the form"),
    ],
)
def test_values_out_of_range_are_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        MOPOConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)
