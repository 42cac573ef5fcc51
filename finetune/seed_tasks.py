"""The tasks that Self-Instruct begins with."""

# They are read before the heavy libraries are loaded, so nothing here imports any.
import json
from pathlib import Path
from typing import Any

from finetune.data import Row, read_table
from finetune.errors import blame, shorten

SEED_TASKS = Path(__file__).with_name("seed_tasks.jsonl")


def read_seed_tasks(seed_tasks: str) -> list[Row]:
    """Return the tasks to begin with: those beside this file for auto, or the rows of another.

    A task has an instruction, an input that may be empty, an output, and is_classification: whether
    its output is one of a few fixed labels.
    """
    path = str(SEED_TASKS) if seed_tasks == "auto" else seed_tasks
    remedy = "give a .jsonl or .json file, its rows with instruction, input and output"
    with blame("SEED_TASKS", seed_tasks, remedy):
        rows = read_table(path)
        if not rows:
            raise ValueError("it has no tasks")
        return [task_of(row, number) for number, row in enumerate(rows, start=1)]


def task_of(row: Any, number: int) -> Row:
    """Return the seed task in a row, with an empty input and of no class where it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is {shorten(row)}, not in braces")
    task: Row = {}
    for name in ("instruction", "input", "output"):
        text = value_of(row, name, default="")
        is_lacking = not str(text).strip() and name != "input"
        if is_lacking or not isinstance(text, str):
            raise ValueError(f"row {number}: its {name} is {shorten(text)}, not a text")
        task[name] = text.strip()

    label = value_of(row, "is_classification", default=False)
    if not isinstance(label, bool):
        problem = f"its is_classification is {shorten(label)}, not true or false"
        raise ValueError(f"row {number}: {problem}")
    task["is_classification"] = label

    # An error for half a character, which could not be written.
    json.dumps(task, ensure_ascii=False).encode()
    return task


def value_of(row: Row, name: str, default: Any) -> Any:
    """Return what a row has of that name, the default where that is nothing or null."""
    value = row.get(name)
    return default if value is None else value
