"""The curves of a page: figures of the steps, and means of the last of them."""

import math
from typing import Any

from finetune.figures import RECENT, recent_records, short
from finetune.files import Row

POINTS = 400  # of a curve, at most


def curve_of(script: str, metrics: list[Row]) -> Row:
    """Return the figures of all steps, or of an even choice, that the script's page draws.

    mean_… are means of the last 100 samples, as the screen has them.
    """
    single: list[str] = []
    averaged = ["loss"]
    if script == "train_rlhf":
        single = ["scaled", "kl"]
        averaged = ["scaled", "kl", "reward"]
        metrics = [record | {"scaled": scaled_score(record)} for record in metrics]

    curve: Row = {"step": []}
    for name in single:
        curve[name] = []
    for name in averaged:
        curve[f"mean_{name}"] = []
    for step in points_of(range(1, len(metrics) + 1)):
        curve["step"].append(step)
        record = metrics[step - 1]
        for name in single:
            curve[name].append(short(record[name]))
        for name in averaged:
            mean = recent_mean(metrics, step, name)
            curve[f"mean_{name}"].append(mean)

    # What was measured on held-out rows, of few steps, is kept whole.
    held_out = []
    for record in metrics:
        if record.get("eval_loss") is not None:
            held_out.append(record)
    curve["held_out"] = points_of(held_out)
    return curve


def scaled_score(record: Row) -> float | None:
    """Return a step's score as it was trained on: what was left of it, and the price put back."""
    left, kl = record["reward"], record["kl"]
    if left is None or kl is None:
        return None
    price = record["kl_coef"] * kl
    return float(left + price)


def is_scaled(metrics: list[Row]) -> bool:
    """Return whether scores were put on another scale before they were trained on."""
    for record in metrics:
        scaled = scaled_score(record)
        score = record["score"]
        if scaled is None or score is None:
            continue
        is_same = math.isclose(scaled, score, rel_tol=1e-6, abs_tol=1e-6)
        if not is_same:
            return True
    return False


def recent_mean(metrics: list[Row], step: int, name: str) -> float | None:
    """Return a mean over the last 100 samples, as it was after a step."""
    first = max(step - RECENT, 0)
    numbers = []
    for record in recent_records(metrics[first:step]):
        number = record.get(name)
        if number is not None:
            numbers.append(number)
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    return float(short(mean))


def points_of(values: Any) -> list[Any]:
    """Return all values, or an even choice of POINTS at most, and the last one."""
    every = math.ceil(len(values) / POINTS)
    return evenly(values, max(every, 1))


def evenly(values: Any, every: int) -> list[Any]:
    """Return every so manyth of the values, from the first on, and the last one."""
    chosen = list(values[::every])
    if len(values) and (len(values) - 1) % every:
        chosen.append(values[-1])
    return chosen
