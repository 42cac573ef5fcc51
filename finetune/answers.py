"""What Self-Instruct has on disk: all that a model wrote, and the rows to train on among it.

answers.jsonl has a line with settings and seed tasks, then a record for each request. Whatever else
is there follows from it, so a run can go on after its last whole line.
"""

import json
import os
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.errors import SettingsError, blame, shorten
from finetune.files import Row
from finetune.output import unfinished
from finetune.self_instruct import kept
from finetune.settings import CommonSettings, fixed_settings

LIBRARIES = ("torch", "transformers", "rouge_score")


def read_answers(settings: Any, tasks: list[Row]) -> tuple[list[Row], bytes]:
    """Return the records of an earlier run, and the bytes of its whole lines, if it can go on.

    settings: those that --resume may not change, output_dir, seed_tasks and requests. Raises
    SettingsError where the rest would be of another run.
    """
    with blame("RESUME", True, "start without it"):
        content = Path(settings.output_dir, "answers.jsonl").read_bytes()
        # A killed run may have torn the last line.
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            raise ValueError("answers.jsonl has no whole line")
        first, *records = [json.loads(line) for line in whole.splitlines()]
        earlier, earlier_tasks = first["settings"], first["seed_tasks"]

    problems = []
    for name, value in fixed_settings(settings).items():
        if value != earlier.get(name):
            change = f"{name.upper()} is {shorten(value)}, but was {shorten(earlier.get(name))}"
            problems.append(f"{change}: give that or start anew")
    if tasks != earlier_tasks:
        change = f"SEED_TASKS is {shorten(settings.seed_tasks)}, whose tasks are not those so far"
        problems.append(f"{change}: give those or start anew")
    if len(records) > settings.requests:
        change = f"REQUESTS is {settings.requests}, but {len(records)} are done"
        problems.append(f"{change}: give at least that")
    if problems:
        raise SettingsError(*problems)
    return records, whole


def open_answers(settings: Any, tasks: list[Row]) -> list[Row]:
    """Make both files, or cut them to what is whole; return the records of what is done."""
    answers = Path(settings.output_dir, "answers.jsonl")
    instructions = Path(settings.output_dir, "instructions.jsonl")
    records: list[Row] = []
    if settings.resume:
        records, whole = read_answers(settings, tasks)
        os.truncate(answers, len(whole))
        instructions.unlink(missing_ok=True)
    else:
        append(answers, [{"settings": fixed_settings(settings), "seed_tasks": tasks}])

    rows = []
    for record in records:
        rows += rows_of(record)
    append(instructions, rows)
    return records


def add_record(record: Row, folder: str) -> None:
    """Write down the record of a request, and the rows to train on that it gave."""
    append(Path(folder, "answers.jsonl"), [record])
    append(Path(folder, "instructions.jsonl"), rows_of(record))


def rows_of(record: Row) -> list[Row]:
    """Return the rows to train on that a request gave."""
    rows = []
    for candidate in kept(record["candidates"]):
        for instance in kept(candidate["instances"]):
            row = {"instruction": candidate["instruction"]}
            row |= {"input": instance["input"], "output": instance["output"]}
            rows.append(row)
    return rows


def append(path: Path, rows: list[Row]) -> None:
    """Append rows to a .jsonl file, a line for each."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(lines))


def make_report(
    settings: CommonSettings,
    machine: str,
    dtype: str,
    records: list[Row],
    before: int,
    seconds: float,
) -> dict[str, Any]:
    """Return what report.json says of a run.

    machine: the device in words. before: how many requests were done when the run began.
    seconds: since then.
    """
    return {
        "settings": settings.model_dump(),
        "versions": {library: version(library) for library in LIBRARIES},
        "device": machine,
        "dtype": dtype,
        "seconds": seconds,
        "requests_in_these_seconds": len(records) - before,
        "yield": tally(records),
    }


def save_report(report: dict[str, Any], folder: str) -> None:
    """Write report.json, which is never torn."""
    new = unfinished(folder) / "report.json"
    new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    new.replace(Path(folder, "report.json"))


def tally(records: list[Row]) -> dict[str, Any]:
    """Return the yield: how many requests, what they wrote, what was kept, what dropped and why."""
    candidates = []
    for record in records:
        candidates += record["candidates"]
    instances = []
    for candidate in candidates:
        instances += candidate.get("instances", [])
    return {
        "requests": len(records),
        "instructions": count_kept(candidates),
        "instances": count_kept(instances),
    }


def count_kept(candidates: list[Row]) -> dict[str, Any]:
    """Return how many candidates, or instances, were written, kept, and dropped for each reason."""
    dropped = Counter(row["dropped"] for row in candidates if row["dropped"])
    return {
        "written": len(candidates),
        "kept": len(kept(candidates)),
        "dropped": dict(dropped.most_common()),
    }
