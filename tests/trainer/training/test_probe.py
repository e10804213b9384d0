"""What the trainer measures of a model: how its logits come about, where it differs in batches, shared prompts."""

import copy
import logging

import pytest
import torch
from every_type import tiny_model as type_model
from tiny import SIZES as TINY
from tiny import make_tiny_model, plain_logps
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from mopo_trainer.data.packing import SequenceBatch
from mopo_trainer.training import probe
from mopo_trainer.training.head import Scoring, Transform, head_input
from mopo_trainer.training.probe import check_lengths, probe_scoring, sharing_obstacle

PROMPT = list(range(9, 16))
SEQUENCES = [([*PROMPT, *range(40, 52)], 7), ([*PROMPT, 70, 60, 50], 7)]
SIZES = TINY | {"vocab_size": 261}


class Altered(LlamaForCausalLM):
    """A Llama that does something to its logits."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = self.alter(output.logits, inputs)
        return output


@pytest.fixture
def altered(tokenizer):
    def make(alter, dtype=torch.float32, **config):
        model = make_tiny_model(tokenizer)
        with torch.no_grad():
            model.lm_head.weight.mul_(50)  # logits of some nats: a wrong scale shows
        for name, value in config.items():
            setattr(model.config, name, value)
        model.__class__ = Altered
        model.alter = lambda logits, inputs: alter(logits)
        return model.to(dtype).eval()

    return make


def logps(model, scoring, sequences=SEQUENCES):
    row_of = torch.zeros(len(sequences), dtype=torch.long)
    packed = scoring.pack(SequenceBatch.of(sequences), row_of)
    with torch.no_grad():
        return scoring.logp(model, scoring.forward(model, model, packed).states, packed).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("alter", "config", "found"),
    [
        (lambda z: z, {}, Transform()),
        (lambda z: z, {"logit_scale": 0.7, "final_logit_softcapping": 5.0, "logits_scaling": 3.0}, Transform()),
        (lambda z: z * 0.25, {"any_name": 0.25}, Transform(0.25)),
        (lambda z: z / 8, {"logits_scaling": 8}, Transform(1 / 8)),
        (lambda z: z * 8, {"logits_scaling": 8}, Transform(8.0)),
        (lambda z: 7 * torch.tanh(z / 7), {"nested": {"cap": 7.0}}, Transform(softcap=7.0)),
        (lambda z: 30 * torch.tanh(z * 3 / 30), {"a": 3.0, "b": 30.0}, Transform(3.0, 30.0)),
    ],
)
def test_the_transform_is_read_off_the_logits(altered, alter, config, found, dtype):
    model = altered(alter, dtype, **config)
    scoring = probe_scoring(model, SEQUENCES[0][0], Scoring(0))
    assert scoring.transform == found
    if dtype == torch.float32:
        torch.testing.assert_close(logps(model, scoring), plain_logps(model, SEQUENCES), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "alter",
    [
        lambda z: z * 0.37,  # in no configuration
        lambda z: -z,
        lambda z: z + torch.linspace(0, 3, z.shape[-1]),
        lambda z: torch.where(torch.arange(z.shape[-1]) < 30, -torch.inf, z),
        lambda z: 5 * torch.sign(z) * (1 + z.abs() / 5).log(),
        lambda z: z * (1 + torch.arange(z.shape[1]) / 16)[:, None],
    ],
)
def test_other_logits_are_the_models_own(altered, alter, caplog):
    model = altered(alter, logit_scale=0.5)
    scoring = probe_scoring(model, SEQUENCES[0][0], Scoring(0, share_prompt=True))
    assert scoring == Scoring(0, transform=None)
    assert "go through the model's own logits: exact, but every position of a batch takes 261 logits" in caplog.text
    torch.testing.assert_close(logps(model, scoring), plain_logps(model, SEQUENCES), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("alter", [lambda z: z * 0.37, lambda z: z.sigmoid(), lambda z: z.tanh()])
def test_gradients_through_the_models_logits(altered, alter):
    """Also where the last operation keeps its result for its backward pass."""
    model = altered(alter)
    scoring = Scoring(0, transform=None)
    packed = scoring.pack(SequenceBatch.of(SEQUENCES), None)
    scoring.logp(model, scoring.forward(model, model, packed).states, packed).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    plain_logps.__wrapped__(model, SEQUENCES).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call", [lambda head, x: head(x.flatten(0, 1)).view(*x.shape[:2], -1), lambda head, x: head(input=x)]
)
def test_heads_that_are_fed_another_way_go_through_the_models_logits(tiny_model, monkeypatch, call):
    def forward(input_ids, **inputs):
        hidden = tiny_model.model(input_ids, attention_mask=inputs.get("attention_mask")).last_hidden_state
        return CausalLMOutput(logits=call(tiny_model.lm_head, hidden))

    expected = plain_logps(tiny_model, SEQUENCES)
    monkeypatch.setattr(tiny_model, "forward", forward)
    scoring = probe_scoring(tiny_model, SEQUENCES[0][0], Scoring(0))
    assert scoring.transform is None
    torch.testing.assert_close(logps(tiny_model, scoring), expected, rtol=1e-5, atol=1e-4)


def test_the_head_makes_the_logits_of_one_position_only(tiny_model):
    shapes = []
    tiny_model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    logps(tiny_model, Scoring(0))
    assert shapes == [(2, 1, 261)]


def test_a_model_whose_hidden_states_change_with_padding_is_refused(tiny_model, monkeypatch):
    def disturb(module, args, options, output):
        mask = options.get("attention_mask")
        if mask is not None and not mask.all():
            output.last_hidden_state = output.last_hidden_state.roll(1, dims=-1)

    tiny_model.model.register_forward_hook(disturb, with_kwargs=True)
    with pytest.raises(ValueError, match="other log-probabilities in a padded batch than alone"):
        probe_scoring(tiny_model, SEQUENCES[0][0], Scoring(0))


def test_rounding_in_many_layers_is_no_fault_of_padding():
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.5, tie_word_embeddings=True)).bfloat16()
    assert probe_scoring(model, [5 + i * 37 % 200 for i in range(16)], Scoring(0)).transform == Transform()


@pytest.mark.parametrize(("spread", "is_causal"), [(0.5, True), (0.02, False)], ids=["large weights", "usual weights"])
def test_later_tokens_may_change_what_large_weights_make_of_a_rounding(spread, is_causal):
    """An order of sums that depends on the length, as products of 16 bits have it on some machines."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=spread, tie_word_embeddings=True)).bfloat16()
    ids = [5 + i * 37 % 200 for i in range(12)]
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits[0]
    otherwise = alone * (1 + 0.2 * torch.randn(alone.shape, generator=torch.Generator().manual_seed(1)))
    if is_causal:
        return probe._check_causal(model, [otherwise, alone], ids)
    with pytest.raises(ValueError, match="predicts a token otherwise"):
        probe._check_causal(model, [otherwise, alone], ids)


