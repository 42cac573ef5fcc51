"""What is shown and written while a run goes on."""

import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from finetune.errors import RunError, shorten
from finetune.figures import recent_records, without_bad_numbers
from finetune.files import Row
from finetune.processes import is_main_process
from finetune.prompts import last_said
from finetune.settings import TrainingSettings
from finetune.trackers import Trackers

Metrics = list[dict[str, Any]]

BAR_FORMAT = "{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}"


# -------------------------------------------------------------------- steps and metrics
def progress(steps: Sequence[Any]) -> Iterable[Any]:
    """Yield the steps, with a bar on a screen where there are several."""
    # With None tqdm finds out by itself whether there is a screen.
    disable = None if len(steps) > 1 else True
    return tqdm(steps, leave=False, disable=disable, file=sys.stdout)


def count_steps(settings: Any, rows: Sequence[Any]) -> int:
    """Return how many batches TRAINING_EPOCHS passes over the rows take; the last is filled up."""
    # It is rounded since 0.07 * 100 is 7.000000000000001.
    samples = round(settings.training_epochs * len(rows), 6)
    return math.ceil(samples / settings.batch_size)


def recent(metrics: Metrics, name: str) -> float:
    """Return the mean of a metric over the last 100 samples, of the steps where it was finite.

    It is nan where there is no such step.
    """
    values = [record[name] for record in recent_records(metrics) if record[name] is not None]
    return sum(values) / len(values) if values else math.nan


def give_up_on_bad_numbers(metrics: Metrics, remedy: str = "") -> None:
    """Raise RunError where each of the last three steps had updates that were skipped.

    remedy: what else can be done, to stand before what always can.
    """
    if len(metrics) < 3:
        return
    if all(record["skipped_updates"] for record in metrics[-3:]):
        remedy += "start anew with a lower LEARNING_RATE or DTYPE float32"
        raise RunError(f"three steps in a row had updates that are not finite: {remedy}")


# ------------------------------------------------------------------------------ the log
class MetricsLog:
    """What is told of each step to files, screen and trackers, in a with statement.

    metrics: of the steps that are done. total: how many steps the whole run takes.
    project: the name of the script. samples_per_step: how many lines of samples.jsonl a
    step has; 0 = there is no such file. scored_places: after how many tokens beginnings of
    them are scored, None where none is. In all processes but the main one nothing is
    written or shown.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        metrics: Metrics,
        total: int,
        project: str,
        samples_per_step: int = 0,
        scored_places: list[int] | None = None,
    ) -> None:
        self.metrics = metrics
        self.total = total
        self.samples_per_step = samples_per_step
        self.log_every = settings.log_every
        self.described = {
            "script": project,
            "total_steps": total,
            "settings": settings.model_dump(),
        }
        if samples_per_step > 0:
            self.described["scored_places"] = scored_places
        self.metrics_path = Path(settings.output_dir, "metrics.jsonl")
        self.samples_path = Path(settings.output_dir, "samples.jsonl")

        # A bar in a file would be noise, and without steps that are left it never moves.
        screens = (sys.stdout, sys.stderr)
        is_left = len(metrics) < total
        self.is_watched = is_left and all(screen and screen.isatty() for screen in screens)
        self.trackers = Trackers(settings, len(metrics), project)
        self.opened = ExitStack()

    def __enter__(self) -> Self:
        """Write down the steps that are done, show the bar, and start the trackers."""
        if not is_main_process():
            return self
        if self.samples_per_step > 0:
            self.cut_samples()
        lines = [json.dumps(record) + "\n" for record in self.metrics]
        self.metrics_path.write_text("".join(lines))

        # Whoever looks at a run that goes on, or was stopped, has no report.
        text = json.dumps(self.described, indent=2) + "\n"
        unfinished = self.metrics_path.with_name("run.unfinished")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.metrics_path.with_name("run.json"))

        self.bar = tqdm(
            total=self.total,
            initial=len(self.metrics),
            bar_format=BAR_FORMAT,
            disable=not self.is_watched,
        )
        self.opened.enter_context(self.trackers)
        self.opened.enter_context(self.bar)
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar, then finish the trackers."""
        self.opened.close()

    def cut_samples(self) -> None:
        """Cut samples.jsonl to the steps that are done.

        It is never rewritten. What came after the checkpoint goes, as does a line that a
        killed run did not finish.
        """
        count = len(self.metrics) * self.samples_per_step
        with open(self.samples_path, "ab+") as file:
            file.seek(0)
            size = sum(len(line) for line in itertools.islice(file, count))
            file.truncate(size)

    def write(
        self,
        metrics: Metrics,
        text: str,
        samples: Sequence[Row] = (),
        warnings: Sequence[str] = (),
    ) -> None:
        """Write down the last of the metrics and its samples, and show what is said of it.

        text: what is said beside the bar, or in a line of progress. samples: of the step,
        each with its prompt, its response and what else is known of it; a number that is
        not finite becomes None. warnings: what the user should know at once.
        """
        if not is_main_process():
            return
        step, record = len(metrics), metrics[-1]
        samples = [without_bad_numbers(sample) for sample in samples]
        if self.samples_per_step > 0:
            write_lines(self.samples_path, samples, mode="a")
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(record) + "\n")

        for warning in warnings:
            self.say(f"step {step}: {warning}")
        self.bar.set_description_str(text, refresh=False)
        self.bar.update()

        due = step % self.log_every == 0 or step == self.total
        shown = [without_tokens(sample) for sample in samples] if due else []
        self.trackers.track(record, shown)
        if due and not self.is_watched:
            seconds_left = record["seconds"] / step * (self.total - step)
            left = tqdm.format_interval(seconds_left)
            self.say(f"step {step}/{self.total}, {left} left, {text}")
        if due and samples:
            self.say_sample(samples[0])

    def say(self, line: str) -> None:
        """Print a line at once; where there is a bar, above it."""
        if self.is_watched:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def say_sample(self, sample: Row) -> None:
        """Print a sample in a line that the screen is wide enough for."""
        text = f"{last_said(sample['prompt'])} | {sample['response']}"
        text = " ".join(text.split())

        # Letters of some scripts, and emoji, take two columns.
        columns = shutil.get_terminal_size().columns
        width = columns if text.isascii() else columns // 2
        self.say(f"    {shorten(text, max(width - 5, 1))}")


def write_lines(path: Path, rows: Iterable[Row], mode: str = "w") -> None:
    """Write a line of JSON for each row, in any script as it is read; mode a adds them.

    A number that is not finite becomes None, JSON's null.
    """
    with open(path, mode, encoding="utf-8") as file:
        for row in rows:
            line = json.dumps(without_bad_numbers(row), ensure_ascii=False)
            file.write(line + "\n")


def without_tokens(sample: Row) -> Row:
    """Return a sample without what is known of its tokens, which is no cell of a table."""
    return {name: value for name, value in sample.items() if name != "tokens"}
