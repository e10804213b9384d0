"""Checks of the fold contract that hold for any implementation on any device: the kernels under emulation, and a GPU's.

A tile is a part of a wider tensor of NaN, at any column, so that its rows begin at any alignment; outputs hold NaN
before they are written. Float64 torch is the truth.
"""

import itertools
import math

import torch
from fold_truth import DTYPES, TRANSFORMS, ULP, exact_fold
from hypothesis import strategies as st

from mopo_kernels.backends.fold import Statistics, Tile


def tile_strategies(*, rows, widths):
    """What `check_tiles` can be asked of tiles of these widths and at most so many rows, for hypothesis."""
    return {
        "rows": st.integers(1, rows),
        "widths": st.lists(st.sampled_from(widths), min_size=1, max_size=3),
        "offset": st.integers(0, 17),
        "padding": st.integers(0, 15),
        "out_offset": st.one_of(st.none(), st.integers(0, 8)),
        "dtype": st.sampled_from(DTYPES),
        "transform": st.sampled_from(TRANSFORMS),
        "with_bias": st.booleans(),
        "masked": st.sampled_from([0.0, 0.4]),
        "extra": st.booleans(),
        "scale": st.sampled_from([0.1, 1.0, 30.0]),
        "seed": st.integers(0, 10**6),
    }


def random_tile(rows, columns, dtype, device, *, offset=0, padding=0, scale=1.0, seed=0):
    """Logits and the tensor of NaN around them."""
    generator = torch.Generator().manual_seed(seed)
    around = torch.full((rows, offset + columns + padding), math.nan, dtype=dtype, device=device)
    logits = around[:, offset : offset + columns]
    logits.copy_(torch.randn(rows, columns, generator=generator) * scale)
    return logits, around


def fold_statistics(fold, logits, target, transform, bias, widths, *, entropy=False):
    """Statistics of tiles of these widths, the last one first."""
    statistics = Statistics.start(len(target), logits.device, entropy=entropy)
    edges = list(itertools.accumulate(widths, initial=0))
    for first, last in reversed(list(itertools.pairwise(edges))):
        part = None if bias is None else bias[first:last]
        fold.fold_statistics(Tile(logits[:, first:last], target, transform, first, part), statistics)
    return statistics


def fold_gradient(fold, logits, target, lse, coefficient, transform, bias, widths, out, lse_coefficient=None):
    """The gradient of all tiles: into `out`, or in place."""
    edges = list(itertools.accumulate(widths, initial=0))
    for first, last in itertools.pairwise(edges):
        part = None if bias is None else bias[first:last]
        tile = Tile(logits[:, first:last], target, transform, first, part)
        fold.fold_gradient(tile, lse, coefficient, tile.logits if out is None else out[:, first:last], lse_coefficient)
    return logits if out is None else out


def check_tiles(fold, device, *, rows, widths, offset, padding, dtype, transform, with_bias, seed, **options):
    """Statistics and gradient of ragged tiles, of which −inf masks some columns, with entropies and lse's gradient.

    `options`: out_offset (None: in place), scale, and where not the default, masked and extra.
    """
    columns, masked, extra = sum(widths), options.get("masked", 0.0), options.get("extra", False)
    logits, around = random_tile(
        rows, columns, dtype, device, offset=offset, padding=padding, scale=options["scale"], seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, columns, (rows,), generator=generator).to(device)
    coefficient, lse_coefficient = torch.randn(2, rows, generator=generator, dtype=torch.float64).to(device)
    coefficient[seed % 7 :: 7] = 0
    lse_coefficient = lse_coefficient if extra else None
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(columns, generator=generator).to(device, work) if with_bias else None
    is_masked = (torch.rand(columns, generator=generator).to(device) < masked).index_fill(0, target, False)
    (logits if bias is None else bias)[..., is_masked] = -math.inf
    added = torch.zeros_like(coefficient) if lse_coefficient is None else lse_coefficient
    lse, at_target, p, gradient = exact_fold(logits, target, coefficient, transform, bias, added)

    # Arithmetic of a handful of roundings on values of the size of z; p feels the rounding of z absolutely.
    largest = (at_target.abs().max() + lse.abs().max() + 1).item()
    rounding = ULP[work] * 4 * largest * max(1, transform.inner * transform.outer)
    statistics = fold_statistics(fold, logits, target, transform, bias, widths, entropy=extra)
    torch.testing.assert_close(statistics.lse, lse, rtol=0, atol=rounding)
    torch.testing.assert_close(statistics.chosen, at_target, rtol=0, atol=rounding)
    if extra:
        torch.testing.assert_close(statistics.entropy, torch.special.entr(p).sum(-1), rtol=ULP[work] * 8, atol=rounding)
        largest_z = (p == p.amax(1, keepdim=True)).gather(1, target[:, None])[:, 0]
        assert (statistics.hit | ~largest_z).all()
        assert (at_target - statistics.maximum >= -rounding)[statistics.hit].all()

    before, out_around, out_offset = logits.clone(), around, options["out_offset"]
    out = None
    if out_offset is not None:
        out_around = torch.full((rows, out_offset + columns + 1), math.nan, dtype=dtype, device=device)
        out = out_around[:, out_offset : out_offset + columns]
    result = fold_gradient(
        fold, logits, target, lse, coefficient, transform, bias, widths, out, lse_coefficient=lse_coefficient
    )
    slope = (coefficient.abs() + added.abs())[:, None] * transform.inner * transform.outer
    bound = slope * (p + 1e-30) * rounding * 2 + gradient.abs() * ULP[dtype]
    bound += slope * rounding * (gradient != 0)
    bound += torch.finfo(dtype).tiny * 2  # results below the smallest normal number
    assert ((result.double() - gradient).abs() <= bound).all()
    result.fill_(math.nan)
    assert out_around.isnan().all()
    assert out is None or torch.equal(logits, before)


