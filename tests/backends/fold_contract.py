"""Checks of the fold contract that hold for any implementation on any device: the kernels under emulation, and a GPU's.

A tile is a part of a wider tensor of NaN, at any column, so that its rows begin at any alignment; outputs hold NaN
before they are written. Float64 torch is the truth.
"""

import itertools
import math

import torch
from fold_truth import DTYPES, TRANSFORMS, ULP, dense, exact_fold
from hypothesis import strategies as st

from mopo_kernels.backends.fold import GRID, Samples, Statistics, Tile


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


def sampled_strategies(**sizes):
    """What `check_samples` can be asked of."""
    strategies = tile_strategies(**sizes)
    return {name: strategies[name] for name in strategies if name not in ("out_offset", "extra")}


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


# ----------------------------------------------------------------------------------------------------------- sampling


def on_grid(uniform):
    return (uniform / GRID).floor() * GRID


def fold_sample(fold, logits, target, lse, uniform, floor, transform, bias, widths):
    """Samples of tiles of these widths, the first one first, and the running sums after them."""
    columns, work = sum(widths), torch.float64 if logits.dtype == torch.float64 else torch.float32
    samples = Samples.start(len(target), columns, floor, work, logits.device)
    running = uniform.clone()
    edges = list(itertools.accumulate(widths, initial=0))
    for first, last in itertools.pairwise(edges):
        part = None if bias is None else bias[first:last]
        fold.fold_sample(Tile(logits[:, first:last], target, transform, first, part), lse, running, floor, samples)
    return samples, running


