"""Let a language model write instructions with answers, and keep those that are worth training on.

    python make_instructions.py                             # TinyLlama-1.1B-Chat, constants below
    python make_instructions.py --model-name demo_model     # the small model beside this: offline
    python make_instructions.py --help                      # every constant is also a flag
    python train_sft.py --data instructions/instructions.jsonl    # trains on what was kept

This is Self-Instruct (Wang et al. 2023, https://arxiv.org/abs/2212.10560). What a model as tiny as
demo_model writes means nothing, and next to none of it is kept: it shows that all works.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from finetune import command
from finetune.checks import check_alone, check_device, check_launch, check_output
from finetune.errors import shorten
from finetune.seed_tasks import SeedTasks, read_seed_tasks, texts_in
from finetune.settings import CommonSettings, Number, Text, TextsOrNone, Whole, changeable, limits

if command.is_script(globals()):
    command.watch_the_start()

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hub, or a local folder
OUTPUT_DIR = "instructions"  # all that a run leaves; an earlier run there is moved aside
QUANTIZATION = "none"  # 8bit or 4bit keep the weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda, mps (Apple) or cpu; auto = cuda where there is one, else cpu
DTYPE = "auto"  # float32, bfloat16, float16; auto = 16 bits on a GPU or a CPU with AMX, else 32

# --- Requests
SEED_TASKS = "auto"  # .jsonl, .json: rows of instruction, input, output; auto = twelve in finetune/
REQUESTS = 20  # how many times the model is asked for new instructions
EXAMPLES = 8  # tasks shown in a request; a quarter of them are its own, as soon as it has some
MAX_NEW_TOKENS = 300  # length of an answer in tokens, at most; never over half the model's context
TEMPERATURE = 0.7  # of new instructions, as in the paper; all else is greedy; 1.0 = as they are
TOP_P = 0.5  # only the likeliest tokens that sum to it, as in the paper; 1.0 = all tokens
BATCH_SIZE = 8  # answers generated at once; less saves memory

# --- Filters
MIN_WORDS = 4  # of an instruction; shorter ones say too little; 1 = off
MAX_WORDS = 150  # of an instruction; longer ones are rarely one task
ROUGE_LIMIT = 0.7  # ROUGE-L F1 with one that is kept: as high is too similar; 1 = same words
UNANSWERABLE = [  # an instruction with one of these whole words needs more than text; [] = off
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files",
    "map", "maps", "draw", "plot", "video", "videos", "audio", "music", "diagram", "flowchart",
]  # fmt: skip

# --- Run
SEED = 0  # the same seed on the same machine gives the same instructions
LOG_EVERY = 1  # requests between two lines of progress
RESUME = False  # go on after the last whole line of answers.jsonl in OUTPUT_DIR


# ------------------------------------------------------------------------- the settings
class Settings(CommonSettings):
    """What the constants may be, and which of them --resume may change."""

    # The tasks themselves have to stay the same, wherever they stand.
    seed_tasks: Text = changeable()
    requests: Whole = limits(1, 10**6, changeable=True)
    examples: Whole = limits(1, 10**6)
    max_new_tokens: Whole = limits(1, 10**6)
    temperature: Number = limits(0.01, 100)
    top_p: Number = limits(0.01, 1)
    batch_size: Whole = limits(1, 10**6, changeable=True)
    min_words: Whole = limits(1, 10**6)
    max_words: Whole = limits(1, 10**6)
    rouge_limit: Number = limits(0.01, 1)
    unanswerable: TextsOrNone


CHECKS = (read_seed_tasks, check_launch, check_device, check_alone, check_output)

# The libraries below take seconds to load: --help and bad settings are answered before.
if command.is_script(globals()):
    settings = command.settings_or_exit(globals(), Settings, CHECKS)
command.silence_loggers()

import torch

from finetune.answers import add_record, make_report, open_answers, read_answers, save_report, tally
from finetune.files import Row
from finetune.output import claim_output
from finetune.processes import device_name, join_processes, pick_device
from finetune.self_instruct import (
    candidates_in,
    draw_examples,
    in_turns,
    instance_prompt,
    instances_in,
    kept,
    kept_instructions,
    kind_prompt,
    list_prompt,
)
from finetune.writer import Writer


# ------------------------------------------------------------------------------ the run
def run(settings: Settings) -> None:
    """Do the whole run: load, ask, filter, write down, report."""
    # Look at the earlier run before anything is loaded.
    seeds = read_seed_tasks(settings.seed_tasks)
    tasks = seeds.tasks
    if settings.resume:
        read_answers(settings, tasks)

    device_type, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device_type)
    machine = device_name(device)
    writer = Writer(settings, device, dtype, list_prompt([]), texts_in(tasks))

    with claim_output(settings.output_dir, settings.resume):
        records = open_answers(settings, tasks)
        announce(writer, settings, seeds, records, machine, dtype)
        before = len(records)
        start = time.perf_counter()
        try:
            ask(writer, tasks, records, settings)
            seconds = time.perf_counter() - start
            report = make_report(settings, machine, dtype, records, before, seconds)
            save_report(report, settings.output_dir)
            print(summarize(report), flush=True)
        except BaseException as error:
            # This is what is told where the run ends.
            if records:
                saved = f"the answers to {len(records)} requests are saved"
                error.add_note(f"{saved}. To go on, run the same line with --resume")
            raise


def ask(writer: Writer, tasks: list[Row], records: list[Row], settings: Settings) -> None:
    """Make the requests that are still to do; write down each and add it to records."""
    before = len(records)
    start = time.perf_counter()
    with command.stop_on_signal(after_step=True) as stop:
        for number in range(before + 1, settings.requests + 1):
            record = answer_request(number, writer, tasks, records, settings)
            add_record(record, settings.output_dir)
            records.append(record)
            show_progress(records, before, start, settings)
            if stop.requested:
                break


def answer_request(
    number: int,
    writer: Writer,
    tasks: list[Row],
    records: list[Row],
    settings: Settings,
) -> Row:
    """Return the record of a request: what the model wrote, and what came of it."""
    # Each request has a seed of its own, so that a run can go on anywhere.
    torch.manual_seed(settings.seed * 10**6 + number)
    seeds = [task["instruction"] for task in tasks]
    written = kept_instructions(records)
    key = (settings.seed, number)
    examples = draw_examples(seeds, written, settings.examples, key)
    prompt, count = writer.fill(list_prompt, examples)

    # The paper shows eight, and stops after sixteen.
    ((answer, ended),) = writer.write(
        [prompt],
        stop=f"\n{2 * settings.examples + 1}.",
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
    )

    candidates = candidates_in(answer, ended, seeds + written, writer, settings)
    write_instances(kept(candidates), writer, tasks)
    return {
        "request": number,
        "examples": count,
        "answer": answer,
        "ended": ended,
        "candidates": candidates,
    }


def write_instances(candidates: list[Row], writer: Writer, tasks: list[Row]) -> None:
    """Let the model tell the kind of each candidate and write its instances.

    All that comes of it is put into the candidates.
    """
    labelled = [task for task in tasks if task["is_classification"]]
    others = [task for task in tasks if not task["is_classification"]]

    # Where few fit, there are both.
    mixed = in_turns(labelled, others)
    prompts = []
    for candidate in candidates:
        prompt, _ = writer.fill(kind_prompt, mixed, instruction=candidate["instruction"])
        prompts.append(prompt)
    answers = writer.write(prompts, stop="\n", new_tokens=5)
    for candidate, (answer, _) in zip(candidates, answers):
        candidate["kind_answer"] = answer
        candidate["is_classification"] = answer.strip().casefold().startswith("yes")

    prompts = []
    for candidate in candidates:
        is_classification = candidate["is_classification"]
        prompt, _ = writer.fill(
            instance_prompt,
            labelled if is_classification else others,
            instruction=candidate["instruction"],
            is_classification=is_classification,
        )
        prompts.append(prompt)
    answers = writer.write(prompts, stop="\nTask:")
    for candidate, (answer, ended) in zip(candidates, answers):
        instances = instances_in(answer, ended, candidate["is_classification"])
        candidate["instance_answer"] = answer
        candidate["instances"] = instances
        if not kept(instances):
            candidate["dropped"] = "no instance kept"


# -------------------------------------------------------------------- screen and report
def announce(
    writer: Writer,
    settings: Settings,
    seeds: SeedTasks,
    records: list[Row],
    machine: str,
    dtype: str,
) -> None:
    """Print what is going to happen, and on which machine: the device in words."""
    print(f"Model     {settings.model_name}, {dtype} weights, on {machine}")
    print(f"Seeds     {len(seeds.tasks)} tasks{seeds.tally.in_words()}")
    print(f"Requests  {settings.requests}, seed {settings.seed}")
    examples = [task["instruction"] for task in seeds.tasks][: settings.examples]
    _, fitting = writer.fill(list_prompt, examples)
    if fitting < len(examples) or writer.new_tokens < settings.max_new_tokens:
        room = f"about {fitting} examples fit into the rest"
        print(f"Context   {writer.context} tokens: {writer.new_tokens} for an answer, {room}")
    going_on = f", going on after request {len(records)}" if records else ""
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


def show_progress(records: list[Row], before: int, start: float, settings: Settings) -> None:
    """Print a line of progress where one is due, and the last instruction that was kept.

    before: how many requests were done at the start. start: its time, by perf_counter.
    """
    done, total = len(records), settings.requests
    if done % settings.log_every and done != total:
        return
    counts = tally(records)["instructions"]
    seconds = time.perf_counter() - start
    left = seconds / (done - before) * (total - done)
    figures = f"{counts['written']} instructions written, {counts['kept']} kept"
    print(f"request {done}/{total}, {left:.0f} s left, {figures}", flush=True)
    for candidate in kept(records[-1]["candidates"])[-1:]:
        print(f"    {shorten(candidate['instruction'])}", flush=True)


def summarize(report: dict[str, Any]) -> str:
    """Return the yield in words, and what trains on it."""
    counts = report["yield"]
    lines = [f"\n{counts['requests']} requests in all"]
    for name in ("instructions", "instances"):
        figures = counts[name]
        reasons = [f"{reason} {number}" for reason, number in figures["dropped"].items()]
        dropped = ", ".join(reasons) or "nothing"
        share = f"{figures['kept']} of {figures['written']}"
        lines.append(f"{name} kept: {share}; dropped: {dropped}")
    if counts["instances"]["kept"]:
        path = os.path.join(report["settings"]["output_dir"], "instructions.jsonl")
        lines.append(f"To train on them: python train_sft.py --data {shlex.quote(path)}")
    else:
        lines.append("Nothing was kept to train on: try a larger model, or more REQUESTS")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> int:
    """Make instructions, by the constants and flags in argv; return the exit status."""
    return command.run_main(run, argv, globals(), Settings, CHECKS)


if command.is_script(globals()):
    sys.exit(command.launch(run, settings))
elif __name__ == "__main__":  # a cell of a notebook
    main()