def check_accuracy(fold, device, logits, *, relative=2e-6, gradient_relative=2e-5):
    """lse, entropy and gradient of plain logits within what is promised for float32; entropies change no other bit."""
    rows, columns = logits.shape
    target = torch.arange(1, rows + 1, device=device) * 7919 % columns
    coefficient = torch.ones(rows, dtype=torch.float64, device=device)
    lse, _, p, gradient = exact_fold(logits, target, coefficient, TRANSFORMS[0], None)
    statistics = fold_statistics(fold, logits, target, TRANSFORMS[0], None, [columns])
    assert ((statistics.lse - lse).abs() / lse.abs()).max() <= relative
    with_entropy = fold_statistics(fold, logits, target, TRANSFORMS[0], None, [columns], entropy=True)
    assert all(torch.equal(x, y) for x, y in zip(statistics[:3], with_entropy[:3], strict=True))
    entropy = torch.special.entr(p).sum(-1)
    assert ((with_entropy.entropy - entropy).norm() / entropy.norm()) <= relative
    out = torch.full_like(logits, math.nan)
    fold.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, coefficient, out)
    assert ((out.double() - gradient).norm(dim=1) / gradient.norm(dim=1)).max() <= gradient_relative
    fold.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, 0 * coefficient, out, 2 * coefficient)
    assert ((out.double() - 2 * p).norm(dim=1) / (2 * p).norm(dim=1)).max() <= gradient_relative


def check_special_logits(fold, device):
    """−inf logits have probability 0, also in whole tiles and before the first finite one; 1e30 does not overflow."""
    logits = torch.full((4, 40), -math.inf)
    logits[0, 35] = 1.0
    logits[1, :] = torch.randn(40)
    logits[1, 2] = 4.0  # a new maximum in the tile that comes last
    logits[2, 5], logits[2, 30] = 1e30, -1e30
    logits[3, 2:4] = -12345.25
    target = torch.tensor([35, 3, 5, 2])
    p = logits.double().softmax(-1)
    expected = torch.tensor([0.0, p[1, 3].log(), 0.0, math.log(0.5)], dtype=torch.float64)
    onehot = torch.zeros_like(p).scatter(1, target[:, None], 1.0)

    logits, target = logits.to(device), target.to(device)
    widths = [16, 16, 8]
    statistics = fold_statistics(fold, logits, target, TRANSFORMS[0], None, widths, entropy=True)
    torch.testing.assert_close(statistics.logp.cpu(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(statistics.entropy.cpu(), torch.special.entr(p).sum(-1), atol=1e-5, rtol=0)
    assert statistics.hit.tolist() == [True, bool(p[1, 3] == p[1].max()), True, True]  # ties are hits
    ones = torch.ones(4, dtype=torch.float64, device=device)
    options = [TRANSFORMS[0], None, widths, torch.empty_like(logits)]
    result = fold_gradient(fold, logits, target, statistics.lse, 0 * ones, *options, lse_coefficient=ones)
    torch.testing.assert_close(result.double().cpu(), p, atol=1e-6, rtol=0)
    result = fold_gradient(fold, logits, target, statistics.lse, ones, TRANSFORMS[0], None, widths, None)
    torch.testing.assert_close(result.double().cpu(), onehot - p, atol=1e-6, rtol=0)


def check_masked_tokens(fold, device):
    """−inf in the logits or in the bias: probability 0 and no gradient, whatever the transform; at a target too."""
    free, target = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 7, 20])
    is_masked = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([*range(16), 18, 38, 39]), True)
    masking = torch.zeros(40).masked_fill(is_masked, -math.inf)
    coefficient = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, device=device)
    for transform, by_bias in itertools.product(TRANSFORMS, (False, True)):
        logits = (free if by_bias else free + masking).to(device)
        bias = masking.to(device) if by_bias else None
        statistics = fold_statistics(fold, logits, target.to(device), transform, bias, [16, 24], entropy=True)
        z = exact_fold(free[:, ~is_masked], target * 0, coefficient.cpu(), transform)[0]
        torch.testing.assert_close(statistics.lse.cpu(), z, atol=1e-6, rtol=1e-6)
        assert statistics.chosen.tolist()[:2] == [-math.inf] * 2
        assert statistics.entropy.isfinite().all()
        lse, _, p, expected = exact_fold(free + masking, target, coefficient.cpu(), transform)
        assert (p[:, is_masked] == 0).all()
        result = fold_gradient(
            fold, logits, target.to(device), lse.to(device), coefficient, transform, bias, [16, 24], None
        )
        torch.testing.assert_close(result.double().cpu(), expected, atol=1e-6, rtol=1e-6)
        assert ((result[:, is_masked] == 0).cpu() == (expected[:, is_masked] == 0)).all()
        assert not transform.softcap or (result[:, is_masked] == 0).all()


