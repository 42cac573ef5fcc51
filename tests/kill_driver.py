"""A process that imports train_rlhf once and forks a child for each run, for test_kill.py: importing takes seconds.

It reads an order a line, in JSON, and answers each with a line: how the child ended, and what it noted on its way.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from matplotlib.figure import Figure

import train_rlhf

PHASES = {  # function: the phase that begins with it, and the one after it
    "train": ("training", "loading"),
    "save_checkpoint": ("checkpoint", "training"),
    "evaluate": ("measuring", "measuring"),
    "save_results": ("results", "end"),
}


def serve():
    """Carry out orders until there are no more; nothing here computes, so a fork has no thread to miss."""
    torch.set_num_threads(1)
    draw, Figure.savefig = Figure.savefig, lambda figure, path, dpi: draw_fast(draw, figure, path)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    for line in sys.stdin:
        print(json.dumps(run_child(json.loads(line))), file=answers, flush=True)


def draw_fast(draw, figure, path):
    """Draw training.png with overlapping labels, since placing them would take as long as all the training here."""
    figure.set_layout_engine("none")
    draw(figure, path, dpi=50)


def run_child(order):
    """Fork a child that runs train_rlhf.main with order["flags"]; kill it after order["delay"] seconds, unless None.

    They are the child's own seconds, of processor time: on a busy machine the run is slow and the clock is not.
    """
    (output, child_output), (notes, child_notes) = os.pipe(), os.pipe()
    gc.freeze()  # a collection in the child would copy all of the parent's memory
    if (child := os.fork()) == 0:
        os.dup2(child_output, 1)
        os.dup2(child_output, 2)
        run_main(order, child_notes)
    for descriptor in (child_output, child_notes):
        os.close(descriptor)
    read, ended, process, delay = (
        {output: b"", notes: b""},
        False,
        psutil.Process(child),
        order["delay"],
    )
    while not ended:
        time.sleep(0.002)
        seconds = sum(process.cpu_times()[:2])
        if delay is not None and seconds >= delay:
            os.kill(child, signal.SIGKILL)
            delay = None
        ended, status = os.waitpid(child, os.WNOHANG)
        for descriptor in read:
            read[descriptor] += read_all(descriptor)
    for descriptor in read:
        os.close(descriptor)
    lines = read[notes].decode().splitlines()
    for line in lines:
        if line.startswith("import "):
            with suppress(Exception):  # not every name in sys.modules is a module's
                importlib.import_module(
                    line.removeprefix("import ")
                )  # so that the next child need not
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "output": read[output].decode(errors="replace"),
        "notes": [line for line in lines if not line.startswith("import ")],
    }


def read_all(descriptor):
    """Return what is in the pipe now."""
    os.set_blocking(descriptor, False)
    parts = [b""]
    with suppress(BlockingIOError):
        while part := os.read(descriptor, 65536):
            parts.append(part)
    return b"".join(parts)


def run_main(order, notes):
    """Run main and end the process; note each phase, and each file in OUTPUT_DIR that is written, moved or removed.

    order["death"] is a note, how often it has come when death does, and the size of file beyond which it comes: with
    None the process kills itself at once, else the kernel does in the middle of a write, with SIGXFSZ.
    """
    before, phase, counts, status = set(sys.modules), "", {}, 99
    death, times, size = order["death"] or (None, 0, None)
    folder = order["flags"][order["flags"].index("--output-dir") + 1]

    def note(text):
        os.write(notes, f"{text}\n".encode())
        counts[text] = counts.get(text, 0) + 1
        if text == death and counts[text] == times:
            if size is None:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def enter(name):
        nonlocal phase
        phase = name
        note(phase)

    def audit(event, args):
        writes = event == "open" and set(args[1] or "r") & set("wax+")
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path = str(args[1] if event == "os.rename" else args[0])
            if path.startswith(folder):
                note(f"{phase} {event} {Path(path).name}")

    def watch(function, first, then):
        def watched(*args):
            enter(first)
            result = function(*args)
            enter(then)
            return result

        return watched

    try:
        signal.alarm(120)  # a run that hangs is killed, so that its test fails
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, phases in PHASES.items():
            setattr(train_rlhf, name, watch(getattr(train_rlhf, name), *phases))
        enter("loading")
        sys.addaudithook(audit)
        status = train_rlhf.main(order["flags"])
        sys.stdout.flush()
        for name in set(sys.modules) - before:
            note(f"import {name}")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
