"""The metrics of a run, handed to TensorBoard, Weights & Biases or Trackio."""

import importlib
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from finetune.errors import RunError, shorten
from finetune.files import Row
from finetune.prompts import last_said
from finetune.settings import TrainingSettings


class Trackers:
    """All trackers that REPORT_TO names, started and finished by a with statement.

    done: how many steps the checkpoint has from which the run goes on, 0 for a new run.
    project: the name of the script, under which the trackers keep its runs together.
    """

    def __init__(self, settings: TrainingSettings, done: int, project: str) -> None:
        self.settings = settings
        self.done = done
        self.project = project
        self.folder = Path(settings.output_dir)
        self.trackers: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start the trackers; raise RunError where one does not start."""
        # A name that is given twice is started once.
        names = dict.fromkeys(self.settings.report_to)
        try:
            for name in names:
                self.start(name)
        except BaseException:
            self.finish()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Finish the trackers, whatever has ended the run."""
        self.finish()

    def start(self, name: str) -> None:
        """Start a tracker by its name, which is that of its library."""
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        try:
            tracker = tracker_class(**self.options_of(name))
            self.trackers[name] = tracker
            # Trackio has much to say.
            with redirect_stdout(io.StringIO()):
                tracker.start()
        except Exception as error:
            problem = f"REPORT_TO is {name}: it does not start ({shorten(error)})"
            raise RunError(f"{problem}: leave it out") from error

    def options_of(self, name: str) -> dict[str, Any]:
        """Return the arguments with which accelerate makes a tracker."""
        if name == "tensorboard":
            return {
                "run_name": "tensorboard",
                "logging_dir": self.folder,
                "purge_step": self.done + 1,
            }
        options: dict[str, Any] = {
            "run_name": self.project,
            "name": self.folder.name,
            "config": self.settings.model_dump(),
            "resume": "allow" if self.done else "never",
        }
        if name == "wandb":
            options |= {"dir": self.folder, "id": self.wandb_id()}
        return options

    def wandb_id(self) -> str | None:
        """Return the id of the run at Weights & Biases, None if it was not there yet."""
        # A run that went on has several files, and all have its id: run-ID.wandb.
        for path in self.folder.glob("wandb/*/run-*.wandb"):
            return path.stem.partition("-")[2]
        return None

    def track(self, record: dict[str, Any], samples: Sequence[Row]) -> None:
        """Hand the record of a step to all trackers, and samples to those that have tables.

        A tracker that fails gets nothing more: no run has to end for it.
        """
        # Of a conversation the last message is told.
        table = [sample | {"prompt": last_said(sample["prompt"])} for sample in samples]
        for name, tracker in list(self.trackers.items()):
            figures = dict(record)
            library = importlib.import_module(name)
            try:
                if table and hasattr(library, "Table"):
                    columns = list(table[0])
                    data = [list(sample.values()) for sample in table]
                    figures["responses"] = library.Table(columns=columns, data=data)
                tracker.log(figures, step=record["step"])
            except Exception as error:
                print(f"\n{name} gets no more metrics: {shorten(error)}", file=sys.stderr)
                del self.trackers[name]

    def finish(self) -> None:
        """Finish all trackers that are left, and keep what they say off the screen."""
        for name, tracker in self.trackers.items():
            # Without its library's function Trackio would have more to say at the end.
            library = importlib.import_module(name)
            finish = getattr(library, "finish", tracker.finish)
            with suppress(Exception), redirect_stdout(io.StringIO()):
                finish()