def check_bad_logits(fold, device, bad, column, columns):
    """NaN and +inf reach logp wherever they stand: a softcap does not hide them."""
    logits = torch.full((1, columns), -math.inf, device=device)
    logits[0, column] = bad
    for transform in TRANSFORMS:
        statistics = fold_statistics(fold, logits, torch.tensor([3], device=device), transform, None, [columns])
        assert statistics.logp.isnan().all()


def check_rows_that_do_not_count(fold, device, columns, dtype):
    """Negative targets: statistics stay; coefficient 0: zeros, whatever stood there."""
    logits = torch.full((3, columns), math.nan, dtype=dtype, device=device)
    target = torch.tensor([-1, -100, -1], device=device)
    statistics = fold_statistics(fold, logits, target, TRANSFORMS[0], None, [columns], entropy=True)
    fresh = Statistics.start(3, torch.device(device), entropy=True)
    assert all(torch.equal(x, y) for x, y in zip(statistics, fresh, strict=True))
    nothing = torch.zeros(3, dtype=torch.float64, device=device)
    for lse_coefficient in (None, nothing):
        out = torch.full_like(logits, math.nan)
        fold.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, nothing, out, lse_coefficient)
        assert (out == 0).all()


def check_long_rows_of_one_block(fold, device, columns):
    """So many rows that each has one block, which takes several steps: the few that count, and zeros in the others."""
    rows, counted = 4096, [0, 1, 2048, 4095]
    logits = torch.full((rows, columns), math.nan, dtype=torch.bfloat16, device=device)
    logits[counted] = (torch.randn(len(counted), columns) * 3).to(device, torch.bfloat16)
    target = torch.full((rows,), -1, device=device)
    target[counted] = torch.tensor([0, columns - 1, columns // 2, 5], device=device)
    coefficient = torch.zeros(rows, dtype=torch.float64, device=device)
    coefficient[counted] = 2.0
    exact = exact_fold(logits[counted], target[counted], coefficient[counted], TRANSFORMS[0], None)

    for entropy in (False, True):
        statistics = fold_statistics(fold, logits, target, TRANSFORMS[0], None, [columns], entropy=entropy)
        torch.testing.assert_close(statistics.lse[counted], exact[0], rtol=2e-6, atol=0)
        torch.testing.assert_close(statistics.chosen[counted], exact[1], rtol=0, atol=0)
    expected = torch.special.entr(exact[2]).sum(-1)
    torch.testing.assert_close(statistics.entropy[counted], expected, rtol=2e-6, atol=0)
    fold.fold_gradient(Tile(logits, target, TRANSFORMS[0]), statistics.lse, coefficient, logits)
    error = (logits[counted].double() - exact[3]).abs()
    assert (error <= exact[3].abs() * 2**-7 + 1e-30).all()
    logits[counted] = 0
    assert (logits == 0).all()
