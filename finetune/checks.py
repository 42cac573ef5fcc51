"""Settings that do not fit each other, or the machine: checked before anything is loaded."""

# Each function has the settings that it looks at as its arguments, by name. It is
# asked where all of them are right by themselves (settings.py), and imports a heavy
# library only where it has to.
import importlib.util
import os
from contextlib import suppress
from pathlib import Path

from finetune.errors import SettingsError, blame, shorten
from finetune.hub import bases_of
from finetune.processes import is_main_process, pick_device, process_count

TRACKERS = ("tensorboard", "wandb", "trackio")

# What a launcher sets for each of several processes.
OF_A_LAUNCH = ("RANK", "MASTER_ADDR", "MASTER_PORT")

# What accelerate's configuration may ask for, and what this is where it asks for nothing: the
# scripts have settings of their own for these, or can't do it.
OF_ACCELERATE = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
}

# A folder with one of these was written by a run, and may be moved aside.
OF_A_RUN = {"metrics.jsonl", "report.json", "checkpoint"}


def rows_at_once(batch_size: int, mini_batch_size: int) -> tuple[str, int]:
    """Return which setting says how many rows are passed at once, and how many these are."""
    if mini_batch_size:
        return "MINI_BATCH_SIZE", mini_batch_size
    return "BATCH_SIZE", batch_size


def check_batches(batch_size: int, mini_batch_size: int) -> None:
    """Refuse batches that can't be divided."""
    name, size = rows_at_once(batch_size, mini_batch_size)
    if process_count() > size:
        remedy = f"give at least {process_count()}, a response for each process"
        raise SettingsError(f"{name} is {size}: {remedy}")

    if batch_size % size:
        remedy = f"give 0 or a divisor of BATCH_SIZE, {batch_size}"
        raise SettingsError(f"MINI_BATCH_SIZE is {mini_batch_size}: {remedy}")


def check_shares(batch_size: int, mini_batch_size: int) -> None:
    """Refuse a minibatch of which the processes would not get as many examples each."""
    name, size = rows_at_once(batch_size, mini_batch_size)
    # Where there are too few, check_batches tells.
    if size > process_count() and size % process_count():
        remedy = f"give a multiple of {process_count()}, the number of processes"
        raise SettingsError(f"{name} is {size}: {remedy}")


def check_alone() -> None:
    """Refuse a launch of several processes."""
    if process_count() > 1:
        problem = f"WORLD_SIZE is {process_count()}: this script is one process"
        raise SettingsError(f"{problem}: start it with python")


def check_launch() -> None:
    """Refuse the environment of a launch that is none, or that would change the run in silence."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdecimal() or int(count) < 1:
        raise SettingsError(f"WORLD_SIZE is {shorten(count)}: unset it, or launch with torchrun")
    lacking = [name for name in OF_A_LAUNCH if name not in os.environ]
    if process_count() > 1 and lacking:
        problem = f"WORLD_SIZE is {count}, but there is no {', '.join(lacking)}"
        raise SettingsError(f"{problem}: launch with accelerate or torchrun, or unset it")

    problems = []
    for name, neutral in OF_ACCELERATE.items():
        value = os.environ.get(name, neutral)
        if value.lower() not in (neutral, "0", ""):
            problems.append(f"{name} is {shorten(value)}: launch with {neutral}, or unset it")
    if problems:
        raise SettingsError(*problems)


def check_device(device: str, dtype: str) -> None:
    """Refuse a device or a dtype that is not there."""
    if device in ("cuda", "mps"):
        import torch

        backend = getattr(torch, device)
        if not backend.is_available():
            remedy = "give cpu, since PyTorch sees no such GPU"
            raise SettingsError(f"DEVICE is {device}: {remedy}")

    if dtype == "float16":
        actual_device, _ = pick_device(device, dtype)
        if actual_device == "cpu":
            remedy = "give float32 or bfloat16 on a CPU"
            raise SettingsError(f"DTYPE is float16: {remedy}")


def check_trackers(report_to: list[str]) -> None:
    """Refuse a tracker that is not known, not installed, or that wants a login."""
    for name in report_to:
        if name not in TRACKERS:
            remedy = "give any of tensorboard, wandb and trackio"
            raise SettingsError(f"REPORT_TO is {shorten(name)}: {remedy}")

        # A mere folder of that name is found too, but has no origin.
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:
            remedy = f"leave it out, or pip install {name}"
            raise SettingsError(f"REPORT_TO is {name}: {remedy}")

    if "wandb" in report_to and is_main_process():
        os.environ.setdefault("WANDB_SILENT", "true")
        remedy = "run: wandb login, or set WANDB_MODE=offline"
        with blame("REPORT_TO", "wandb", remedy):
            wandb = importlib.import_module("wandb")
            wandb.login()


def check_output(model_name: str, output_dir: str) -> None:
    """Refuse an output folder that can't be written, or where that would harm something."""
    with blame("OUTPUT_DIR", output_dir, "name another folder"):
        if output_dir.startswith("~"):
            raise ValueError("~ is no folder here")

        output = Path(output_dir).absolute()
        paths = (output, *output.parents)
        existing = next(path for path in paths if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"{existing} can't be written")

        # What can't be looked at does not exist, to exists(), but is no folder to be made either: a
        # name that is too long (from Python 3.14 on), a link that leads to itself.
        with suppress(FileNotFoundError):
            output.stat()

        names = set()
        if output.exists():
            names = {path.name for path in output.iterdir()}
        if names and names.isdisjoint(OF_A_RUN):
            raise ValueError("it holds files that are not a run's")

        # An earlier run is moved aside, and what is in its folder would go with it.
        for path in (".", *bases_of(model_name)):
            if Path(path).resolve().is_relative_to(output.resolve()):
                raise ValueError("the current folder or the model is in it")


# What the scripts that train have in common.
OF_TRAINING = (check_launch, check_batches, check_device, check_trackers, check_output)
