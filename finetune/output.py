"""The folder that a run leaves."""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import EvalResult, ModelCardData

from finetune.checkpoint import read_checkpoint
from finetune.errors import SettingsError
from finetune.processes import device_name, is_main_process
from finetune.progress import Metrics
from finetune.settings import CommonSettings

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


# --------------------------------------------------------------------------- the folder
@contextmanager
def claim_output(folder: str, resume: bool) -> Iterator[None]:
    """Hold the output folder for this run alone; move an earlier run aside unless it goes on.

    What ends the run gets a note of what is saved, which the main process tells. Raises
    SettingsError where the folder can't be had.
    """
    if not is_main_process():
        yield
        return
    output = Path(folder)
    new = unfinished(folder)

    # The system frees the lock when the process ends, however it ends.
    lock = FileLock(output / "checkpoint" / "lock", blocking=False)
    try:
        with lock:
            earlier = files_of_a_run(output)
        if earlier and not resume:
            move_aside(output)
        lock.acquire()
    except OSError as error:
        reason = error.strerror or "another run is writing there"
        raise SettingsError(f"OUTPUT_DIR is {output}: {reason}: name another folder") from error

    # A killed run may have left unfinished files, and a full disk may leave some now.
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield
    except BaseException as error:
        state = read_checkpoint(folder)
        if state:
            saved = f"what was learned up to step {len(state['metrics'])} is saved"
            error.add_note(f"{saved}. To go on, run the same line with --resume")
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        lock.release()


def unfinished(folder: str) -> Path:
    """Return the folder where files are written before they move to their places."""
    return Path(folder, "checkpoint", "new")


def files_of_a_run(output: Path) -> list[Path]:
    """Return all files in an output folder, and in folders there, but for the lock."""
    paths = output.rglob("*")
    return [path for path in paths if path.is_file() and path.name != "lock"]


def move_aside(output: Path) -> None:
    """Rename an output folder to the first of output-1, output-2 … that is free."""
    for number in itertools.count(1):
        aside = Path(f"{output}-{number}")
        if not aside.exists():
            break
    output.rename(aside)
    print(f"The earlier run in {output}/ was moved to {aside}/")


# -------------------------------------------------------------------------- the results
@contextmanager
def whole_results(folder: str) -> Iterator[Path]:
    """Yield a folder for results, README.md among them, then move them: none is torn.

    Where the block ends with an error nothing is moved. It is for the main process alone.
    """
    output, new = Path(folder), unfinished(folder)
    yield new

    # What safetensors writes nobody else could read.
    mode = (new / "README.md").stat().st_mode

    # The adapter that is there is that of the model which is replaced.
    shutil.rmtree(output / "adapter", ignore_errors=True)

    # The files are listed before the first of them moves.
    files = [path for path in new.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(mode)
        place = output / path.relative_to(new)

        # A tokenizer may have a folder of templates.
        os.makedirs(place.parent, exist_ok=True)
        path.replace(place)


def write_report(report: dict[str, Any], card: str, folder: Path) -> None:
    """Write README.md, a model card with the result in Markdown, and report.json."""
    head = f"---\n{card_data(report)}\n---\n\n"
    picture = "![What was measured](training.png)\n"
    card = f"{head}{card}\n{picture}"
    (folder / "README.md").write_text(card, encoding="utf-8")

    text = json.dumps(report, indent=2) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")


def card_data(report: dict[str, Any]) -> ModelCardData:
    """Return what the Hub reads of a model: the head of its card, whose text is YAML."""
    trained = report["trained"]
    measured = trained if "train_prompts" in trained else {"held_out": trained}
    results = []
    for split, figures in measured.items():
        for metric, value in figures.items():
            if isinstance(value, float) and math.isfinite(value):
                # What was measured on is no dataset on the Hub.
                result = EvalResult(
                    task_type=report["task"],
                    dataset_type="unknown",
                    dataset_name=split,
                    dataset_split=split,
                    metric_type=metric,
                    metric_value=value,
                )
                results.append(result)

    # A folder here is nobody else's base model.
    name = report["settings"]["model_name"]
    return ModelCardData(
        model_name=Path(report["settings"]["output_dir"]).name,
        base_model=None if os.path.isdir(name) else name,
        library_name="transformers",
        pipeline_tag=report["task"],
        tags=report["tags"],
        eval_results=results,
    )


# --------------------------------------------------------------------------- the report
def describe_run(
    model: Any,
    settings: CommonSettings,
    metrics: Metrics,
    tags: list[str],
    task: str = "text-generation",
) -> dict[str, Any]:
    """Return what report.json says of a run, whatever was measured; tags and task as on the Hub."""
    samples, seconds = metrics[-1]["samples"], metrics[-1]["seconds"]
    memory = peak_memory(model.device)
    weight = model.get_input_embeddings().weight
    lora = ["lora"] if hasattr(model, "peft_config") else []
    return {
        "task": task,
        "tags": tags + lora + ["rlhf"],
        "encoder_decoder": model.config.is_encoder_decoder,
        "settings": settings.model_dump(),
        "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
        "device": device_name(model.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "samples": samples,
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "peak_memory_mb": None if memory is None else memory / 1e6,
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the most memory that was held, in bytes, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()

    # Windows does not tell that of a process.
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
