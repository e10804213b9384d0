"""CPU and CUDA backends: the contracts `fold.py` and `batch.py` in C++ (csrc), called with addresses, sizes, strides.

The two extension modules have the same functions, but for the products of samples. What they are called with differs in
two places: `queue` is a number of threads on a CPU and a stream on a GPU, and a GPU's kernels ask for working memory.

On a CPU the instruction set (AVX-512, AVX2 or portable code) is the best that there is; the environment variable
MOPO_CPU_ISA = avx512 | avx2 | portable asks for another one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mopo_kernels.backends.batch import Labels, LabelValues
from mopo_kernels.backends.fold import Samples, Statistics, Tile
from mopo_kernels.backends.lists import Lists, lists_of_columns, lists_of_rows

try:
    from mopo_kernels import _cpu
except ImportError as error:
    _cpu = None  # type: ignore[assignment]
    NO_CPU = f"the C++ kernels are not built ({error}); reinstall with a C++17 compiler"
else:
    NO_CPU = ""
    if os.environ.get("MOPO_CPU_ISA"):
        _cpu.choose_isa(os.environ["MOPO_CPU_ISA"])
try:
    from mopo_kernels import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    NO_CUDA = (
        f"the CUDA kernels are not built ({error}); reinstall with nvcc on the PATH: "
        "MOPO_BUILD_CUDA=1 pip install --no-build-isolation ..."
    )
else:
    NO_CUDA = ""

ARCHITECTURES = () if _cuda is None else tuple(_cuda.ARCHITECTURES.split(","))  # compute capabilities, "12.0+PTX"
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


class Native:
    """A backend over one of the extension modules, the CPU's as it stands."""

    def __init__(self, module: Any, unavailable: str, queue: Callable[[Tensor], Any]) -> None:
        self.module, self.UNAVAILABLE = module, unavailable
        self._queue = queue  # a context on a tensor's device that gives its queue

    def fold_statistics(self, tile: Tile, statistics: Statistics) -> None:
        native, transform = self._tile(tile)
        with self._queue(statistics.maximum) as queue:
            scratch = _scratch(statistics.maximum, self.module.statistics_scratch(native))
            self.module.statistics(native, transform, _addresses(*statistics), scratch.data_ptr(), queue)

    def fold_gradient(
        self, tile: Tile, lse: Tensor, coefficient: Tensor, out: Tensor, lse_coefficient: Tensor | None = None
    ) -> None:
        native, transform = self._tile(tile)
        per_row = _addresses(lse, coefficient, lse_coefficient)
        with self._queue(lse) as queue:
            self.module.gradient(native, transform, per_row, out.data_ptr(), out.stride(0), queue)

    def fold_sample(self, tile: Tile, lse: Tensor, running: Tensor, floor: float, samples: Samples) -> None:
        native, transform = self._tile(tile)
        with self._queue(lse) as queue:
            self.module.sample(native, transform, self._samples(samples), _addresses(lse, running), floor, queue)

    def sample_hidden(self, samples: Samples, weight: Tensor, out: Tensor) -> None:
        with self._queue(weight) as queue:
            self.module.sample_hidden(self._samples(samples), self._matrix(weight), self._matrix(out), queue)

    def sample_weight(self, samples: Samples, hidden: Tensor, out: Tensor) -> None:
        with self._queue(hidden) as queue:
            self.module.sample_weight(self._samples(samples), self._matrix(hidden), self._matrix(out), queue)

    def sequence_sums(self, logp: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        sums, counts = logp.new_empty(len(logp), dtype=torch.float64), target.new_empty(len(logp))
        sequences = self.module.Sequences(
            logp=_typed(logp),
            target=target.data_ptr(),
            shape=tuple(logp.shape),
            row_strides=(logp.stride(0), target.stride(0)),
            ignore_index=ignore_index,
        )
        with self._queue(logp) as queue:
            self.module.sequence_sums(sequences, sums.data_ptr(), counts.data_ptr(), queue)
        return sums, counts

    def label_statistics(self, labels: Labels) -> tuple[Tensor, Tensor]:
        win_rate = labels.win_rate
        slot = torch.empty_like(labels.group)
        values = win_rate.new_empty(LabelValues.length(*win_rate.shape), dtype=torch.float64)
        native = self.module.Labels(
            shape=tuple(win_rate.shape),
            win_rate=_typed(win_rate),
            group=labels.group.data_ptr(),
            multipliers=_typed(labels.multipliers),
            lag_log_ratio=None if labels.lag_log_ratio is None else _typed(labels.lag_log_ratio),
            settings=self.module.Settings(tau=labels.tau, eps=labels.eps, primary=labels.primary),
        )
        with self._queue(win_rate) as queue:
            scratch = _scratch(values, self.module.labels_scratch(native))
            self.module.label_statistics(native, slot.data_ptr(), values.data_ptr(), scratch.data_ptr(), queue)
        return slot, values

    def _tile(self, tile: Tile) -> tuple[Any, Any]:
        logits, transform = tile.logits, tile.transform
        native = self.module.Tile(
            logits=_typed(logits),
            rows=logits.shape[0],
            columns=logits.shape[1],
            row_stride=logits.stride(0),
            first_column=tile.first_column,
            bias=0 if tile.bias is None else tile.bias.data_ptr(),
            target=tile.target.data_ptr(),
        )
        return native, self.module.Transform(transform.inner, transform.outer, transform.softcap)

    def _samples(self, samples: Samples) -> Any:
        columns, values, counts = samples
        return self.module.Samples(columns.data_ptr(), _typed(values), counts.data_ptr(), tuple(columns.shape))

    def _matrix(self, x: Tensor) -> Any:
        return self.module.Matrix(_typed(x), tuple(x.shape), x.stride(0))


class Cuda(Native):
    """The products of samples are sums of rows that torch lists: it has the sort."""

    def sample_hidden(self, samples: Samples, weight: Tensor, out: Tensor) -> None:
        self._sum_rows(lists_of_rows(samples), weight, out)

    def sample_weight(self, samples: Samples, hidden: Tensor, out: Tensor) -> None:
        self._sum_rows(lists_of_columns(samples, len(out)), hidden, out)

    def _sum_rows(self, lists: Lists, matrix: Tensor, out: Tensor) -> None:
        addresses = _addresses(lists.start, lists.stop, lists.source_row)
        with self._queue(out) as queue:
            self.module.sum_rows(addresses, _typed(lists.value), self._matrix(matrix), self._matrix(out), queue)


@contextmanager
def _threads(x: Tensor) -> Iterator[int]:
    yield torch.get_num_threads()


@contextmanager
def _stream(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which becomes the current device."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


def _scratch(like: Tensor, size: int) -> Tensor:
    """Working memory; the allocator gives it to nobody else before the stream has passed the kernels that use it."""
    return like.new_empty(size)


def _addresses(*tensors: Tensor | None) -> list[int]:
    """Of those that there are: what is optional comes last."""
    return [x.data_ptr() for x in tensors if x is not None]


def _typed(x: Tensor) -> tuple[int, str]:
    """Address and dtype."""
    return x.data_ptr(), DTYPE_NAMES[x.dtype]


cpu = Native(_cpu, NO_CPU, _threads)
cuda = Cuda(_cuda, NO_CUDA, _stream)


# --------------------------------------------------------------------------------------------------------- what is here


def instruction_set() -> str:
    """The CPU's instruction set in use: "avx512", "avx2" or "portable"."""
    return _cpu.isa()


_MULTIPLIES_BFLOAT16 = os.environ.get("MOPO_CPU_ISA") in (None, "", "avx512") and bool(
    torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether CPU products in a dtype are as fast as in float32: 16 bits need instructions of their own."""
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and _MULTIPLIES_BFLOAT16)


@cache
def unfit_for(capability: tuple[int, int]) -> str:
    """Why the CUDA kernels, as they were built, do not run on a GPU of this compute capability, or nothing."""
    if any(runs_on(name, capability) for name in ARCHITECTURES):
        return ""
    gpu = "{}.{}".format(*capability)
    return (
        f"the CUDA kernels are built for {', '.join(ARCHITECTURES)} and this GPU is {gpu}: "
        f'reinstall with MOPO_CUDA_ARCHS="{gpu}"'
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Code for 8.0 runs on all 8.x from there on, for 9.0a on 9.0 alone, and PTX on whatever is newer."""
    match = re.fullmatch(r"(\d+)\.(\d)(a?)f?(\+PTX)?", architecture)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3]:
        return capability == built
    return capability >= built and (capability[0] == built[0] or bool(match[4]))
