"""A process that imports the scripts once and forks a child for each run: importing takes seconds.

The first half is the tests' end of it, which speaks to it in lines of JSON. The second half is the
process itself.
"""

import faulthandler
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

SCRIPTS = ["train_rlhf", "train_sft", "train_reward_model"]
READY_MADE = [  # what a run imports on its way, which its children would do once more each
    "accelerate.tracking",
    "bitsandbytes",
    "datasets",
    "huggingface_hub",
    "matplotlib.backends.backend_agg",
    "mpl_toolkits.mplot3d.axes3d",
    "peft.tuners.lora",
    "torch.utils.serialization",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "trl.trainer.ppo_trainer",
]
PHASES = {  # where a function is: the phase that begins with it, and the one after it
    ("train_rlhf", "train"): ("training", "loading"),
    ("train_rlhf", "measure_and_save"): ("measuring", "end"),
    ("finetune.supervised", "fit"): ("training", "measuring"),
}
LONGEST = 240  # seconds after which a run that hangs is killed, so that its test fails


# ----------------------------------------------------------------------------------- for the tests
def environment(folder):
    """Return this process's environment, with a narrow machine: no GPU, one thread, no Hub."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    known |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(Path(folder, "hf_home"))}
    return known | {"COLUMNS": "10000"}  # so that no message is broken


class ForkDriver:
    """The process that forks, to be used in a with statement."""

    def __init__(self, folder):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()  # which ends it, and every child that still runs
        self.process.wait()
        self.process.stdout.close()

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        folder,
        *flags,
        script="train_rlhf",
        signals=(),
        seconds=None,
        death=None,
        **environment,
    ):
        """Start a script's main with the flags, and so many variables of environment more.

        script: the name of one of ours, or the path of a copy, which is run as a program.
        signals: (step, number) pairs, sent when the step is taken but not yet noted.
        seconds: the processor time after which the kernel kills it.
        death: a note, how often it has come when death does, and the size of a file beyond which
        it comes, or None = at once.
        """
        self.runs += 1
        place = self.folder / str(self.runs)
        place.mkdir()
        order = {"cwd": str(folder), "flags": [*map(str, flags)], "environment": environment}
        order |= {"signals": list(signals), "seconds": seconds, "death": death}
        order["script"] = str(script)
        return Child(self, place, self.ask(start=order, place=str(place)))


class Child:
    """A run in a child of the driver; as far as tests need it, like a subprocess.Popen."""

    def __init__(self, driver, place, pid):
        self.driver, self.place, self.pid, self.returncode = driver, place, pid, None

    def poll(self):
        if self.returncode is None:
            self.returncode, self.seconds, self.notes = self.driver.ask(poll=self.pid)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:  # until then its number is no other process's
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=LONGEST):
        """Wait until it ends; return stdout and stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.005)
        return self.read("stdout"), self.read("stderr")

    def end(self):
        """Wait until it ends; return exit status, stdout, stderr, notes and processor time."""
        stdout, stderr = self.communicate()
        return SimpleNamespace(
            status=self.returncode,
            stdout=stdout,
            stderr=stderr,
            notes=self.notes,
            seconds=self.seconds,
        )

    def read(self, name):
        return (self.place / name).read_text(encoding="utf-8", errors="replace")


# ------------------------------------------------------------------------------------- the process
def serve():
    """Carry out orders until there are no more; nothing computes here, so no thread is missed."""
    from_tests, to_tests = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    import_all()
    gc.freeze()  # a collection in a child would copy all of this process's memory
    children = {}
    with os.fdopen(from_tests) as orders, os.fdopen(to_tests, "w") as answers:
        for line in orders:
            order = json.loads(line)
            if "start" in order:
                notes, child_notes = os.pipe()
                answer = os.fork()
                if answer == 0:
                    for descriptor in (from_tests, to_tests):
                        os.close(descriptor)
                    run_child(order["start"], order["place"], child_notes)
                os.close(child_notes)
                children[answer] = notes
            else:
                answer = look_after(children, order["poll"])
            print(json.dumps(answer), file=answers, flush=True)
    for child in children:
        os.kill(child, signal.SIGKILL)


