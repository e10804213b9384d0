"""How launchers call Triton kernels: what there is to compile, found where there is no GPU to launch it on."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from mopo_kernels.backends.batch import Labels
from mopo_kernels.backends.fold import Samples, Statistics, Tile, Transform
from mopo_kernels.backends.lists import Lists
from mopo_kernels.backends.triton.batch import MAX_RESPONSES, label_statistics, sequence_sums
from mopo_kernels.backends.triton.cut_backward import launch
from mopo_kernels.backends.triton.cut_forward import cut_statistics
from mopo_kernels.backends.triton.cut_tile import KERNELS, TABLE, Blocks, CutInputs, candidates
from mopo_kernels.backends.triton.fold import fold_gradient, fold_statistics
from mopo_kernels.backends.triton.sample import fold_sample, sum_rows
from mopo_kernels.backends.triton.scale import scale_in_place

TYPES = {
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALIGNED = [["tt.divisibility", 16]]  # what a launch finds out about pointers and integers
NEEDS = {
    "gradients": [(True, True, True), (True, True, False), (True, False, False)],
    "grad_hidden": [(True, False, False)],
    "grad_weight": [(False, True, True), (False, True, False)],
}


class Configuration(NamedTuple):
    """A kernel with the types of its arguments, the values of its constants and its options: what Triton compiles."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]  # argument → Triton's name of its type; "constexpr" for those below
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]  # (place of an argument,) → what is known of its value
    options: dict[str, int]  # num_warps, num_stages

    @classmethod
    def of(cls, kernel: Any, arguments: Mapping[str, Any], **options: int) -> Configuration:
        """That of a call with these arguments: tensors may be on the meta device, and count as aligned to 16 bytes.

        Numbers have the type that the kernel annotates; None and constexpr arguments are constants.
        """
        types = {parameter.name: _type(parameter, arguments[parameter.name]) for parameter in kernel.params}
        constexprs = {argument: arguments[argument] for argument, kind in types.items() if kind == "constexpr"}
        aligned = [place for place, argument in enumerate(types) if _is_aligned(types[argument], arguments[argument])]
        attrs = {(place,): ALIGNED for place in aligned}
        return cls(_name(kernel, arguments), kernel, types, constexprs, attrs, options)


@contextmanager
def recorded() -> Iterator[list[Configuration]]:
    """Triton kernels called in this context are not launched: the configuration of each call is in the list, once."""
    found: list[Configuration] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in keywords}
        values = inspect.signature(kernel.fn).bind(*arguments, **keywords).arguments
        configuration = Configuration.of(kernel, values, **options)
        if configuration not in found:
            found.append(configuration)

    with mock.patch.object(triton.JITFunction, "run", record), torch.device("meta"):
        yield found


def of_fold() -> list[Configuration]:
    """Those of all dtypes and options, of vocabularies that are whole vectors and not, of few rows and many; with
    entropies and the gradient of lse, and without."""
    with recorded() as found:
        for dtype, softcap, with_bias, extra in itertools.product(DTYPES, *[(False, True)] * 3):
            for rows, columns in ((8192, 151936), (4, 50257)):
                logits, target = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, dtype=torch.int64)
                bias = torch.empty(columns, dtype=torch.promote_types(dtype, torch.float32)) if with_bias else None
                tile = Tile(logits, target, Transform(1.0, 1.0, softcap), bias=bias)
                per_row = torch.empty(rows, dtype=torch.float64)
                fold_statistics(tile, Statistics(per_row, per_row, per_row, per_row if extra else None))
                for out in (logits, torch.empty(rows, columns + 1, dtype=dtype)[:, :-1]):
                    fold_gradient(tile, per_row, per_row, out, per_row if extra else None)
        for dtype in DTYPES:
            scale_in_place(
                torch.empty(2**20, dtype=dtype), torch.empty((), dtype=torch.promote_types(dtype, torch.float32))
            )
    return found


def of_sample() -> list[Configuration]:
    """Those of all dtypes and options, of vocabularies that are whole vectors and not; of hidden sizes likewise, with
    sums in their own dtype and in the values'."""
    with recorded() as found:
        for dtype, softcap, with_bias in itertools.product(DTYPES, *[(False, True)] * 2):
            work = torch.promote_types(dtype, torch.float32)
            for rows, columns in ((8192, 151936), (4, 50257)):
                bias = torch.empty(columns, dtype=work) if with_bias else None
                target, per_row = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
                tile = Tile(torch.empty(rows, columns, dtype=dtype), target, Transform(1.0, 1.0, softcap), bias=bias)
                samples = Samples.start(rows, columns, 1 / 64, work, target.device)
                fold_sample(tile, per_row, per_row, 1 / 64, samples)
        for dtype, hidden_size in itertools.product(DTYPES, (4096, 577)):
            work = torch.promote_types(dtype, torch.float32)
            edges, index = torch.empty(9, dtype=torch.int64), torch.empty(20, dtype=torch.int32)
            lists = Lists(edges[:-1], edges[1:], index, torch.empty(20, dtype=work))
            for out_dtype in dict.fromkeys((dtype, work)):
                sum_rows(
                    lists, torch.empty(512, hidden_size, dtype=dtype), torch.empty(8, hidden_size, dtype=out_dtype)
                )
    return found


def of_batch() -> list[Configuration]:
    """Those of both dtypes, with lag ratios and without, and of sizes up to the largest."""
    with recorded() as found:
        for dtype in (torch.float32, torch.float64):
            sequence_sums(torch.empty(8, 1024, dtype=dtype), torch.empty(8, 1024, dtype=torch.int64), -100)
        for size, with_lag in itertools.product((2, 64, 1024, MAX_RESPONSES), (True, False)):
            win_rate, group = torch.empty(size, 3), torch.empty(size, dtype=torch.int64)
            lag = torch.empty(size) if with_lag else None
            label_statistics(Labels(win_rate, group, torch.empty(3), lag, tau=0.1, eps=0.1, primary=0))
    return found


def of_cut(kernel: str, dtype: torch.dtype, blocks: Blocks) -> list[Configuration]:
    """Those of a kernel with these blocks: with all options, which comes first, and without; rows are whole vectors."""
    rows, vocab, hidden_size = 2**15, 2**17, 4096
    with recorded() as found:
        hidden, weight = torch.empty(rows, hidden_size, dtype=dtype), torch.empty(vocab, hidden_size, dtype=dtype)
        target, lse = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        for with_options in (True, False):
            bias = torch.empty(vocab) if with_options else None
            inputs = CutInputs(hidden, weight, target, Transform(1.0, 1.0, with_options), bias)
            if kernel == "statistics":
                cut_statistics(inputs, blocks=blocks)
                continue
            for needs in NEEDS[kernel]:
                if needs[2] <= with_options:
                    launch(kernel, inputs, lse, torch.empty(rows), torch.empty(1), needs, blocks)
    return found


def of_table(
    entry: str,  # of cut_blocks.json
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
) -> Iterator[Configuration]:
    """What the cut kernels' launchers can choose where this entry counts."""
    for dtype in dtypes:
        for kernel, blocks in TABLE[entry][str(dtype).removeprefix("torch.")].items():
            yield from of_cut(kernel, dtype, blocks)


def of_candidates() -> Iterator[Configuration]:
    """What bench/gpu_report.py times, with all options: those of more work are not always those that spill."""
    for dtype, kernel in itertools.product((torch.bfloat16, torch.float32), KERNELS):
        for blocks in candidates(kernel, dtype):
            yield from of_cut(kernel, dtype, blocks)


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
