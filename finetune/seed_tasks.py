"""The tasks that Self-Instruct begins with."""

# They are read before the heavy libraries are loaded, so nothing here imports any.
from pathlib import Path
from typing import NamedTuple

from finetune.data import FILE_REMEDY, read_each
from finetune.dialogues import read_answered
from finetune.errors import blame, shorten
from finetune.fields import Fields, LeftOut, Tally, as_switch
from finetune.files import Row, read_table

SEED_TASKS = Path(__file__).with_name("seed_tasks.jsonl")
REMEDY = "give rows with instruction, input and output, or with instances of these"


class SeedTasks(NamedTuple):
    """The tasks to begin with, and what is told of the rows that they stand in."""

    tasks: list[Row]
    tally: Tally


def read_seed_tasks(seed_tasks: str) -> SeedTasks:
    """Return the tasks to begin with: those beside this file for auto, or the rows of another.

    A task has an instruction, an input that may be empty, an output, and is_classification: whether
    its output is one of a few fixed labels.
    """
    path = str(SEED_TASKS) if seed_tasks == "auto" else seed_tasks
    tally = Tally()
    with blame("SEED_TASKS", seed_tasks, FILE_REMEDY):
        table = read_table(path, by_name=True)
    with blame("SEED_TASKS", seed_tasks, REMEDY, length=600):
        tasks = read_each(table, task_of, tally)
        if not tasks:
            raise ValueError(f"it has no tasks: {tally.reasons() or 'it is empty'}")
    return SeedTasks(tasks, tally)


def texts_in(tasks: list[Row]) -> list[str]:
    """Return all texts of the tasks."""
    return [value for task in tasks for value in task.values() if isinstance(value, str)]


def task_of(given: Row | str, tally: Tally) -> Row:
    """Return the seed task in a row, with an empty input and of no class where it has none."""
    fields = Fields(given)
    is_classification = False
    if fields.is_filled("is_classification"):
        name = "is_classification"
        is_classification = as_switch(fields.take(name), name)
    row = {name: fields.row[name] for name in fields.row if name != "is_classification"}

    # As Self-Instruct has them: an instruction, and instances of it, of which the first is shown.
    if fields.is_filled("instances"):
        instances = fields.take_list("instances")
        if not isinstance(instances[0], dict):
            raise ValueError(f"its instances has {shorten(instances[0])}, not in braces")
        tally.changed["instances after the first"] += len(instances) - 1
        row = {name: row[name] for name in row if name != "instances"} | instances[0]

    dialogue = read_answered(row, tally)
    is_marked = dialogue.turns[-1].get("weight") == 0
    if dialogue.form == "text" or len(dialogue.turns) != 2 or is_marked:
        raise LeftOut("that are no instruction with an answer")
    asked, answer = dialogue.turns
    instruction = asked["content"].strip()
    if not instruction or not answer["content"].strip():
        raise LeftOut("without an instruction or an answer")
    return {
        "instruction": instruction,
        "input": asked.get("input", ""),
        "output": answer["content"].strip(),
        "is_classification": is_classification,
    }
