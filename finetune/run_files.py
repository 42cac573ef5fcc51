"""The files of a run, read by whoever looks at it; the run may still go on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import SettingsError, shorten
from finetune.files import Row


class RunFiles(NamedTuple):
    """What the folder of a run holds.

    script: which made it. total_steps: of the whole run. scored_places: after how many
    tokens beginnings of responses are scored, None where none is. report: None where the
    run has not ended.
    """

    folder: Path
    script: str
    settings: Row
    total_steps: int
    scored_places: list[int] | None
    metrics: list[Row]
    report: Row | None

    def lines(self, name: str) -> Iterator[Row]:
        """Yield the rows of a file of JSON lines, none where there is no such file."""
        if (self.folder / name).is_file():
            yield from read_lines(self.folder / name)


def read_run(folder: Path) -> RunFiles:
    """Return what a folder holds; raise SettingsError where it is none of a run."""
    remedy = "name OUTPUT_DIR of a run, or wait until its first step is done"
    if not folder.is_dir():
        raise SettingsError(f"{folder} is no folder: {remedy}")
    for name in ("metrics.jsonl", "run.json"):
        if not (folder / name).is_file():
            raise SettingsError(f"{folder} has no {name}: {remedy}")
    metrics = list(read_lines(folder / "metrics.jsonl"))
    if not metrics:
        raise SettingsError(f"{folder} has no step yet: wait until the first is done")

    # The report of an earlier end says nothing of a run that went on.
    run, report = read_json(folder / "run.json"), None
    if (folder / "report.json").is_file():
        report = read_json(folder / "report.json")
    if report is not None and report["samples"] != metrics[-1]["samples"]:
        report = None
    return RunFiles(
        folder,
        run["script"],
        run["settings"],
        run["total_steps"],
        run.get("scored_places"),
        metrics,
        report,
    )


def last_name(path: str) -> str:
    """Return the last part of a path, or of a name on the Hub, on whatever system it was."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def read_lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, but for a last line that is being written."""
    number = 0
    # What is being written may end within a letter, so bytes are read.
    with open(path, "rb") as file:
        try:
            for line in file:
                number += 1
                if not line.endswith(b"\n"):
                    return
                yield json.loads(line)
        except ValueError as error:
            problem = f"{path}, line {number}, can't be read ({shorten(error)})"
            raise SettingsError(f"{problem}: put back what the run wrote") from error


def read_json(path: Path) -> Any:
    """Return what a file of JSON holds."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problem = f"{path} can't be read ({shorten(error)})"
        raise SettingsError(f"{problem}: put back what the run wrote") from error
