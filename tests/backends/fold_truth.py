"""The fold in float64 torch: the truth for tests of kernels; and memory whose addresses need more than 31 bits."""

import mmap

import pytest
import torch

from mopo_kernels.backends.fold import Transform

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRANSFORMS = [  # plain; all scales at once; with a softcap that bites
    Transform.of(1.0, None),
    Transform.of(0.7, None, 1.5),
    Transform.of(0.7, 5.0, 1.5),
]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}


def exact_fold(logits, target, coefficient, transform, bias=None, lse_coefficient=0):
    """lse, z at the target, probabilities and gradient in float64."""
    x = logits.double() if bias is None else logits.double() + bias.double()
    u = transform.inner * x
    z = torch.where(u.isinf(), u, transform.outer * u.tanh()) if transform.softcap else u
    lse = z.logsumexp(-1)
    p = (z - lse[:, None]).exp()
    slope = transform.inner * (transform.outer * (1 - u.tanh() ** 2) if transform.softcap else 1)
    onehot = torch.zeros_like(z).scatter(1, target[:, None], 1.0)
    of_lse = torch.as_tensor(lse_coefficient, device=p.device).unsqueeze(-1)
    gradient = (coefficient[:, None] * (onehot - p) + of_lse * p) * slope
    return lse, z.gather(1, target[:, None])[:, 0], p, gradient


def dense(samples, vocab):
    """Sampled rows as a matrix [R, V], of which [R, V] says where entries are; what a row holds is checked."""
    values, has_entry = (torch.zeros(len(samples.counts), vocab, dtype=torch.float64) for _ in range(2))
    columns, sampled, counts = (x.cpu() for x in samples)
    within = torch.arange(columns.shape[1]) < counts[:, None]
    assert (columns[~within] == -1).all()
    assert (sampled[~within] == 0).all()
    in_order = columns.diff(dim=1) > 0
    assert in_order[within[:, 1:]].all()
    row, place = within.nonzero().unbind(1)
    values[row, columns[row, place].long()] = sampled[row, place].double()
    has_entry[row, columns[row, place].long()] = 1
    return values, has_entry.bool()


def sparse(size, dtype):
    """Memory that exists where it is touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names since 3.12 only
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    try:
        memory = mmap.mmap(-1, size * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no room for {size} elements in the address space: {error}")
    return torch.frombuffer(memory, dtype=dtype)
