"""What a model does, measured when the trainer is made: its own outputs decide, not the names in its configuration.

The tokens of a few training sequences go through the model alone and as the trainer lays them out, and what differs is
mended where it can be (log-probabilities through the model's own logits, prompts not shared) and refused where not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mopo_trainer.data.packing import PackedSequences, SequenceBatch, TokenSequence, pack
from mopo_trainer.data.sources import one_line
from mopo_trainer.training.head import Scoring, Transform, Unfused, head_input, linear_head
from mopo_trainer.training.split import whole, whole_shape

logger = logging.getLogger(__name__)

PROBE_TOKENS = 16
PROBE_COLUMNS = 512  # of the vocabulary, for the transform
PRODUCT, STATES = 4, 16  # roundings that a product of the head, and hidden states behind all layers, may be apart


@torch.no_grad()
def probe_scoring(plain: PreTrainedModel, ids: Sequence[int], scoring: Scoring) -> Scoring:
    """`scoring` with the way to log-probabilities that equals the model's own on `ids`, cut, alone and padded.

    Raises:
        ValueError: the model cannot be run, reads later tokens, or answers otherwise when a batch is padded.
    """
    with _evaluating(plain):
        sequences = _short(ids)
        own = [_own_logits(plain, ids) for ids, _ in sequences]
        _check_causal(plain, own, sequences[1][0])
        truth = torch.stack([_sequence_logp(x, *pair) for x, pair in zip(own, sequences, strict=True)])
        tolerance = _tolerance(own, plain.dtype, [len(ids) - prompt for ids, prompt in sequences])
        beginning = _sequence_logp(own[0][: len(own[1])], *sequences[1])
        tolerance += 4 * (beginning - truth[1]).abs()  # what rounding makes of the same tokens in another length
        packed = pack(SequenceBatch.of(sequences), None, scoring.pad_token_id).to(plain.device)
        scoring = replace(scoring, router_weight=_router_weight(plain, sequences[0][0]))
        try:
            fused = replace(scoring, transform=measure_transform(plain, sequences[0][0]))
            _compare(plain, fused, packed, truth, tolerance)
            return fused
        except Unfused as error:
            reason = error
        through_logits = replace(scoring, transform=None, share_prompt=False)
        try:
            _compare(plain, through_logits, packed, truth, tolerance)
        except Unfused as error:
            raise ValueError(
                f"{_name(plain)} gives a sequence other log-probabilities in a padded batch than alone ({error}); "
                "this model cannot be trained in batches of several lengths"
            ) from None
        logger.warning(
            "%s: %s. Log-probabilities go through the model's own logits: exact, but every position of a batch takes "
            "%d logits (%.3g MB per 1,000 tokens, twice in the backward pass)",
            _name(plain),
            reason,
            own[0].shape[-1],
            own[0].shape[-1] * own[0].element_size() * 1e-3,
        )
        return through_logits


@torch.no_grad()
def sharing_obstacle(plain: PreTrainedModel, sequences: Sequence[TokenSequence], scoring: Scoring) -> str:
    """Why the `sequences` of one prompt cannot share its pass; "" where the hidden states are the same."""
    longest = max(len(ids) for ids, _ in sequences)
    reason = _layers_obstacle(plain, longest)
    if reason or scoring.transform is None:
        return reason or "log-probabilities go through the model's own logits"
    with _evaluating(plain):
        try:
            alone = _response_states(plain, replace(scoring, share_prompt=False), sequences)
            shared = _response_states(plain, replace(scoring, share_prompt=True), sequences)
        except Exception as error:  # models of any library: whatever they raise, they cannot do it
            return f"the model refuses a mask per query ({type(error).__name__}: {one_line(error, 80)})"
    apart = _apart(shared, alone).max().item()
    if not apart <= _rounding(plain.dtype, STATES):
        return f"hidden states of responses behind a shared prompt are {apart:.2g} off"
    return ""


@torch.no_grad()
def check_lengths(plain: PreTrainedModel, short: TokenSequence, long: TokenSequence, scoring: Scoring) -> None:
    """Raise ValueError where the hidden states of `short` are others beside `long` than alone.

    Rotary positions that are rescaled beyond a length (longrope, dynamic) are so for the whole batch. Their states are
    all off; single ones, whose experts were chosen otherwise by a rounding, are not.
    """
    scoring = replace(scoring, share_prompt=False)
    with _evaluating(plain):
        alone = _response_states(plain, scoring, [short])
        beside = _response_states(plain, scoring, [short, long])[: len(alone)]
    apart = _apart(beside, alone).median().item()
    if not apart <= _rounding(plain.dtype, STATES):
        raise ValueError(
            f"{_name(plain)} gives a sequence of {len(short[0])} tokens other hidden states beside one of "
            f"{len(long[0])} than alone ({apart:.2g} off), as rotary positions of type longrope or dynamic do; "
            "give a max_length below which they are not rescaled"
        )


def _response_states(plain: PreTrainedModel, scoring: Scoring, sequences: Sequence[TokenSequence]) -> Tensor:
    """What enters the head before each token of the responses, [tokens, H], or its logits."""
    row_of = torch.zeros(len(sequences), dtype=torch.long)
    packed = scoring.pack(SequenceBatch.of(sequences), row_of).to(plain.device)
    return scoring.forward(plain, plain, packed).states.flatten(0, 1)[packed.source][packed.target >= 0].double()


def _apart(found: Tensor, truth: Tensor) -> Tensor:
    """Relative distance of vectors; −inf, which may mask logits, equals itself."""
    difference = torch.where(found == truth, 0.0, found - truth)
    return difference.norm(dim=-1) / truth.masked_fill(truth.isinf(), 0.0).norm(dim=-1).clamp_min(1e-30)


def measure_transform(plain: PreTrainedModel, ids: Sequence[int]) -> Transform:
    """What the model does to its head's product, read off logits of hidden states that span small to huge ones.

    Raises:
        Unfused: no logit_scale and softcap, taken from the numbers of its configuration, give the model's logits.
    """
    head = linear_head(plain)
    vocab = whole_shape(head.weight)[0]
    columns = torch.linspace(0, vocab - 1, PROBE_COLUMNS).long().unique().to(head.weight.device)
    weight = whole(head.weight)[columns].double()
    bias = None if head.bias is None else whole(head.bias)[columns].double()
    products: list[Tensor] = []

    def amplify(hidden: Tensor) -> Tensor:  # logits of at most 0.1 at the first position, 300 at the last
        plain_product = nn.functional.linear(hidden.double(), weight).abs().amax(-1, keepdim=True)
        wanted = torch.logspace(-1, math.log10(300), hidden.shape[1], device=hidden.device)[:, None]
        amplified = (hidden * (wanted / plain_product.clamp_min(1e-30))).to(hidden.dtype)
        products.append(nn.functional.linear(amplified.double(), weight, bias))
        return amplified

    with head_input(plain, amplify):
        logits = _own_logits(plain, ids)
    if not products or products[-1].shape[1] < len(ids) or logits.shape[-1] != vocab:
        raise Unfused("its logits do not come from hidden states [R, T, H] through its LM head alone")
    return _fit(products[-1][0, -len(ids) :], logits[:, columns].double(), plain.config, plain.dtype)


def _fit(product: Tensor, logits: Tensor, config: PretrainedConfig, dtype: torch.dtype) -> Transform:
    """The transform of `product` [T, C] that gives `logits`, its constants among the configuration's numbers."""
    numbers = sorted({abs(float(x)) for x in _numbers(config.to_dict()) if x and math.isfinite(x)})
    small = int(product.any(-1).long().argmax())  # the first row of a hidden state that is not 0: no softcap bends yet
    scale = (product[small] @ logits[small] / (product[small] @ product[small])).item()
    scales = [s for s in dict.fromkeys([1.0, *numbers, *(1 / x for x in numbers)]) if abs(s - scale) <= 0.02 * s]
    tolerance = _rounding(dtype, PRODUCT) * product.abs().amax(-1, keepdim=True)
    for s in sorted(scales, key=lambda s: abs(s - scale)):
        for cap in (None, *numbers):
            found = product * s if cap is None else cap * torch.tanh(product * s / cap)
            if bool(((found - logits).abs() <= tolerance * s).all()):
                return Transform(logit_scale=s, softcap=cap)
    raise Unfused(f"its logits are {scale:.4g} times its LM head's product, or bent, in no way its configuration gives")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for entry in value.values():
            yield from _numbers(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _router_weight(plain: PreTrainedModel, ids: Sequence[int]) -> float:
    """The factor with which the model adds its router loss to its own loss, 0 where it makes none."""
    tokens = torch.tensor([ids], device=plain.device)
    router_loss = getattr(_run(plain, input_ids=tokens), "aux_loss", None)
    if not isinstance(router_loss, Tensor) or not router_loss.item():
        return 0.0
    output = _run(plain, input_ids=tokens, labels=tokens)
    entropy = nn.functional.cross_entropy(output.logits[0, -len(ids) : -1].double(), tokens[0, 1:])
    measured = (output.loss.double() - entropy).item() / router_loss.item()
    numbers = [0.0, *(abs(float(x)) for x in _numbers(plain.config.to_dict()))]
    nearest = min(numbers, key=lambda x: abs(x - measured))
    if abs(nearest - measured) > 1e-5 + 0.02 * abs(measured):
        raise ValueError(
            f"{_name(plain)} adds its router loss {measured:.3g} times to its own, which its configuration does not "
            "say; set output_router_logits=False to train without it"
        )
    return nearest


def _layers_obstacle(plain: PreTrainedModel, longest: int) -> str:
    config = plain.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation {config._attn_implementation!r} takes no mask per query; 'sdpa' and 'eager' do"
    if getattr(config, "output_router_logits", False):
        return "the router loss reads one mask per row (output_router_logits)"
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "attention", "sliding_attention"})
    if others or getattr(plain, "_is_stateful", False):
        return f"its {', '.join(others) or 'recurrent'} layers see more of a row than a mask per query allows"
    window = getattr(config, "sliding_window", None)
    if window and longest - 1 > window and (not kinds or "sliding_attention" in kinds):
        return f"prompt and response of {longest} tokens do not fit its attention window of {window}"
    return ""


