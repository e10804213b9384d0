"""What a function allocates, as torch's CPU allocator reports it: operators written in Python included."""

from torch.profiler import ProfilerActivity, profile


def measure(function):
    """(peak of bytes alive above the start, largest single allocation) of one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, max((e.nbytes() for e in events), default=0)
