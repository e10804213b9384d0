"""The options that are ours: fields, defaults and help, without the libraries that the run itself needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class MOPOOptions:
    """What MOPOConfig adds to TrainingArguments, or changes."""

    per_device_train_batch_size: int = field(default=4, metadata={"help": "Groups (prompts) per device and step."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimizer steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the columns are labels."})

    primary: str | None = field(default=None, metadata={"help": "Name of the objective to maximise."})
    thresholds: list[str] | None = field(
        default=None,
        metadata={
            "help": "Win rates to hold for the secondaries: `--thresholds brevity=0.6 plain_language=0.5`.",
            "aliases": ["--threshold"],
            "action": "extend",
        },
    )
    tau: float = field(default=0.08, metadata={"help": "Temperature of the KL penalty (paper: 0.08)."})
    eps: str = field(
        default="0",
        metadata={
            "help": "Radius of the robust bound's KL ball, or 'auto'. The paper's 0.15 makes most thresholds "
            "infeasible on small groups: check with `mopo solve --eps` first."
        },
    )
    policy_step: Literal["clone", "contrast", "regress"] = field(
        default="clone",
        metadata={"help": "clone (weighted log-likelihood), contrast (DPO-like), regress (IPO-like)."},
    )
    dual_update: Literal["exact", "sgd", "barrier"] = field(
        default="exact",
        metadata={
            "help": "How the multipliers move: exact (Newton on all labels), sgd (Algorithm 1), barrier (MOPO-LB)."
        },
    )
    lag_steps: int | None = field(
        default=None,
        metadata={"help": "Refresh the reference policy every so many steps (paper: 500); never if unset."},
    )
    lag_clip: float = field(default=10.0, metadata={"help": "Bound on |log π_lag − log π_ref| per response."})
    ratchet_beta: float = field(
        default=0.9995, metadata={"help": "At a refresh, thresholds rise to this share of what was reached."}
    )
    multiplier_lr: float = field(
        default=0.02, metadata={"help": "sgd: step size of the multipliers; barrier: weight of the newest estimate."}
    )
    chi_lr: float = field(default=0.1, metadata={"help": "sgd: step size of the robust bound's variable."})
    barrier_sigma: float = field(default=0.01, metadata={"help": "barrier: strength, multiplier = sigma / slack."})
    barrier_delta: float = field(
        default=0.02,
        metadata={
            "help": "barrier: slack below which it is extended; beyond a multiplier of 2σ/δ a threshold is missed."
        },
    )
    min_weight: float = field(
        default=1e-5, metadata={"help": "clone: responses of this weight or less never enter the model."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Tokens per prompt + response; longer are cut."})
    max_prompt_length: int | None = field(default=512, metadata={"help": "Tokens per prompt; cut from the left."})
    share_prompt: bool = field(
        default=False,
        metadata={
            "help": "Run a prompt once for all its responses (exact; full attention with sdpa or eager only). "
            "Saves most where prompts are long."
        },
    )
    as_chat: bool = field(
        default=False, metadata={"help": "Put plain-text prompts and responses into the model's chat template."}
    )
    scorers: list[str] | None = field(
        default=None,
        metadata={
            "help": "Objectives computed from the text: `brevity`, `short=brevity`, `name=module:function`.",
            "aliases": ["--scorer"],
            "action": "extend",
        },
    )
    rating_scale: float | None = field(
        default=None, metadata={"help": "P = sigmoid(rating difference / scale) instead of 1, ½, 0."}
    )
    on_bad_row: Literal["error", "skip"] = field(
        default="error",
        metadata={"help": "Rows that cannot be read (empty replies, broken lines): refuse them, or skip and count."},
    )
    reference_cache_dir: str | None = field(
        default=None, metadata={"help": "Where reference log-probs are kept; default <output_dir>/reference."}
    )
    grad_sampling: float | None = field(
        default=None,
        metadata={
            "help": "ε in (0, 1): round the LM head's gradient at random to at most 1/ε + 2 entries a row, unbiased "
            "(try 0.0156; docs/sampling.md says when it pays). Default: exact."
        },
    )
    workspace_bytes: int | None = field(default=None, metadata={"help": "Bound on the LM head's temporary memory."})
    backend: str | None = field(default=None, metadata={"help": "Force a kernel backend; see `mopo doctor`."})
