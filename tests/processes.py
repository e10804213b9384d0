"""Several processes over gloo for a test: `together(work, world)` is what each rank's `work(rank)` returns.

They are forked from a server that has imported torch once and done nothing else, so that a pair costs milliseconds.
"""

import multiprocessing
import traceback

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed.tensor", "mopo_kernels.loss", "mopo_trainer.training.trainer"]
)
PATIENCE = 120  # seconds


def _run(work, rank, world, store, queue, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        queue.put((rank, work(rank, *arguments), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def together(work, directory, *arguments, world=2):
    """Results by rank. `work` is a function of a module; what it returns is pickled, so plain numbers and lists."""
    queue = CONTEXT.SimpleQueue()
    store = directory / "store"
    processes = [
        CONTEXT.Process(target=_run, args=(work, rank, world, store, queue, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = dict.fromkeys(range(world))
    for _ in processes:
        rank, result, error = queue.get()
        assert error is None, error
        found[rank] = result
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return list(found.values())
