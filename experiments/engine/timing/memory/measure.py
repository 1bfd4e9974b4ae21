"""The peak of memory on a CPU, as PyTorch's profiler hears it from the allocator."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def measure_peak(call: Callable[[], object]) -> int:
    """Return the most bytes that a call had at once, beside what was there before it.

    Libraries that allocate by themselves, such as oneDNN for its scratch memory, are not heard.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    assert profiler.profiler and profiler.profiler.kineto_results
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
