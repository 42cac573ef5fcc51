"""Measure how learning depends on how many beginnings of a response are scored, MAX_PREFIXES.

    python benchmarks/prefixes.py                            # 5 seeds of each task: prefixes.md
    python benchmarks/prefixes.py "stories260K, 120 tokens"  # prints the rows of this task alone

Words that are rare, in responses of up to 40 and 120 tokens. The responses of demo_model end by
themselves after some 25 tokens, so the longer ones are those of stories260K, a model that is not
part of the project. Every run is a process of its own with one thread, as many at once as there
are cores.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import COLUMNS, MODELS, commit, row, run

SEEDS = range(5)
CALM = ["--positive-words", "calm", "serene", "peaceful", *MODELS["demo_model"]]
STORY = [*("--positive-words", "water", "garden", "house"), *MODELS["stories260K, story prompts"]]
TASKS = {  # name: flags, the length, and what MAX_PREFIXES is tried; 0 = all
    "demo_model, 40 tokens": (CALM, 40, (0, 20, 10)),
    "stories260K, 120 tokens": (STORY, 120, (0, 40, 20)),
}
# One measurement has to do for the long ones.
FLAGS = ["--device", "cpu", "--dtype", "float32", "--eval-samples", "120"]


def main():
    """Run, and print and write the table."""
    names = sys.argv[1:] or list(TASKS)
    runs = []
    for name in names:
        flags, length, bounds = TASKS[name]
        for bound in bounds:
            more = ["--max-new-tokens", length, "--max-prefixes", bound, *FLAGS]
            runs += [(name, bound, seed, [*flags, *more]) for seed in SEEDS]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        figures = list(pool.map(lambda task: run("", task[3], task[2]), runs))
    rows = {}
    for (name, bound, _, _), result in zip(runs, figures):
        asked = f"at most {bound}" if bound else "all"
        rows.setdefault(f"{name}: {asked}", []).append(result)

    samples = figures[0]["samples"]
    seeds = f"seeds 0 to {SEEDS[-1]}, {samples} samples, float32, a CPU with one thread a run"
    lines = [f"Commit {commit()}, {seeds}.", "", f"| beginnings scored | {COLUMNS} |"]
    lines.append("|---|" + "---|" * len(COLUMNS.split("|")))
    lines += [row(name, results) for name, results in rows.items()]
    print("\n".join(lines))
    if not sys.argv[1:]:
        Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