def test_a_model_that_reads_later_tokens_is_refused(altered):
    model = altered(lambda z: z + z.mean(1, keepdim=True))
    with pytest.raises(ValueError, match=r"Altered predicts a token otherwise .* \(encoders need is_decoder=True\)"):
        probe_scoring(model, SEQUENCES[0][0], Scoring(0))


def test_a_model_that_takes_no_tokens_alone_is_refused(altered):
    def fail(z):
        raise KeyError("pixel_values")

    with pytest.raises(ValueError, match=r"Altered cannot be run on tokens alone \(KeyError: 'pixel_values'"):
        probe_scoring(altered(fail), SEQUENCES[0][0], Scoring(0))


def test_probing_leaves_the_model_as_it_was(tiny_model):
    tiny_model.train()
    hooks = len(tiny_model.lm_head._forward_pre_hooks)
    probe_scoring(tiny_model, SEQUENCES[0][0], Scoring(0))
    assert tiny_model.training
    assert len(tiny_model.lm_head._forward_pre_hooks) == hooks
    with pytest.raises(RuntimeError), head_input(tiny_model, lambda x: x):
        raise RuntimeError
    assert len(tiny_model.lm_head._forward_pre_hooks) == hooks


@pytest.mark.parametrize("ids", [[7], [7, 8], list(range(100))])
def test_probing_with_sequences_of_any_length(tiny_model, ids):
    assert probe_scoring(tiny_model, ids, Scoring(0)) == Scoring(0)


# -------------------------------------------------------------------------------------------------- shared prompts


def windowed(window, **options):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("window", [6, 17, 18, None])
def test_prompts_are_shared_where_the_window_holds_prompt_and_response(window):
    model = windowed(window)
    obstacle = sharing_obstacle(model, SEQUENCES, Scoring(0))
    shared = (logps(model, Scoring(0, share_prompt=True)) - plain_logps(model, SEQUENCES)).abs().max()
    if window is None or window >= 18:
        assert obstacle == ""
        assert shared < 1e-4
    else:
        assert obstacle == f"prompt and response of 19 tokens do not fit its attention window of {window}"
        assert shared > 1e-2