def check_samples(fold, device, *, rows, widths, offset, padding, dtype, transform, with_bias, masked, scale, seed):
    """Entries of ragged tiles: those of the contract but for the rounding of p, the same bits for any other tiles."""
    columns = sum(widths)
    logits, _ = random_tile(rows, columns, dtype, device, offset=offset, padding=padding, scale=scale, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, columns, (rows,), generator=generator).to(device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(columns, generator=generator).to(device, work) if with_bias else None
    is_masked = (torch.rand(columns, generator=generator).to(device) < masked).index_fill(0, target, False)
    (logits if bias is None else bias)[..., is_masked] = -math.inf
    target[seed % 5 :: 5] = -1
    floor = [0.9, 0.25, 2.0**-6, 0.01, 1e-4][seed % 5]
    uniform = on_grid(torch.rand(rows, generator=generator, dtype=torch.float64)).to(device)
    uniform[0], uniform[1:2] = [(0, 1 - GRID), (1 - GRID, 0.5), (0.5, 0)][seed % 3]
    ones = torch.ones(rows, dtype=torch.float64, device=device)
    lse, _, p, slope = exact_fold(logits, target.clamp(min=0), 0 * ones, transform, bias, ones)
    slope = torch.where(p > 0, slope / p, 0).cpu()

    samples, running = fold_sample(fold, logits, target, lse, uniform, floor, transform, bias, widths)
    values, has_entry = dense(samples, columns)
    counts, p, uniform = target.cpu() >= 0, p.cpu(), uniform.cpu()
    assert (samples.counts.cpu()[~counts] == 0).all()
    at_target = torch.zeros_like(has_entry).scatter(1, target.cpu().clamp(min=0)[:, None], True)
    assert has_entry[at_target][counts].all()

    largest = lse.abs().max().item() + scale * 5 + 1
    rounding = ULP[work] * 16 * largest * max(1, transform.inner * transform.outer) + 1e-6 * (work == torch.float32)
    is_exact, is_close = p >= floor, ((p / floor - 1).abs() < rounding * 4)
    before = uniform[:, None] + torch.where(is_exact, 0, p / floor).cumsum(1)
    after, before = before, torch.cat([uniform[:, None], before[:, :-1]], 1)
    slack = rounding * (1 + after) + columns * GRID
    must = ((after - slack).floor() > (before + slack).floor()) | (is_exact & ~is_close)
    may = ((after + slack).floor() > (before - slack).floor()) | is_exact | is_close | at_target
    assert (has_entry | ~must)[counts].all()
    assert (may | ~has_entry)[counts].all()
    assert not has_entry[:, is_masked.cpu() & ~at_target.any(0)].any()
    q = torch.where(is_exact, p, floor) * has_entry
    bound = q * slope * rounding * 8 + q * transform.softcap * transform.inner * transform.outer * ULP[work] * 16
    is_empty = at_target & ~must & (values == 0)
    assert (((values - q * slope).abs() <= bound) | is_empty)[counts].all()
    total = torch.where(is_exact, 0, p / floor).sum(1) + is_exact.sum(1)
    ended = running.cpu() - uniform + is_exact.sum(1)
    assert ((ended - total - (ended - total).round()).abs() <= slack[:, -1])[counts].all()
    assert (running.cpu() == uniform)[~counts].all()
    assert (samples.counts.cpu() <= math.ceil(1 / floor) + 2).all()

    whole = fold_sample(fold, logits, target, lse, uniform.to(device), floor, transform, bias, [columns])
    assert all(torch.equal(x, y) for x, y in zip((*samples, running), (*whole[0], whole[1]), strict=True))


def check_sampling_is_unbiased(fold, device, dtype, transform, floor=2.0**-5, draws=512, columns=300):
    """The mean over evenly spaced `uniform` is p within floor / draws: a mean of so many random ones is no sharper."""
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(columns, generator=generator, dtype=torch.float64) * 2
    row[[5, 17]] = torch.tensor([9.0, -math.inf], dtype=torch.float64)
    logits = row.to(device, dtype).repeat(draws, 1)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    bias = torch.randn(columns, generator=generator).to(device, work)
    uniform = on_grid((torch.arange(draws, dtype=torch.float64, device=device) + 0.5) / draws)
    target = torch.full((draws,), 7, device=device)
    ones = torch.ones(draws, dtype=torch.float64, device=device)
    lse, _, p, expected = exact_fold(logits, target, ones * 0, transform, bias, ones)
    samples, _ = fold_sample(fold, logits, target, lse, uniform, floor, transform, bias, [128, columns - 128])
    values, _ = dense(samples, columns)
    slope = (expected[0] / p[0]).nan_to_num(0).cpu()
    error = values.mean(0) - expected[0].cpu()
    rounding = 1e-5 if work == torch.float32 else 1e-12
    assert (error.abs() <= slope.abs() * (floor / draws + rounding * p[0].cpu())).all()
    q = torch.where(slope != 0, values / slope, 0)
    is_small = (p[0] < floor * 0.99).cpu()
    assert ((q.sum(1) - 1).abs() <= floor * (1 + rounding * 100)).all() or transform.softcap
    assert ((q[:, is_small] == 0) | ((q[:, is_small] / floor - 1).abs() < 1e-2)).all()


def check_extreme_samples(fold, device):
    """`uniform` at both ends, all mass in one token, ties everywhere, a floor below every p, a target nobody draws."""
    columns, floor = 64, 2.0**-4
    logits = torch.zeros(4, columns, device=device)  # p = 1/64 = floor / 4
    logits[2], logits[3] = -math.inf, -200.0
    logits[2, 40] = logits[3, 40] = 0.0
    target = torch.tensor([3, 3, 40, 41], device=device)
    lse = torch.tensor([math.log(64.0)] * 2 + [0.0] * 2, dtype=torch.float64, device=device)
    near = 2.0**-10  # p is 1/64 but for its rounding
    uniform = torch.tensor([near, 1 - near, 0.0, 1 - GRID], dtype=torch.float64, device=device)
    samples, running = fold_sample(fold, logits, target, lse, uniform, floor, TRANSFORMS[0], None, [50, 14])
    values, has_entry = dense(samples, columns)
    step = torch.tensor([floor], dtype=torch.float64)
    every_fourth = torch.arange(columns) % 4
    assert torch.allclose(values[0], step * (every_fourth == 3), rtol=1e-5, atol=0)
    assert torch.allclose(values[1], step * (every_fourth == 0), rtol=1e-5, atol=0)
    assert has_entry[2:].nonzero()[:, 1].tolist() == [40, 40, 41]
    assert values[2:, 40].tolist() == [1.0, 1.0]
    assert values[3, 41] == 0
    assert running[2:].tolist() == uniform[2:].tolist()

    far = torch.full((1, 3000), -200.0, device=device).index_fill(1, torch.tensor([5], device=device), 0.0)
    arguments = torch.tensor([2900], device=device), lse[2:3], uniform[2:3], floor, TRANSFORMS[0], None, [3000]
    assert dense(fold_sample(fold, far, *arguments)[0], 3000)[1][0].nonzero().tolist() == [[5], [2900]]

    equal, half = torch.zeros(1, 4, dtype=torch.float64, device=device), uniform[:1] * 0 + 0.5
    elsewhere = target[:1] * 0 + 4  # nothing but the size of an entry makes it one
    arguments = equal, elsewhere, half + math.log(4) - 0.5, half
    p = dense(fold_sample(fold, *arguments, 1e-3, TRANSFORMS[0], None, [4])[0], 4)[0]
    samples, running = fold_sample(fold, *arguments, p[0, 0].item(), TRANSFORMS[0], None, [4])
    assert torch.equal(dense(samples, 4)[0], p)  # what equals the floor is exact
    assert torch.equal(running, half)

    logits = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).to(device)
    zeros = torch.zeros(3, dtype=torch.float64, device=device)
    lse, _, p, _ = exact_fold(logits, target[:3], zeros, TRANSFORMS[0])
    samples, _ = fold_sample(fold, logits, target[:3], lse, zeros, 1e-7, TRANSFORMS[0], None, [columns])
    torch.testing.assert_close(dense(samples, columns)[0], p.cpu(), rtol=1e-5, atol=0)


