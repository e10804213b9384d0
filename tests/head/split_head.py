"""What every rank of a pair does in test_ranks.py: calls with a split head, each beside the same call with a whole one.

Every check returns pairs (split, whole) of numbers that must be the same, or the text of an error.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from mopo_kernels import linear_logprob, mopo_loss, sequence_logprob, win_rate_from_pairs

N, H, V = 23, 16, 301
CALLS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "more outputs": {"return_lse": True, "return_entropy": True, "return_hit": True},
    "transform": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.5},
    "recompute": {"workspace_bytes": 20_000},
    "streamed sum": {"workspace_bytes": 20_000, "reduction": "sum"},
    "more outputs, streamed": {"workspace_bytes": 20_000, "return_lse": True, "return_entropy": True},
}
SIZES = {"uneven": (200, 101), "almost all": (300, 1), "none": (301, 0)}
STEPS = ("clone", "contrast", "regress")


def numbers(dtype=torch.float32, *, masked=False):
    """hidden, weight, bias, target and an upstream gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((N, H), (V, H), (V,)))
    if masked:
        bias[250:] = -torch.inf
    target = torch.randint(0, 250, (N,), generator=generator)
    target[:7:3] = -100
    return hidden, weight, bias, target, torch.randn(N, generator=generator)


def columns(sizes, rank):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def outputs_and_gradients(hidden, weight, bias, target, upstream, **options):
    """What linear_logprob returns, and the gradients of a loss of it."""
    inputs = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    found = linear_logprob(*inputs[:2], target, bias=inputs[2], **options)
    logp, *others = found if isinstance(found, tuple) else (found,)
    loss = (logp * (upstream if logp.ndim else 1)).sum() + sum(x.square().sum() for x in others[:1])
    loss.backward()
    return [x.detach() for x in (logp, *others)], [x.grad for x in inputs]


def plain(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).double().tolist()


def pairs(split, whole):
    return [(plain(a), plain(b)) for a, b in zip(split, whole, strict=True)]


def same_rows(rank, name, sizes, dtype=torch.float32, *, masked=False):
    *inputs, target, upstream = numbers(dtype, masked=masked)
    values, (grad_hidden, *others) = outputs_and_gradients(*inputs, target, upstream, **CALLS[name])
    mine = columns(sizes, rank)
    split = [inputs[0], *(x[mine] for x in inputs[1:])]
    options = {**CALLS[name], "vocab_group": dist.group.WORLD}
    found, gradients = outputs_and_gradients(*split, target, upstream, **options)
    return pairs(found, values), pairs(gradients, [grad_hidden, *(x[mine] for x in others)])


def own_rows(rank, name, sizes, counts):
    """The first rank has the first rows; gradients of the head are the mean of both ranks'."""
    *inputs, target, upstream = numbers()
    values, (grad_hidden, *others) = outputs_and_gradients(*inputs, target, upstream, **CALLS[name])
    mine, rows = columns(sizes, rank), columns(counts, rank)
    split = [inputs[0][rows], *(x[mine] for x in inputs[1:])]
    options = {**CALLS[name], "vocab_group": dist.group.WORLD, "rows": "own"}
    found, gradients = outputs_and_gradients(*split, target[rows], upstream[rows], **options)
    expected = [grad_hidden[rows], *(x[mine] / 2 for x in others)]
    return pairs(found, [x[rows] for x in values]), pairs(gradients, expected)


def dtensor(rank, placement, rows, mesh_shape=(2,)):
    """A head as FSDP2 holds it."""
    *inputs, target, upstream = numbers()
    if rows == "own":
        mine = columns((14, 9), rank)
        hidden, target, upstream = inputs[0][mine], target[mine], upstream[mine]
    else:
        mine, hidden = slice(None), inputs[0]
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Replicate()] * (mesh.ndim - 1) + [placement]
    head = [distribute_tensor(x, mesh, placements) for x in inputs[1:]]
    found, gradients = outputs_and_gradients(hidden, *head, target, upstream, rows=rows)
    assert all(x.placements == tuple(placements) for x in gradients[1:])
    *inputs, target, upstream = numbers()
    values, (grad_hidden, *others) = outputs_and_gradients(*inputs, target, upstream)
    share = 1 if rows == "same" else 2
    return pairs(found, [x[mine] for x in values]), pairs(gradients, [grad_hidden[mine], *(x / share for x in others)])


