"""What a user's own code does to the process is undone, and what it awaits is awaited."""

import asyncio
import os
import random
import signal
import warnings

import pytest
import torch

from finetune.guests import as_guest, awaited


def state():
    """Return all that a guest has to leave as it was."""
    return {
        "folder": os.getcwd(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "filters": [str(entry) for entry in warnings.filters],
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "environment": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MINE")},
    }


def misbehave(folder):
    """Do to the process what reward files were seen to do."""
    os.chdir(folder)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.manual_seed(5)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["OMP_NUM_THREADS"] = "7"


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_guest_does_to_the_process_is_undone(tmp_path, fails):
    before = state()
    try:
        with as_guest():
            misbehave(tmp_path)
            assert state()["folder"] != before["folder"]
            if fails:
                raise ValueError("in the middle")
    except ValueError:
        pass
    assert state() == before


def test_what_a_guest_keeps_for_itself_stays(monkeypatch):
    """Keys of a service in the environment, and the random numbers of Python, go on."""
    monkeypatch.setenv("MINE", "before")
    with as_guest():
        os.environ["MINE"] = "key"
        random.seed(1)
        first = random.random()
    with as_guest():
        assert os.environ["MINE"] == "key"
        assert random.random() != first


def test_a_coroutine_is_awaited_and_anything_else_is_as_it_is():
    async def answer(value):
        await asyncio.sleep(0)
        return value

    assert awaited(answer([1.0])) == [1.0]
    assert awaited([2.0]) == [2.0]


def test_all_coroutines_have_one_loop():
    """A client of a service may stay bound to the loop in which it was first used."""

    async def loop():
        return asyncio.get_running_loop()

    assert awaited(loop()) is awaited(loop())


def test_a_coroutine_is_awaited_where_a_notebook_has_a_loop_of_its_own():
    async def answer():
        return 3.0

    async def cell():
        return awaited(answer())

    assert asyncio.run(cell()) == 3.0
