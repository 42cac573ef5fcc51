"""The files of a run, read by whoever looks at it; the run may still go on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import SettingsError, shorten
from finetune.files import Row


class RunFiles(NamedTuple):
    """What the folder of a run holds.

    places: where its files are, the first that has one counts. script: which made it.
    total_steps: of the whole run. report: None where the run has not ended.
    """

    places: list[Path]
    script: str
    settings: Row
    total_steps: int
    metrics: list[Row]
    report: Row | None

    def lines(self, name: str) -> Iterator[Row]:
        """Yield the rows of a file of JSON lines, none where there is no such file."""
        path = find(name, self.places)
        if path is not None:
            yield from read_lines(path)


def read_run(folder: Path, new: Path | None = None) -> RunFiles:
    """Return what a folder holds; raise SettingsError where it is none of a run.

    new: where those files are that have not moved there yet.
    """
    places = [folder] if new is None else [new, folder]
    if not folder.is_dir():
        raise SettingsError(f"{folder} is no folder: name OUTPUT_DIR of a run")
    metrics_path, run_path = find("metrics.jsonl", places), find("run.json", places)
    if metrics_path is None or run_path is None:
        lacking = "metrics.jsonl" if metrics_path is None else "run.json"
        raise SettingsError(f"{folder} has no {lacking}: name OUTPUT_DIR of a run")
    metrics = list(read_lines(metrics_path))
    if not metrics:
        raise SettingsError(f"{folder} has no step yet: wait until the first is done")

    # The report of an earlier end says nothing of a run that went on.
    run, report_path = read_json(run_path), find("report.json", places)
    report = None if report_path is None else read_json(report_path)
    if report is not None and report["samples"] != metrics[-1]["samples"]:
        report = None
    return RunFiles(places, run["script"], run["settings"], run["total_steps"], metrics, report)


def find(name: str, places: list[Path]) -> Path | None:
    """Return the path of a file in the first of the folders that has it."""
    for place in places:
        if (place / name).is_file():
            return place / name
    return None


def read_lines(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines, but for a last line that is being written."""
    number = 0
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for line in file:
                number += 1
                if line.endswith("\n"):
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
