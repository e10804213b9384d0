"""MOPOTrainer on a GPU trains as on a CPU: the same multipliers, losses and weights, in one precision or another."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig
from tiny import make_pairs, make_tiny_model

from mopo_trainer.training.config import MOPOConfig
from mopo_trainer.training.trainer import MOPOTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS = ["clone", "contrast", "regress"]


@pytest.fixture(autouse=True)
def forgetful():
    yield
    forget()


def forget():
    """accelerate lets a process have one device, and remembers which."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def run(folder, tokenizer, *, on_cpu, peft_config=None, **options):
    forget()
    args = MOPOConfig(
        **{"output_dir": str(folder), "primary": "friendly", "thresholds": ["brief=0.4"], "max_steps": 4},
        **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "seed": 1},
        **{"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": on_cpu, "logging_steps": 1},
        **options,
    )
    model = make_tiny_model(tokenizer)
    trainer = MOPOTrainer(model, args, train_dataset=make_pairs(), processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    assert trainer.model.device.type == ("cpu" if on_cpu else "cuda")
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    weights = torch.cat([p.detach().float().cpu().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return losses, trainer.dual.multipliers.cpu(), weights


@pytest.mark.parametrize("policy_step", STEPS)
@pytest.mark.parametrize("dual_update", ["exact", "sgd"])
def test_a_run_is_the_cpus(tmp_path, tokenizer, policy_step, dual_update):
    options = {"policy_step": policy_step, "dual_update": dual_update}
    on_gpu, on_cpu = (run(tmp_path / str(x), tokenizer, on_cpu=x, **options) for x in (False, True))
    torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_gpu[1], on_cpu[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(on_gpu[2], on_cpu[2], rtol=0, atol=2e-3)  # Adam's steps of 1e-2 blow roundings up


@pytest.mark.parametrize("policy_step", STEPS)
def test_an_adapter_in_bfloat16_trains(tmp_path, tokenizer, policy_step):
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    losses, _, weights = run(tmp_path, tokenizer, on_cpu=False, peft_config=lora, bf16=True, policy_step=policy_step)
    assert losses.isfinite().all()
    assert weights.isfinite().all()
    if policy_step == "contrast":
        torch.testing.assert_close(losses[0].item(), 0.6931, rtol=0, atol=2e-3)  # the policy is its own reference
