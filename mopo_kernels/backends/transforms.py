"""Transforms of torch.func: refused where an op has no rule for them, some of which give zeros without a word."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def refuse_transforms(op: str, backend: str, *tensors: Tensor | None, sampled: bool = False) -> None:
    """Raise where a transform is active that `op` cannot run under on `backend`, or with sampled gradients."""
    is_traced = torch.compiler.is_compiling()  # dynamo knows how many transforms there are, not which
    interpreters = [] if is_traced else _functorch.get_interpreter_stack() or []
    if interpreters and any(is_batched(x) for x in tensors if x is not None):
        raise RuntimeError(
            f"{op} looks at the values of its arguments, which torch.func.vmap hides; call it once with all rows"
        )
    kinds = _functorch.TransformType.Grad, _functorch.TransformType.Jvp
    is_differentiating = forward_ad._current_level >= 0 or any(x.key() in kinds for x in interpreters)
    is_differentiating |= is_traced and _is_inside_any()
    if is_differentiating and (sampled or backend != "reference"):
        cause, mend = ("with grad_sampling", "None of it and ") if sampled else (f"of backend={backend!r}", "")
        raise RuntimeError(
            f"{op} {cause} has gradients for Tensor.backward and torch.autograd.grad alone; "
            f"give it {mend}backend='reference' under torch.func.grad, vjp, jvp, jacrev, jacfwd and hessian"
        )


def _is_inside_any() -> bool:
    return _functorch.get_dynamic_layer_stack_depth() > 0


# A constant to dynamo, which guards on the transforms: that of torch 2.11 cannot trace the call. This is all that
# torch.compiler.assume_constant_result does, which imports dynamo and Triton.
_is_inside_any._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_active() -> bool:
    return not torch.compiler.is_compiling() and bool(_functorch.get_interpreter_stack())


def is_batched(x: Tensor) -> bool:
    """Whether x stands for many under vmap, as gradients do in torch.autograd.grad(..., is_grads_batched=True)."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return _functorch.is_legacy_batchedtensor(x)