def test_a_window_that_no_name_tells_is_measured():
    model = windowed(6)
    model.model.config = copy.copy(model.config)
    model.config.sliding_window = None
    assert model.model.config.sliding_window == 6
    assert "hidden states of responses behind a shared prompt are" in sharing_obstacle(model, SEQUENCES, Scoring(0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "takes no mask per query"),
        ({"output_router_logits": True}, "the router loss reads one mask per row"),
        ({"layer_types": ["full_attention", "conv"]}, "its conv layers see more of a row"),
    ],
)
def test_what_a_configuration_says_against_sharing(tiny_model, change, reason):
    for name, value in change.items():
        setattr(tiny_model.config, name, value)
    assert reason in sharing_obstacle(tiny_model, SEQUENCES, Scoring(0))


def test_logits_of_the_model_share_no_prompts(tiny_model):
    reason = sharing_obstacle(tiny_model, SEQUENCES, Scoring(0, transform=None))
    assert reason == "log-probabilities go through the model's own logits"


def test_a_model_that_refuses_the_mask_says_how(tiny_model, monkeypatch):
    plain = tiny_model.model.forward

    def forward(*args, attention_mask=None, **options):
        _batch, _length = attention_mask.shape
        return plain(*args, attention_mask=attention_mask, **options)

    monkeypatch.setattr(tiny_model.model, "forward", forward)
    assert "the model refuses a mask per query (ValueError" in sharing_obstacle(tiny_model, SEQUENCES, Scoring(0))


def test_a_window_that_a_whole_row_exceeds_is_found_with_the_whole_row():
    """GPT-Neo's windows count places in the row, not positions: two responses fit, five do not."""
    model = type_model("gpt_neo", window_size=24)
    row = [([*PROMPT, *range(10 * i, 10 * i + 8)], 7) for i in range(1, 6)]
    shared = (logps(model, Scoring(0, share_prompt=True), row) - plain_logps(model, row)).abs()
    assert shared[:2].max() < 1e-3 < 0.1 < shared[2:].max()
    assert sharing_obstacle(model, row[:2], Scoring(0)) == ""
    assert "hidden states of responses behind a shared prompt are" in sharing_obstacle(model, row, Scoring(0))


# --------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("kind", "rope", "beyond"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, True),
        ("llama", {"rope_type": "dynamic"}, True),
        ("llama", {"rope_type": "yarn"}, False),
        ("llama", {"rope_type": "default"}, False),
    ],
)
def test_positions_that_are_rescaled_for_a_whole_batch_are_refused_beyond_their_length(kind, rope, beyond):
    rope |= {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    model = type_model(kind, rope_parameters=rope, max_position_embeddings=16, original_max_position_embeddings=16)
    long, short = SEQUENCES
    wrong = (logps(model, Scoring(0)) - plain_logps(model, SEQUENCES)).abs().max() > 0.1
    assert wrong == beyond
    check_lengths(model, short, ([*PROMPT, *range(40, 48)], 7), Scoring(0))
    if beyond:
        with pytest.raises(ValueError, match="of 10 tokens other hidden states beside one of 19 than alone"):
            check_lengths(model, short, long, Scoring(0))
    else:
        check_lengths(model, short, long, Scoring(0))


# ---------------------------------------------------------------------------------------------- mixtures of experts


def mixture(**options):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None, **options)).eval()


@pytest.mark.parametrize("coefficient", [0.0, 0.001, 0.02, 10.0])
def test_the_router_weight_is_the_models_own(coefficient):
    model = mixture(output_router_logits=True, router_aux_loss_coef=coefficient)
    scoring = probe_scoring(model, SEQUENCES[0][0], Scoring(0))
    assert scoring.router_weight == pytest.approx(coefficient)


def test_a_router_weight_near_one_that_the_configuration_names_is_refused():
    model = mixture(output_router_logits=True, router_aux_loss_coef=0.001)
    model.router_aux_loss_coef = 0.0011
    with pytest.raises(ValueError, match=r"adds its router loss 0\.0011 times to its own"):
        probe_scoring(model, SEQUENCES[0][0], Scoring(0))


def test_without_router_logits_there_is_no_router_loss():
    model = mixture(output_router_logits=False, router_aux_loss_coef=10.0)
    assert probe_scoring(model, SEQUENCES[0][0], Scoring(0)).router_weight == 0


def test_a_router_weight_that_no_configuration_names_is_refused():
    model = mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    model.router_aux_loss_coef = 3.7
    with pytest.raises(ValueError, match=r"adds its router loss 3\.7 times to its own"):
        probe_scoring(model, SEQUENCES[0][0], Scoring(0))


def test_the_log_is_quiet_about_ordinary_models(tiny_model, caplog):
    with caplog.at_level(logging.INFO):
        probe_scoring(tiny_model, SEQUENCES[0][0], Scoring(0))
    assert not caplog.records
