"""A script as a command: it starts, stops and ends with a status, and says why in a line."""

# The libraries take seconds to import, and settings are read before; so the few
# functions here that need one import it themselves.
import importlib
import io
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from types import FrameType, TracebackType
from typing import Any

from pydantic import BaseModel

from finetune.errors import RunError, SettingsError, Stopped, lacks_memory, shorten
from finetune.processes import is_main_process, leave_processes
from finetune.settings import Check, TrainingSettings, read_settings

DONE, FAILED, REFUSED = 0, 1, 2
DEFAULT_HANDLERS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
if hasattr(signal, "SIGHUP"):  # of a closed terminal, and of a scheduler that warns
    DEFAULT_HANDLERS |= {signal.SIGHUP: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}


# ---------------------------------------------------------------------------- the start
def is_script(names: Mapping[str, Any]) -> bool:
    """Return whether a file with these global names is run, not imported nor a notebook's cell."""
    return names["__name__"] == "__main__" and "__file__" in names


def watch_the_start() -> None:
    """Let what goes wrong before a run, while its file is still being read, end in one line.

    That is a constant without its quotes, as in DEVICE = cpu, and Ctrl-C while
    libraries load.
    """
    sys.excepthook = tell_in_a_line
    for number in stop_signals():
        signal.signal(number, leave)


def stop_signals() -> list[int]:
    """Return the signals that stop a run, but for SIGHUP where nohup lets it be ignored."""
    numbers = list(DEFAULT_HANDLERS)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    return numbers


def stop_watching() -> None:
    """Let signals do again what they do by default, where watch_the_start changed that."""
    for number, handler in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is leave:
            signal.signal(number, handler)


def leave(number: int, frame: FrameType | None) -> None:
    """End the reading of a file, where there is nothing to save."""
    raise Stopped(number)


