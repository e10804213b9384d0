"""MOPO inside TRL's GRPOTrainer and RLOOTrainer: thresholds on reward functions instead of their weights.

from mopo_trainer.integrations.trl import MOPOGRPOTrainer

trainer = MOPOGRPOTrainer(
    model, reward_funcs=[helpful, concise], args=GRPOConfig(...), train_dataset=rows,
    primary="helpful", thresholds={"concise": 0.6},
)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import nanstd

from mopo_trainer.data.errors import DataError
from mopo_trainer.integrations.online import (
    MeasuredDual,
    mean_win_rates,
    measured_win_rates,
    scored_groups,
    without_gaps,
)
from mopo_trainer.integrations.trl.state import KeepsDual

COLUMN = "opponents"  # of a row: the responses that samples are compared with


class OnlineMOPO(KeepsDual):
    """One reward function is maximised while others stay above thresholds (arXiv 2505.10892, online).

    Rows hold `prompt` and `opponents`: responses to it that do not come from the policy in training (samples of the
    initial model, or the data's own answers; texts, or lists of messages where the prompt is one). A reward function is
    an objective, named as TRL names it; v_ik is how often sample i beats the opponents on it. TRL's aggregation then
    runs on v with the multipliers as weights: with s_i = v_ip + Σ_k λ_k v_ik,

        GRPO   advantage_i = (s_i − mean of the group) / (std of the group + 1e-4); plain with scale_rewards="none"
        RLOO   advantage_i = s'_i − mean of the others,  s'_i = s_i − beta · log(π/π_ref)(y_i)

    and every batch, once its advantages are made, moves λ_k ← max(0, λ_k − multiplier_lr (mean of v_k − b_k)).
    RLOO's is the gradient of the constrained problem with τ = beta; GRPO's `beta` penalises per token, and dividing by
    the standard deviation weights prompts (the threshold still is one on the plain mean). `integrations.online` says
    why opponents are needed and how this differs from a weighted sum of rewards.

    A response that a reward function does not score (None, NaN) takes the mean of its group there, and so no side; one
    that none scores has advantage 0, as in TRL; a group without scores of an objective does not count for its average.

    Args:
        args, kwargs: the trainer's own. Each sample brings one opponent to be scored, in turn: give no more of them
            than generations of a prompt.
        primary: the reward function whose win rate is maximised.
        thresholds: {reward function: win rate} to hold for others.
        multiplier_lr: how far a multiplier moves in a step for each unit of slack.
        rating_scale: P(i beats j) = sigmoid((r_i − r_j) / rating_scale); None: 1, ½ (equal) or 0.

    Logged beside TRL's metrics, under MOPOTrainer's names: win_rate/, multiplier/, threshold/, slack/, here measured on
    the policy's samples. TRL's `reward` is s; its rewards/NAME/mean and /std are those of the reward functions.

    Raises:
        ValueError: names that are no reward function, options of TRL's that weigh or bend rewards.
        InfeasibleThresholds: a threshold above 1.
        DataError: rows without opponents.
    """

    dual: MeasuredDual
    _pending_extra_logs: Any
    _pending_metrics: Any
    _tag_names = ["trl", "mopo"]  # noqa: RUF012
    _name = "MOPO"

    def __init__(
        self,
        *args: Any,
        primary: str,
        thresholds: Mapping[str, float] | None = None,
        multiplier_lr: float = 0.1,
        rating_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_config(self.args)
        if getattr(self, "environments", None) is not None:
            raise ValueError("environment_factory: opponents have no environment to be scored in; leave it None")
        self.rating_scale = rating_scale
        self.dual = MeasuredDual(self.reward_func_names, primary, thresholds or {}, multiplier_lr)
        self._rewards = torch.empty(0)  # [N, K] of the batch generated last, as the reward functions gave them
        self._measured: dict[str, float] = {}  # of the batch generated last
        self._scored: dict[str, int] = {}  # prompts of it that a reward function scores

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if COLUMN not in self._signature_columns:
            self._signature_columns.append(COLUMN)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> Tensor:  # [N, K], of all processes
        """Win rates in place of rewards, and the multipliers in place of their weights."""
        training = self.model.training
        samples = self.num_generations if training else self.num_generations_eval
        rows = [{key: value for key, value in row.items() if key != COLUMN} for row in inputs]
        theirs = self._opponent_rewards(inputs, rows, prompts, samples)
        self._rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        _check_finite(self._rewards, self.reward_func_names)
        win_rate = measured_win_rates(self._rewards, theirs, samples, self.rating_scale)
        self.reward_weights = self.dual.multipliers.float()
        group = torch.arange(len(win_rate), device=win_rate.device) // samples
        mean = mean_win_rates(win_rate, group)
        self._measured = self.dual.metrics(mean)
        self._scored = dict(zip(self.dual.objectives, scored_groups(win_rate, group), strict=True))
        if training:
            self.dual.measure(mean)
        unscorable = win_rate.isnan().all(1, keepdim=True)
        return without_gaps(win_rate, group).masked_fill(unscorable, torch.nan).to(self._rewards)

    def _opponent_rewards(
        self, inputs: list[dict[str, Any]], rows: list[dict[str, Any]], prompts: list[Any], samples: int
    ) -> Tensor:  # [N, K], of all processes
        """Each sample scores one opponent of its prompt, in turn, so that processes that share a prompt share them."""
        first = self.accelerator.process_index * len(inputs)
        chat = is_conversational({"prompt": prompts[0]})
        chosen = [_opponent(row, (first + i) % samples, chat) for i, row in enumerate(inputs)]
        texts = [x if isinstance(x, str) else "".join(str(message["content"]) for message in x) for x in chosen]
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        pending = deepcopy((self._pending_extra_logs, self._pending_metrics))  # what samples are logged with
        rewards = super()._calculate_rewards(rows, prompts, chosen, ids)
        self._pending_extra_logs, self._pending_metrics = pending
        _check_finite(rewards, self.reward_func_names)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, with its rewards logged as the reward functions gave them, and what was measured."""
        output = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for k, name in enumerate(self.reward_func_names):
            rewards = self._rewards[:, k]
            metrics[f"rewards/{name}/mean"][-1] = rewards.nanmean().item()
            metrics[f"rewards/{name}/std"][-1] = nanstd(rewards).item()
            table = self._logs["rewards"][name]
            for _ in range(min(len(table), len(rewards))):
                table.pop()
            table.extend(rewards.tolist())
        for key, value in self._measured.items():
            metrics[key] += [value] * max(1, self._scored[key.partition("/")[2]])  # TRL logs the mean of these
        return output


class MOPOGRPOTrainer(OnlineMOPO, GRPOTrainer):
    __doc__ = OnlineMOPO.__doc__


class MOPORLOOTrainer(OnlineMOPO, RLOOTrainer):
    __doc__ = OnlineMOPO.__doc__


def _check_config(config: Any) -> None:
    """Raise ValueError for options that weigh or bend rewards, which multipliers do."""
    refused = {
        "reward_weights": (None, "the multipliers are the weights; leave it unset"),
        "reward_clip_range": (None, "it would clip the thresholds' share of the score; leave it unset"),
        "multi_objective_aggregation": (
            "sum_then_normalize",
            "a reward divided by its spread has no multiplier of a threshold; leave its default, 'sum_then_normalize'",
        ),
    }
    for name, (default, mend) in refused.items():
        value = getattr(config, name, default)
        if value != default:
            raise ValueError(f"{name}={value!r} has no meaning beside thresholds: {mend}")


def _check_finite(rewards: Tensor, names: Sequence[str]) -> None:
    infinite = rewards.isinf().any(0).tolist()
    if any(infinite):
        name = names[infinite.index(True)]
        raise ValueError(f"reward function {name!r} returned an infinite reward; return a number, or None for no score")


def _opponent(row: Mapping[str, Any], index: int, chat: bool) -> Any:
    """The opponent of a prompt's sample, as the completion that TRL hands to reward functions."""
    opponents = row.get(COLUMN)
    if not opponents:
        raise DataError(
            f"a row has no `{COLUMN}` (prompt: {row['prompt']!r}); give a list of responses that do not come from the "
            "policy in training, say samples of the initial model: against itself every policy wins one half"
        )
    opponent = opponents[index % len(opponents)]
    if not chat and not isinstance(opponent, str):
        raise DataError(f"`{COLUMN}` holds {opponent!r} beside a prompt in plain text; give texts")
    return [{"role": "assistant", "content": opponent}] if chat and isinstance(opponent, str) else opponent
