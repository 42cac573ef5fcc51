"""Which device and which process this is, and how several processes share the work."""

# Settings are checked before the heavy libraries are loaded, which takes seconds, and
# the checks ask this file. So a function imports the libraries that it needs.
import gc
import itertools
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from finetune.errors import RunError

if TYPE_CHECKING:
    import torch


# --------------------------------------------------------------------------- the device
def pick_device(device: str, dtype: str) -> tuple[str, str]:
    """Return the device, cuda, mps or cpu, and the name of the dtype of the frozen weights."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype != "auto":
        return device, dtype
    if device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return device, "bfloat16" if has_bfloat16 else "float16"

    # A CPU with AMX has matrix units for bfloat16.
    if device == "cpu" and torch.cpu._is_amx_tile_supported():
        return device, "bfloat16"
    return device, "float32"


def device_name(device: "torch.device") -> str:
    """Return the device in words."""
    import torch
    from accelerate import PartialState

    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU with {threads} thread{'s' if threads > 1 else ''}"
    elif device.type == "mps":
        name = "Apple GPU"
    else:
        name = torch.cuda.get_device_name(device)
    processes = PartialState().num_processes
    return name if processes == 1 else f"{processes} processes, each {name}"


# -------------------------------------------------------------------- several processes
def is_main_process() -> bool:
    """Return whether this process is the one that prints, writes and saves."""
    # A launcher of another program may have left a rank behind.
    return process_count() == 1 or os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return how many processes were launched, on all machines together."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def join_processes(device: str) -> "torch.device":
    """Wait for the other processes of a launch, if there are any; return this one's own device."""
    import torch
    from accelerate import PartialState

    # More threads than cores would wait for each other.
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if neighbours > 1:
        threads = max((os.cpu_count() or 1) // neighbours, 1)
        wanted = os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(int(wanted))
    with nullcontext() if process_count() == 1 else waiting_for_others():
        return PartialState(cpu=device == "cpu").device


def leave_processes() -> None:
    """Part from the other processes of a launch; for whoever holds nothing of the run any more.

    A model wrapped for several processes holds their group. Where it is the last that
    does, it ends the group's threads while it keeps Python's lock, and waits for ever where
    one of them needs that lock to end. So the group has to outlive it.
    """
    import torch
    from accelerate import PartialState

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        PartialState().destroy_process_group()


@contextmanager
def waiting_for_others(patience: float = 10) -> Iterator[None]:
    """Tell after so many seconds for whom a process waits in this block; let signals end it.

    What waits is no Python, so no handler of a signal would be called.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, args=(heard, patience), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(told, b"\0")  # which is no signal
        watcher.join()
        os.close(heard)
        os.close(told)


def watch(heard: int, patience: float) -> None:
    """Wait for the number of a signal, and end the process with it; 0 ends the waiting."""
    is_ready, _, _ = select.select([heard], [], [], patience)
    if not is_ready:
        place = f"{os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
        others = f"for {process_count() - 1} other processes at {place}"
        print(f"Waiting {others}; Ctrl-C ends it", file=sys.stderr, flush=True)
    number = os.read(heard, 1)[0]
    if number:
        problem = "by a signal, while it waited for other processes"
        print(f"\nStopped: {problem}; nothing was started", file=sys.stderr, flush=True)
        os._exit(128 + number)


def share_out(work: Callable[..., Any], *columns: Any, **arguments: Any) -> Any:
    """Return what work finds for all rows, each process doing its share of them.

    columns: what there is for each row, as lists or tensors of one length. work: takes
    these, each cut to a share, and the arguments; it returns a named tuple of lists with
    an item for each row. The result is such a tuple with the lists of all processes, one
    after another. A RunError in one process is raised in all of them.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    count = len(columns[0])
    first = count * state.process_index // state.num_processes
    last = count * (state.process_index + 1) // state.num_processes
    share = [column[first:last] for column in columns]

    # A process without rows, and one that failed, still has to take part in what all do
    # together.
    result = None
    if first < last:
        try:
            result = work(*share, **arguments)
        except RunError as error:
            result = error

    results = [result for result in gather_object([result]) if result is not None]
    for result in results:
        if isinstance(result, RunError):
            raise result
    lists = [list(itertools.chain.from_iterable(parts)) for parts in zip(*results)]
    return results[0]._make(lists)


# ----------------------------------------------------------------------- random numbers
def random_numbers(key: tuple[int, ...], count: int, length: int) -> "torch.Tensor":
    """Return numbers, uniform in (0, 1], for sampling: a row of them depends on key and place alone.

    Returns float32 (count, length).
    """
    import numpy
    import torch

    numbers = numpy.empty((count, length))
    for place in range(count):
        generator = numpy.random.default_rng([*key, place])
        numbers[place] = 1 - generator.random(length)
    return torch.tensor(numbers, dtype=torch.float32)
