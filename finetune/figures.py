"""Figures as they are written down: finite, short, and those of the last samples."""

import math
from typing import Any

RECENT = 100  # samples, over which the means go that are shown, and that steer the learning rate


def without_bad_numbers(value: Any) -> Any:
    """Return a value in which each number, however deep, is finite or None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case list():
            return [without_bad_numbers(item) for item in value]
        case dict():
            names = value.keys()
            return dict(zip(names, without_bad_numbers([*value.values()])))
        case _:
            return value


def short(number: Any, digits: int = 4) -> Any:
    """Return a number with so many digits that count, None where it is not finite.

    Whole numbers, and what is no number, stay as they are.
    """
    if not isinstance(number, float):
        return number
    if not math.isfinite(number):
        return None
    return float(f"{number:.{digits}g}")


def recent_records(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of the steps in which the last RECENT samples were."""
    records = []
    for record in metrics[-RECENT:]:
        if record["samples"] > metrics[-1]["samples"] - RECENT:
            records.append(record)
    return records