def frozen(rank, sizes):
    """A head that does not train: the gradient of hidden is formed in the forward."""
    hidden, weight, _, target, upstream = numbers()
    results = []
    for head, options in ((weight, {}), (weight[columns(sizes, rank)], {"vocab_group": dist.group.WORLD})):
        mine = hidden.clone().requires_grad_()
        logp = linear_logprob(mine, head, target, **options)
        (logp * upstream).sum().backward()
        results.append([logp.detach(), mine.grad])
    return pairs(*results), []


def cancelling(rank):
    """Errors of grad_hidden where the rows of a 16-bit weight have a common part, which cancels.

    Of the split head's gradient and the whole one's against float64's; of the split head's sampled gradient against the
    whole one's, whose entries are the same.
    """
    generator = torch.Generator().manual_seed(0)
    common, noise, hidden = (torch.randn(shape, generator=generator) for shape in ((H,), (V, H), (N, H)))
    weight, hidden = (3 * common + 0.1 * noise).bfloat16(), (0.3 * hidden).bfloat16()
    target = torch.randint(0, 200, (N,), generator=generator)

    def gradient(head, dtype, **options):
        torch.manual_seed(1)
        mine = hidden.to(dtype, copy=True).requires_grad_()
        linear_logprob(mine, head.to(dtype), target, **options).sum().backward()
        return mine.grad.double()

    def split_and_whole(**options):
        shard = weight[columns(SIZES["uneven"], rank)]
        split = gradient(shard, torch.bfloat16, vocab_group=dist.group.WORLD, **options)
        return split, gradient(weight, torch.bfloat16, **options)

    def error(x, truth):
        return ((x - truth).norm() / truth.norm()).item()

    truth = gradient(weight, torch.float64, backend="reference")
    return [error(x, truth) for x in split_and_whole()], error(*split_and_whole(grad_sampling=0.02))


def sampled(rank, sizes, rows="same", **options):
    """The entries drawn of a split head are those of the whole one: the first rank's random numbers, one sum."""
    *inputs, target, upstream = numbers()
    torch.manual_seed(1)
    values, (grad_hidden, *others) = outputs_and_gradients(*inputs, target, upstream, grad_sampling=0.02, **options)
    mine, chosen = columns(sizes, rank), slice(None) if rows == "same" else columns((N, 0), rank)
    split = [inputs[0][chosen], *(x[mine] for x in inputs[1:])]
    torch.manual_seed(1 + rank)
    options = {**options, "grad_sampling": 0.02, "vocab_group": dist.group.WORLD, "rows": rows}
    found, gradients = outputs_and_gradients(*split, target[chosen], upstream[chosen], **options)
    share = 1 if rows == "same" else 2
    return pairs(found, [x[chosen] for x in values]), pairs(
        gradients, [grad_hidden[chosen], *(x[mine] / share for x in others)]
    )


