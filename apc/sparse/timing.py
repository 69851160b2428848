"""Times work: a GPU's inside a CUDA graph, the CPU's by the clock."""

import contextlib
import time
from collections.abc import Callable

import torch


def graph_time(call: Callable[[], object], repeats: int = 10, flush_cache: bool = True) -> float:
    """The shortest GPU time in ms of `call` in a CUDA graph; flush_cache overwrites the L2 cache before each repeat."""
    current = torch.cuda.current_stream()
    if current == torch.cuda.default_stream():  # it can't be captured
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            best = graph_time(call, repeats, flush_cache)
        current.wait_stream(stream)
        return best
    call()
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size if flush_cache else 0
    flushed = torch.empty(cache_bytes, dtype=torch.uint8, device="cuda")
    times = [[torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for before, after in times:
            flushed.zero_()
            before.record()
            call()
            after.record()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # ending a broken capture raises too, which would hide the cause
            graph.capture_end()
        raise
    graph.capture_end()
    for _ in range(2):  # the first replay is slower
        graph.replay()
    torch.cuda.synchronize()
    return min(before.elapsed_time(after) for before, after in times)


def host_time(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest time in ms of `call` on the CPU, after a first call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)