def _short(ids: Sequence[int]) -> list[TokenSequence]:
    """PROBE_TOKENS tokens, half of them a prompt, and the same without the last ones."""
    tokens = (list(ids) * PROBE_TOKENS)[:PROBE_TOKENS]
    half = PROBE_TOKENS // 2
    return [(tokens, half), (tokens[: half + half // 2], half)]


def _run(plain: PreTrainedModel, **inputs: Tensor) -> Any:
    try:
        return plain(**inputs, use_cache=False)
    except Exception as error:  # models of any library
        raise ValueError(
            f"{_name(plain)} cannot be run on tokens alone ({type(error).__name__}: {one_line(error)}); "
            "a causal language model of text is needed"
        ) from error


def _own_logits(plain: PreTrainedModel, ids: Sequence[int]) -> Tensor:  # [T, V]
    logits = _run(plain, input_ids=torch.tensor([ids], device=plain.device)).logits
    return logits[0, -len(ids) :]  # adapters may put tokens in front


def _sequence_logp(logits: Tensor, ids: Sequence[int], prompt: int) -> Tensor:  # []
    target = torch.tensor(ids[prompt:], device=logits.device)
    return logits[prompt - 1 : -1].double().log_softmax(-1).gather(-1, target[:, None]).sum()


def _check_causal(plain: PreTrainedModel, own: list[Tensor], ids: Sequence[int]) -> None:
    """Raise ValueError where later tokens change what stands before them by more than rounding does."""
    whole, start = own[0][: len(own[1])].double(), own[1].double()
    apart, limit = _apart(whole, start).max().item(), _rounding(plain.dtype, STATES)
    if not apart <= limit and not apart <= 4 * _sensitivity(plain, ids, start):
        raise ValueError(
            f"{_name(plain)} predicts a token otherwise once later ones stand behind it: it is no causal language "
            "model as it is configured (encoders need is_decoder=True)"
        )


def _sensitivity(plain: PreTrainedModel, ids: Sequence[int], logits: Tensor) -> float:
    """How far logits move where every embedding is rounded otherwise: layers of large weights blow roundings up."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_: Any, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).mul(2).sub(1).to(output.device)
        return output * (1 + torch.finfo(output.dtype).eps * signs).to(output.dtype)

    hook = plain.get_input_embeddings().register_forward_hook(disturb)
    try:
        return _apart(_own_logits(plain, ids).double(), logits).max().item()
    finally:
        hook.remove()


def _compare(
    plain: PreTrainedModel, scoring: Scoring, packed: PackedSequences, truth: Tensor, tolerance: Tensor
) -> None:
    """Raise Unfused where `scoring` gives other log-probabilities than `truth`."""
    try:
        states = scoring.forward(plain, plain, packed).states
        found = scoring.logp(plain, states, packed).double()
    except Unfused:
        raise
    except Exception as error:  # models of any library
        raise Unfused(f"a padded batch fails with {type(error).__name__}: {one_line(error, 120)}") from error
    if not bool(((found - truth).abs() <= tolerance).all()):
        raise Unfused(f"log-probabilities {found[0]:.2f}, {found[1]:.2f} instead of {truth[0]:.2f}, {truth[1]:.2f}")


def _tolerance(own: list[Tensor], dtype: torch.dtype, tokens: list[int]) -> Tensor:
    size = max(x[x.isfinite()].abs().max().item() for x in own) + math.log(own[0].shape[-1])
    return _rounding(dtype, 1) * size * torch.tensor(tokens, device=own[0].device).sqrt()


def _rounding(dtype: torch.dtype, steps: int) -> float:
    """Relative difference that two orders of the same arithmetic may show, so many rounding steps."""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return max(steps * (2.0**-10 if tf32 else torch.finfo(dtype).eps), 1e-4)


@contextmanager
def _evaluating(plain: PreTrainedModel) -> Iterator[None]:
    was_training = plain.training
    plain.eval()
    try:
        yield
    finally:
        plain.train(was_training)


def _name(plain: PreTrainedModel) -> str:
    base = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    return type(base).__name__