def import_all():
    """Import the scripts and what they import later."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    for name in [*SCRIPTS, *READY_MADE]:
        importlib.import_module(name)

    # The lock of tqdm is a semaphore else, which from Python 3.14 on is missed, in a line of stderr,
    # where a process ends without all that an exit does, as the children do.
    sys.modules["tqdm"].tqdm.set_lock(threading.RLock())


def look_after(children, child):
    """Return exit status, processor time and notes of a child, None each while it runs."""
    pid, status, usage = os.wait4(child, os.WNOHANG)
    if not pid:
        return None, None, None
    with os.fdopen(children.pop(child)) as notes:
        seconds = usage.ru_utime + usage.ru_stime
        return os.waitstatus_to_exitcode(status), seconds, notes.read().splitlines()


def run_child(order, place, notes):
    """Become the run that was ordered: its folder, environment, output, and end."""
    status = 1
    try:
        for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(Path(place, name), os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        os.set_blocking(notes, False)
        os.chdir(order["cwd"])
        os.environ.update(order["environment"])
        faulthandler.register(signal.SIGALRM, chain=True)  # where it hung stands in stderr
        signal.alarm(LONGEST)
        status = (run_ours if order["script"] in SCRIPTS else run_copy)(order, notes)
    except SystemExit as error:  # of --help
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_ours(order, notes):
    """Call main of the script that the driver has imported; return the exit status."""
    script = sys.modules[order["script"]]
    sys.argv = [script.__file__, *order["flags"]]
    prepare(order, notes)
    return script.main(order["flags"])


def run_copy(order, notes):
    """Run a copy of a script as a program, which imports what lies beside it; it exits."""
    for name in our_modules():
        del sys.modules[name]
    sys.path[0] = os.path.dirname(order["script"])
    sys.argv = [order["script"], *order["flags"]]
    runpy.run_path(order["script"], run_name="__main__")


def our_modules():
    """Return the names of the scripts and of the modules that they share."""
    return [name for name in sys.modules if name in SCRIPTS or name.startswith("finetune")]


def put_in_place(function, other):
    """Let all modules of ours that have a function have another in its place."""
    for module in map(sys.modules.get, our_modules()):
        if vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, other)


def prepare(order, notes):
    """Note each phase, and each file in OUTPUT_DIR that is written, moved or removed; die in time.

    SIGPROF and SIGXFSZ end the process as abruptly as SIGKILL does, the one after some processor
    time (on a busy machine the run is slow and the clock is not), the other in the middle of a
    write.
    """
    phase, counts = "", {}
    death, times, size = order["death"] or (None, 0, None)
    script = sys.modules[order["script"]]
    flags = ["--output-dir", script.OUTPUT_DIR, *order["flags"]]
    folder = flags[len(flags) - flags[::-1].index("--output-dir")]

    def note(text):
        with suppress(BlockingIOError):  # so many notes that nobody wants them
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
        def watched(*args, **more):
            enter(first)
            result = function(*args, **more)
            enter(then)
            return result

        return watched

    def send_signals(step):
        for when, number in order["signals"]:
            if step == when:
                os.kill(os.getpid(), number)

    @contextmanager
    def watched_results(folder):
        enter("results")
        with whole_results(folder) as new:
            yield new
        enter("end")

    def signalled_record(step, *args, **more):
        send_signals(step)
        return make_record(step, *args, **more)

    def signalled_log(self, *args, **more):
        send_signals(len(self.training.metrics) + 1)
        on_log(self, *args, **more)

    for (module, name), phases in PHASES.items():
        function = getattr(sys.modules[module], name)
        put_in_place(function, watch(function, *phases))
    saves = sys.modules["finetune.checkpoint"].Checkpoint
    saves.save = watch(saves.save, "checkpoint", "training")
    whole_results = sys.modules["finetune.output"].whole_results
    put_in_place(whole_results, watched_results)
    make_record = sys.modules["finetune.measurement"].make_record
    put_in_place(make_record, signalled_record)
    recorder = sys.modules["finetune.supervised"].Recorder
    on_log, recorder.on_log = recorder.on_log, signalled_log

    enter("loading")
    sys.addaudithook(audit)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order["seconds"] is not None:
        signal.setitimer(signal.ITIMER_PROF, max(order["seconds"], 0.001))


if __name__ == "__main__":
    serve()
