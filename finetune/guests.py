"""What a user's own code may do to the process: nothing that stays, beside what it returns."""

import asyncio
import functools
import inspect
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

# How many threads a library takes, where it is loaded later or in a process that is started.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@contextmanager
def as_guest() -> Iterator[None]:
    """Undo what is done in this block to the process.

    That is the current folder, PyTorch's modes, random states, threads and default dtype, the
    filters of warnings, the handlers of signals, and the environment of threads. The random
    numbers of Python and numpy, of which a run takes none, go on.
    """
    # It takes long to load, and settings are read without it.
    import torch

    folder = os.getcwd()
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    environment = {name: os.environ.get(name) for name in THREADS}
    handlers = signal_handlers()
    # Of several GPUs a process uses one.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            for name, value in environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            for number, handler in handlers.items():
                if signal.getsignal(number) != handler:
                    signal.signal(number, handler)


def signal_handlers() -> dict[int, Any]:
    """Return the handlers of signals that Python knows, none outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        is_settable = number not in (signal.SIGKILL, signal.SIGSTOP)
        if handler is not None and is_settable:
            handlers[int(number)] = handler
    return handlers


# ------------------------------------------------------------------------ what is awaited
def awaited(result: Any) -> Any:
    """Return what a function returned, after it was awaited where it is a coroutine."""
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return runner().run(wait_for(result))

    # A notebook has a loop of its own, in which nothing can be waited for.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait_for(result)).result()


@functools.cache
def runner() -> asyncio.Runner:
    """Return what awaits: one for all calls, for a client may stay bound to its loop."""
    return asyncio.Runner()


async def wait_for(result: Any) -> Any:
    """Await what may be any awaitable, as a coroutine."""
    return await result