def loss_of(rank, policy_step, rows):
    """mopo_loss and sequence_logprob: four groups of two on every rank, or two on each."""
    hidden, weight, bias, _, _ = numbers()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 6, H, generator=generator)
    target = torch.randint(0, V, (8, 6), generator=generator)
    target[0] = target[5, :3] = -100
    win_rate = win_rate_from_pairs(torch.rand(4, 2, generator=generator))
    group, ref_logp = torch.arange(4).repeat(2), -torch.arange(8.0)
    multipliers = torch.tensor([1.0, 0.5])

    def run(chosen, head, bias, **options):
        inputs = [x.clone().requires_grad_() for x in (hidden[chosen], head, bias)]
        labels = {"tau": 0.3, "eps": 0.01, "policy_step": policy_step, "ref_logp": ref_logp[chosen]}
        arguments = inputs[0], inputs[1], target[chosen], win_rate[chosen], group[chosen], multipliers
        output = mopo_loss(*arguments, bias=inputs[2], average=True, **labels, **options)
        logp = sequence_logprob(inputs[0], inputs[1], target[chosen], bias=inputs[2], **options)
        (output.loss + 0.01 * logp.sum()).backward()
        values = [getattr(output, f.name) for f in dataclasses.fields(output)]
        return [torch.nan_to_num(x.detach(), nan=-7.0) for x in (*values, logp)], [x.grad for x in inputs]

    shard = columns((200, 101), rank)
    split = {"vocab_group": dist.group.WORLD, "rows": rows}
    everything = torch.arange(8)
    if rows == "same":
        values, gradients = run(everything, weight, bias)
        found, of_split = run(everything, weight[shard], bias[shard], **split)
        return pairs(found, values), pairs(of_split, [gradients[0], gradients[1][shard], gradients[2][shard]])
    chosen = everything[group // 2 == rank]
    values, gradients = run(chosen, weight, bias)
    for x in gradients[1:]:
        dist.all_reduce(x)
    found, of_split = run(chosen, weight[shard], bias[shard], **split)
    return pairs(found, values), pairs(of_split, [gradients[0], *(x[shard] / 2 for x in gradients[1:])])


def compiled(rank):
    """torch.compile breaks the graph where the ranks speak, and computes the same; a full graph says what breaks it."""
    hidden, weight, _, target, _ = numbers()
    shard = weight[columns((200, 101), rank)].clone().requires_grad_()

    def loss(hidden):
        return linear_logprob(torch.tanh(hidden), shard, target, vocab_group=dist.group.WORLD).sum()

    torch.compile(loss, backend="eager")(hidden).backward()
    gradient, shard.grad = shard.grad, None
    whole = loss(hidden)
    whole.backward()
    torch._dynamo.reset()
    refused = error_of(lambda: torch.compile(loss, backend="eager", fullgraph=True)(hidden))
    return [(plain(gradient), plain(shard.grad))], refused


# -------------------------------------------------------------------------------------------------------------- errors


def error_of(call):
    try:
        call()
    except Exception as error:
        return str(error)
    return None


def errors(rank):
    hidden, weight, _, target, _ = numbers()
    shard, group = weight[columns((200, 101), rank)], dist.group.WORLD
    mesh = init_device_mesh("cpu", (2,))
    nan = shard.clone()
    nan[0, 0] = torch.nan if rank == 1 else nan[0, 0]
    far = target.clone()
    far[-1] = V if rank == 1 else far[-1]
    labels = torch.tensor([[0.2 + rank], [0.8 - rank]]).clamp(0, 1), torch.zeros(2, dtype=torch.int64), torch.ones(1)
    sequences = hidden[:22].unflatten(0, (2, 11)), shard, target[:22].view(2, 11)
    split = {"vocab_group": group}

    def trained(x):
        return x.clone().requires_grad_(rank == 0)

    return {
        "rows": error_of(lambda: linear_logprob(hidden[rank:], shard, target[rank:], **split)),
        "hidden": error_of(lambda: linear_logprob(hidden + rank, shard, target, **split)),
        "labels": error_of(lambda: mopo_loss(*sequences, *labels, tau=0.3, **split)),
        "options": error_of(lambda: linear_logprob(hidden, shard, target, temperature=1.0 + rank, **split)),
        "gradients": error_of(lambda: linear_logprob(hidden, trained(shard), target, **split)),
        "target": error_of(lambda: linear_logprob(hidden[rank:], shard, far[rank:], rows="own", **split)),
        "nan": error_of(lambda: linear_logprob(hidden, nan, target, **split)),
        "reference": error_of(lambda: linear_logprob(hidden, shard, target, backend="reference", **split)),
        "layout": error_of(lambda: linear_logprob(hidden, distribute_tensor(weight, mesh, [Shard(1)]), target)),
        "mesh": error_of(
            lambda: linear_logprob(
                hidden, distribute_tensor(weight, init_device_mesh("cpu", (1, 2)), [Replicate(), Shard(0)]), target
            )
        ),
        "both": error_of(lambda: linear_logprob(hidden, distribute_tensor(weight, mesh, [Shard(0)]), target, **split)),
        "hidden dtensor": error_of(
            lambda: linear_logprob(distribute_tensor(hidden, mesh, [Replicate()]), shard, target, **split)
        ),
        "replicas": error_of(
            lambda: linear_logprob(hidden + rank, distribute_tensor(weight, mesh, [Replicate()]), target)
        ),
    }


# --------------------------------------------------------------------------------------------------------------- bytes


def sent(call):
    """Bytes that this rank hands to its group in a call, by the size of what each collective takes."""
    sizes, gather, reduce = [], dist.all_gather, dist.all_reduce

    def count(function, position):
        def counted(*arguments, **options):
            sizes.append(arguments[position].numel() * arguments[position].element_size())
            return function(*arguments, **options)

        return counted

    dist.all_gather, dist.all_reduce = count(gather, 1), count(reduce, 0)
    try:
        call()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    return sizes


def bytes_sent(rank):
    """In a forward, in its backward; and where every rank has its own rows."""
    hidden, weight, _, target, _ = numbers()
    shard, own = weight[columns((200, 101), rank)].clone().requires_grad_(), columns((14, 9), rank)
    hidden = hidden.clone().requires_grad_()
    results = {}
    for name, rows, options in (
        ("same", slice(None), {}),
        ("entropy", slice(None), {"return_entropy": True}),
        ("own", own, {"rows": "own"}),
    ):
        found = []

        def forward(rows=rows, options=options, found=found):
            split = {"vocab_group": dist.group.WORLD, **options}
            logp = linear_logprob(hidden[rows], shard, target[rows], **split)
            found.append(logp[0] if isinstance(logp, tuple) else logp)

        results[name] = sent(forward), sent(lambda found=found: found[0].sum().backward())
    return results


# ----------------------------------------------------------------------------------------------------------------- all


def checks():
    """{name: a function of the rank}."""
    found = {}
    for name in CALLS:
        found[f"same rows, {name}"] = lambda rank, name=name: same_rows(rank, name, SIZES["uneven"])
    for name, sizes in SIZES.items():
        found[f"same rows, {name} on the last"] = lambda rank, sizes=sizes: same_rows(rank, "more outputs", sizes)
    found["same rows, a part all masked"] = lambda rank: same_rows(rank, "more outputs", (250, 51), masked=True)
    found["same rows, float64"] = lambda rank: same_rows(rank, "plain", SIZES["uneven"], torch.float64)
    for name in ("plain", "more outputs", "recompute"):
        found[f"own rows, {name}"] = lambda rank, name=name: own_rows(rank, name, SIZES["uneven"], (14, 9))
    found["own rows, none on the last"] = lambda rank: own_rows(rank, "plain", SIZES["uneven"], (23, 0))
    found["own rows, none that counts on the first"] = lambda rank: own_rows(rank, "plain", SIZES["uneven"], (1, 22))
    for rows in ("same", "own"):
        for placement in (Shard(0), Replicate()):
            found[f"{placement}, {rows} rows"] = lambda rank, p=placement, rows=rows: dtensor(rank, p, rows)
        for step in STEPS:
            found[f"{step}, {rows} rows"] = lambda rank, step=step, rows=rows: loss_of(rank, step, rows)
    found["replicas of shards of one"] = lambda rank: dtensor(rank, Shard(0), "own", (2, 1))
    found["one replica of shards"] = lambda rank: dtensor(rank, Shard(0), "own", (1, 2))
    for name, sizes in SIZES.items():
        found[f"sampled, {name} on the last"] = lambda rank, sizes=sizes: sampled(rank, sizes)
    found["sampled, streamed"] = lambda rank: sampled(rank, SIZES["uneven"], workspace_bytes=20_000, softcap=5.0)
    found["frozen head"] = lambda rank: frozen(rank, SIZES["uneven"])
    return found


def run(rank):
    results = {name: check(rank) for name, check in checks().items()}
    found = {"compiled": compiled(rank), "bytes": bytes_sent(rank), "errors": errors(rank)}
    return {"checks": results, "cancelling": cancelling(rank), **found}
