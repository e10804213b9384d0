"""How launchers call Triton kernels, so that each can be compiled where there is no GPU to launch it on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

TYPES = {
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
ALIGNED = [["tt.divisibility", 16]]  # what a launch finds out about pointers and integers


class Configuration(NamedTuple):
    """A kernel with the types of its arguments, the values of its constants and its options: what Triton compiles."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]  # argument → Triton's name of its type; "constexpr" for those below
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]  # (place of an argument,) → what is known of its value
    options: dict[str, int]  # num_warps, num_stages

    @classmethod
    def of(cls, name: str, kernel: Any, arguments: Mapping[str, Any], **options: int) -> Configuration:
        """That of a call with these arguments: tensors may be on the meta device, and count as aligned to 16 bytes.

        Numbers have the type that the kernel annotates; None and constexpr arguments are constants.
        """
        types = {parameter.name: _type(parameter, arguments[parameter.name]) for parameter in kernel.params}
        constexprs = {argument: arguments[argument] for argument, kind in types.items() if kind == "constexpr"}
        aligned = [place for place, argument in enumerate(types) if _is_aligned(types[argument], arguments[argument])]
        return cls(name, kernel, types, constexprs, {(place,): ALIGNED for place in aligned}, options)


@contextmanager
def recorded() -> Iterator[list[Configuration]]:
    """Triton kernels called in this context are not launched: the configuration of each call is in the list, once."""
    found: list[Configuration] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        values = inspect.signature(kernel.fn).bind(*arguments, **keywords).arguments
        configuration = Configuration.of(_name(kernel, values), kernel, values, **options)
        if configuration not in found:
            found.append(configuration)

    with mock.patch.object(triton.JITFunction, "run", record):
        yield found


def _name(kernel: Any, values: Mapping[str, Any]) -> str:
    """What tells a call from others of this kernel: dtypes, constants, absent arguments, unaligned numbers."""
    dtypes = dict.fromkeys(TYPES[x.dtype] for x in values.values() if isinstance(x, Tensor))
    constants = [f"{p.name}={values[p.name]}" for p in kernel.params if p.is_constexpr or values[p.name] is None]
    odd = [f"{name}={x}" for name, x in values.items() if name.endswith("stride") and x % 16 != 0]
    return f"{kernel.__name__}({', '.join([*dtypes, *constants, *odd])})"


def _type(parameter: Any, value: Any) -> str:
    if parameter.is_constexpr or value is None:
        return "constexpr"
    return "*" + TYPES[value.dtype] if isinstance(value, Tensor) else parameter.annotation_type


def _is_aligned(kind: str, value: Any) -> bool:
    return isinstance(value, Tensor) or (kind in ("i32", "i64") and value % 16 == 0)