def tell_in_a_line(
    error_class: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Tell of a stop, or of a name that a line of the script does not know; else as Python does."""
    if isinstance(error, Stopped):
        sys.exit(stopped(error))
    place = traceback.extract_tb(trace)[-1]
    frame, _ = list(traceback.walk_tb(trace))[-1]
    in_a_constant = (frame.f_globals["__name__"], place.name) == ("__main__", "<module>")
    if isinstance(error, NameError) and in_a_constant and place.line:
        line = place.line.partition("#")[0].strip()
        print(f'{line}: give "{error.name}", in quotes', file=sys.stderr)
        sys.exit(REFUSED)
    sys.__excepthook__(error_class, error, trace)


def settings_or_exit(
    constants: Mapping[str, Any],
    model: type[BaseModel],
    checks: Iterable[Check],
) -> Any:
    """Return the settings of the command line, or say what is wrong with them and exit.

    constants: the globals of the script. model, checks: as in read_settings.
    """
    prepare_screen()
    try:
        return read_settings(sys.argv[1:], constants, model, checks)
    except SettingsError as error:
        sys.exit(refuse(error))
    except BrokenPipeError:
        # As with --help | head: nobody reads on, so what is left to print goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(DONE)


def run_main(
    run: Callable[[Any], None],
    argv: Sequence[str],
    constants: Mapping[str, Any],
    model: type[BaseModel],
    checks: Iterable[Check],
) -> int:
    """Do a run with the constants, overridden by flags in argv; return the exit status."""
    prepare_screen()
    try:
        with stop_on_signal():
            settings = read_settings(argv, constants, model, checks)
    except SettingsError as error:
        return refuse(error)
    except Stopped as error:
        return stopped(error)
    return launch(run, settings)


def launch(run: Callable[[Any], None], settings: Any) -> int:
    """Do a run with settings that were checked; return the exit status."""
    stop_watching()
    try:
        with stop_on_signal():
            silence_libraries()
            with nullcontext() if is_main_process() else redirect_stdout(io.StringIO()):
                run(settings)
            leave_processes()
            # Where the output can't be written, that is told here.
            print(end="", flush=True)
    except SettingsError as error:
        return refuse(error)
    except Stopped as error:
        return stopped(error)
    except Exception as error:
        reason = explain(error, settings)
        let_main_process_tell()
        if reason is None:
            raise
        print(f"\nStopped: {reason}; {saved(error)}", file=sys.stderr)
        return FAILED
    return DONE


# ------------------------------------------------------------------------------ the end
def refuse(error: SettingsError) -> int:
    """Print all that is wrong with settings or input; return the exit status."""
    let_main_process_tell()
    print("Nothing was started or changed:", file=sys.stderr)
    for problem in error.args:
        print(f"- {problem}", file=sys.stderr)
    return REFUSED


def stopped(error: Stopped) -> int:
    """Print that a signal ended the run, and what is saved; return the exit status."""
    let_main_process_tell()
    # Where all of them are stopped, it is told once.
    if is_main_process():
        print(f"\nStopped: by a signal; {saved(error)}", file=sys.stderr)
    return 128 + error.args[0]


def let_main_process_tell() -> None:
    """Wait in all processes but the main one, for a launcher ends all with the first that ends."""
    stop_watching()
    if not is_main_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(8)


def saved(error: BaseException) -> str:
    """Return in words what is saved of a run that an error ended: whoever saved it left a note."""
    return getattr(error, "__notes__", ["there was nothing to save yet"])[0]


def explain(error: BaseException, settings: Any) -> str | None:
    """Return what a user can do about an error in the middle of a run, None where it is a bug."""
    if isinstance(error, RunError):
        return str(error)
    if lacks_memory(error):
        return f"there is too little memory: {memory_remedy(settings)}"
    if "WORLD_SIZE" in os.environ and re.search("gloo|nccl", repr(error), re.IGNORECASE):
        return "another process of this run has ended, and tells why"

    # safetensors is written in Rust, and has errors of its own for a full disk.
    if isinstance(error, OSError) or re.search("SafetensorError|os error", repr(error)):
        reason = shorten(getattr(error, "strerror", None) or error, 200)
        place = f"OUTPUT_DIR, {settings.output_dir}, and let what is printed be read to its end"
        return f"something can't be written ({reason}): make room in {place}"
    return None


def memory_remedy(settings: Any) -> str:
    """Return which settings to lower, with their values, where memory is short."""
    if not isinstance(settings, TrainingSettings):
        now = f"it is {settings.batch_size}"
        return f"lower BATCH_SIZE ({now}), or start anew with QUANTIZATION 4bit or a smaller model"
    now = f"it is {settings.rows_at_once}"
    lower = f"lower MINI_BATCH_SIZE ({now}) or EVAL_BATCH_SIZE ({settings.eval_batch_size})"
    anew = f"QUANTIZATION 4bit, a BATCH_SIZE below {settings.batch_size} or a smaller model"
    return f"{lower} and go on, or start anew with {anew}"


# -------------------------------------------------------------------------------- stops
class Stop:
    """A signal: its number in `heard`, and in `requested` where all processes stop; 0 until then."""

    def __init__(self, after_step: bool) -> None:
        self.after_step = after_step
        self.heard = self.requested = 0
        self.time = 0.0
        # Within two seconds a launcher passes on to its processes what all of them got.
        self.pause = 2 if "WORLD_SIZE" in os.environ else 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, where it can wait for the end of a step; raise at any other."""
        is_repeated = self.heard and time.monotonic() - self.time >= self.pause
        if is_repeated or not self.after_step:
            raise Stopped(number)
        if not self.heard and is_main_process():
            print("\nStopping after this step; once more to stop at once", file=sys.stderr)
        self.heard, self.requested, self.time = number, number, time.monotonic()

    def agree(self) -> None:
        """Let all processes stop where one of them was asked to."""
        from accelerate.utils import gather_object

        # A signal that comes while they agree waits for the next time.
        self.requested = max(gather_object([self.heard]))


@contextmanager
def stop_on_signal(after_step: bool = False) -> Iterator[Stop]:
    """Raise Stopped on a signal that stops; with after_step the first waits for the block's end."""
    stop = Stop(after_step)
    handlers = {number: signal.signal(number, stop.handle) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stop.requested:
        raise Stopped(stop.requested)


# --------------------------------------------------------------------------- the screen
def prepare_screen() -> None:
    """Let whatever a model or a user says be shown, as far as the screen can."""
    # A notebook's output has no such method, and shows everything anyway.
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    # A number of any length can be shown then, shortened.
    sys.set_int_max_str_digits(0)


def silence_libraries() -> None:
    """Keep what pinned libraries say of themselves off the screen, by name, and nothing else."""
    import transformers

    # When it is loaded it sets the level of its logger.
    silence_loggers()
    noise = [
        "`PPO(Config|Trainer)` is dep",
        "No dataset is",
        ".*is_gradient_checkpointing",
        "fan_in_fan_out",
        "Reserved keys",  # of trackio
        "Merge lora",  # into 4 bits
        "The following (rank|alpha)_pattern",  # of experts, which PEFT adapts all the same
    ]
    warnings.filterwarnings("ignore", message="|".join(noise))

    # Such an adapter could not be merged.
    wrong = ".*tied layer is part of the adapter|Found missing adapter keys"
    warnings.filterwarnings("error", message=wrong)

    transformers.logging.disable_progress_bar()

    # With WANDB_MODE=offline it says so when it is imported.
    with redirect_stdout(io.StringIO()):
        importlib.import_module("transformers.integrations.integration_utils")


def silence_loggers() -> None:
    """Let libraries log errors alone; before they are loaded, for some talk while they are."""
    for library in ("bitsandbytes", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # tqdm warns in a notebook, as soon as some library imports it.
    warnings.filterwarnings("ignore", message="IProgress")