def check_sample_products(fold, device, dtype, *, rows=9, vocab=70, width=37, capacity=13):
    """Gathers and scatters against dense products: columns that many rows share and some that none has, empty rows."""
    generator = torch.Generator().manual_seed(1)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    counts = torch.randint(0, capacity + 1, (rows,), generator=generator)
    counts[[2, 4]] = torch.tensor([0, capacity])
    within = torch.arange(capacity) < counts[:, None]
    columns = torch.stack([torch.randperm(vocab // 2, generator=generator)[:capacity].sort()[0] for _ in range(rows)])
    columns[:, 0] = 0
    values = torch.randn(rows, capacity, generator=generator, dtype=work)
    samples = Samples(*(x.to(device) for x in (columns.where(within, -1).int(), values.where(within, 0), counts.int())))
    matrix = torch.zeros(rows, vocab, dtype=torch.float64)
    matrix.index_put_((within.nonzero()[:, 0], columns[within]), values[within].double(), accumulate=True)
    products = (fold.sample_hidden, vocab, matrix), (fold.sample_weight, rows, matrix.T)
    for (product, size, left), out_dtype in itertools.product(products, {dtype, work}):
        right = torch.randn(size, width + 5, generator=generator).to(device, dtype)[:, 2 : 2 + width]
        out = torch.full((len(left), width + 3), math.nan, dtype=out_dtype, device=device)
        product(samples, right, out[:, :width])
        expected = left @ right.double().cpu()
        bound = left.abs() @ right.double().cpu().abs() * ULP[work] * 8 + expected.abs() * ULP[out_dtype]
        bound += torch.finfo(out_dtype).tiny * ULP[out_dtype]  # results below the smallest normal number
        assert ((out[:, :width].cpu().double() - expected).abs() <= bound).all()
        assert out[:, width:].isnan().all()
