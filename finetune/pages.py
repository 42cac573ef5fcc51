"""What a page shows of a run: its steps, before and after, in numbers and texts."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from finetune.curves import POINTS, curve_of, evenly, is_scaled, recent_mean, scaled_score
from finetune.errors import end_of, shorten
from finetune.figures import short, without_bad_numbers
from finetune.files import Row
from finetune.prompts import last_said
from finetune.run_files import RunFiles, last_name
from finetune.words import word_spans

WORDS_SHOWN = 200
PROMPTS_SHOWN = 12  # of those to train on, and of those held out
PAIRS_SHOWN = 4  # of responses before and after, to each of these
LONGEST_TEXT = 400  # characters of a text of which there are many
STEPS_SHOWN = 30  # so many have to fit: a step takes no more room than that leaves

Size = Callable[[Any], int]  # of a value on the page, in bytes


def page_content(files: RunFiles, room: int, size: Size) -> Row:
    """Return the content of the page, which fills no more than so many bytes."""
    content = head_of(files)
    if files.script == "train_sft":
        examples = [
            line | {"asked": end_of(line["asked"], LONGEST_TEXT)}
            for line in files.lines("learned.jsonl")
        ]
        content |= {"answers": answers_of(files), "examples": examples}
    elif files.script == "train_reward_model":
        content["comparisons"] = compared_of(files)
    else:
        content["measured"] = measured_of(files)
        room -= size(content)
        content |= steps_of(files, room, size)
    return content


def head_of(files: RunFiles) -> Row:
    """Return what the page begins with: what run it is, its result and its curve."""
    settings, last = files.settings, files.metrics[-1]
    report = files.report or {}
    scale = report.get("scale", {})
    is_ppo = files.script == "train_rlhf"
    return {
        "script": files.script,
        "model": shorten(last_name(settings["model_name"])),
        "reward": settings.get("reward"),
        "is_rule": is_rule(files),
        "words": settings["positive_words"][:WORDS_SHOWN] if is_rule(files) else None,
        "data": settings.get("data"),
        "kl_coef": settings.get("kl_coef"),
        "score_prefixes": settings.get("score_prefixes"),
        "scored_places": files.scored_places if skips_some(files) else None,
        "is_scaled": is_ppo and is_scaled(files.metrics),
        "scale": scale or None,
        "seed": settings["seed"],
        "step": last["step"],
        "total_steps": files.total_steps,
        "samples": last["samples"],
        "seconds": last["seconds"],
        "device": report.get("device"),
        "learned": report.get("learned"),
        "results": results_of(files),
        "curve": curve_of(files.script, files.metrics),
    }


def is_rule(files: RunFiles) -> bool:
    """Return whether the reward is the script's own, which looks for POSITIVE_WORDS."""
    return files.settings.get("reward") == "positive_word_reward"


def skips_some(files: RunFiles) -> bool:
    """Return whether only some of the beginnings of a response are scored."""
    places = files.scored_places
    return places is not None and len(places) < files.settings["max_new_tokens"]


def results_of(files: RunFiles) -> Row | None:
    """Return the figures before and after, without what was said; None where it has no end."""
    if files.report is None:
        return None
    results: Row = {}
    for model in ("base", "trained"):
        figures = {}
        for name, value in files.report[model].items():
            if isinstance(value, dict):
                value = {key: value[key] for key in value if key != "first_sample"}
            if name != "first_sample":
                figures[name] = value
        results[model] = without_bad_numbers(figures)
    return results


# ---------------------------------------------------------------------------- the steps
def steps_of(files: RunFiles, room: int, size: Size) -> Row:
    """Return the steps with their responses, as many of them, evenly, as there is room for."""
    groups, last = kept_groups(files)
    steps = [step_of(group, files, room // STEPS_SHOWN, size) for group in groups]
    sizes = [size(step) + 1 for step in steps]
    every = 1
    while sum(evenly(sizes, every)) > room - 200:
        every += 1
    return {"steps": evenly(steps, every), "last_step_with_samples": last}


def kept_groups(files: RunFiles) -> tuple[list[list[Row]], int]:
    """Return the samples of each step that has tokens, or of some steps where none has.

    Returns also the last step that has samples, 0 where none has.
    """
    every = math.ceil(len(files.metrics) / POINTS)
    last = 0
    with_tokens: list[list[Row]] = []
    others: list[list[Row]] = []
    for group in by_step(files.lines("samples.jsonl")):
        step = group[0]["step"]
        # Samples are written before the step's metrics.
        if step > len(files.metrics):
            break
        last = step
        if any(sample.get("tokens") for sample in group):
            with_tokens.append(group)
        elif not with_tokens and (step - 1) % every == 0:
            others.append(group)
    return with_tokens or others, last


def by_step(samples: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the samples of each step, as a list."""
    group: list[Row] = []
    for sample in samples:
        if group and group[0]["step"] != sample["step"]:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def step_of(group: list[Row], files: RunFiles, room: int, size: Size) -> Row:
    """Return a step with as many of its responses as there is room for, and how many it had.

    Where a response is too long, its tokens are left out.
    """
    responses = []
    for sample in group:
        response = response_of(sample, files)
        if size(response) > room:
            response |= {"tokens": None} | marked_text(sample["response"], response["marks"])
        room -= size(response)
        if room < 0:
            break
        responses.append(response)
    step = group[0]["step"]
    record = files.metrics[step - 1]
    names = ("score", "success_rate", "kl", "kl_coef", "reward")
    figures = {name: short(record.get(name), 8) for name in names}
    return {
        "step": step,
        **figures,
        "scaled": short(scaled_score(record)),
        "mean_score": recent_mean(files.metrics, step, "score"),
        "mean_success_rate": recent_mean(files.metrics, step, "success_rate"),
        "count": len(group),
        "responses": responses,
    }


def response_of(sample: Row, files: RunFiles) -> Row:
    """Return a response as the page shows it, with the places of what made its score."""
    prompt, text = last_said(sample["prompt"]), sample["response"]
    tokens = sample.get("tokens")
    marks = best_tokens(tokens, files)
    if is_rule(files):
        marks = word_spans(text, files.settings["positive_words"], before=prompt)
    return {
        "prompt": end_of(prompt, LONGEST_TEXT),
        "response": text,
        "score": short(sample["score"], 8),
        "kl": short(sample["kl"]),
        "marks": marks,
        "tokens": tokens,
    }


def best_tokens(tokens: Row | None, files: RunFiles) -> list[tuple[int, int]]:
    """Return where the tokens begin and end that earned most, if any earned something.

    It is one, or as many as were scored together. Where only whole responses are scored,
    none is better than the others.
    """
    if not tokens or not files.settings["score_prefixes"]:
        return []
    scores = [score or 0 for score in tokens["score"]]
    if max(scores, default=0) <= 0:
        return []
    end = scores.index(max(scores)) + 1
    start = end - 1
    if files.scored_places is not None:
        start = max(place for place in files.scored_places if place < end)
    text = "".join(tokens["text"][start:end])
    last = len("".join(tokens["text"][:end]))
    return [(last - len(text.lstrip()), last)]


# ---------------------------------------------------------------------- before and after
def measured_of(files: RunFiles) -> list[Row]:
    """Return prompts with pairs of responses, before and after, to the same random numbers."""
    if files.report is None:
        return []
    by_prompt: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for line in files.lines("measured.jsonl"):
        responses = by_prompt.setdefault((line["prompts"], line["prompt"]), {})
        responses.setdefault(line["model"], []).append(line)

    shown = []
    counts = {"train_prompts": 0, "eval_prompts": 0}
    for (prompts, prompt), responses in by_prompt.items():
        counts[prompts] += 1
        if counts[prompts] > PROMPTS_SHOWN:
            continue
        pairs = list(zip(responses["base"], responses["trained"]))[:PAIRS_SHOWN]
        row = {
            "prompt": end_of(prompt, LONGEST_TEXT),
            "held_out": prompts == "eval_prompts",
            "count": len(responses["base"]),
            "pairs": [[measured_response(line, files) for line in pair] for pair in pairs],
        }
        shown.append(row)
    return shown


def measured_response(line: Row, files: RunFiles) -> Row:
    """Return a response of a measurement as the page shows it."""
    marks: list[tuple[int, int]] = []
    if is_rule(files):
        words = files.settings["positive_words"]
        marks = word_spans(line["response"], words, before=line["prompt"])
    figures = {"score": short(line["score"], 8), "kl": short(line["kl"])}
    return figures | marked_text(line["response"], marks)


def answers_of(files: RunFiles) -> list[Row]:
    """Return what is asked of held-out rows, and what is answered before and after."""
    if files.report is None:
        return []
    before = files.report["base"]["first_sample"]
    after = files.report["trained"]["first_sample"]
    return [
        {
            "prompt": end_of(prompt, LONGEST_TEXT),
            "before": start_of(answer),
            "after": start_of(after[prompt]),
        }
        for prompt, answer in before.items()
    ]


# ----------------------------------------------------------------------------- the texts
def marked_text(text: str, marks: list[tuple[int, int]]) -> Row:
    """Return the beginning of a response, as far as it is shown, with the marks in it."""
    length = len(text) if len(text) <= LONGEST_TEXT else LONGEST_TEXT - 1
    shown = [mark for mark in marks if mark[1] <= length]
    return {"response": start_of(text), "marks": shown}


def start_of(text: str) -> str:
    """Return the beginning of a response, as far as it is shown."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def compared_of(files: RunFiles) -> list[Row]:
    """Return the held-out comparisons, each with the scores of its texts."""
    if files.report is None:
        return []
    comparisons = []
    for line in files.lines("compared.jsonl"):
        shown = {}
        for name, value in line.items():
            shown[name] = end_of(value, LONGEST_TEXT) if isinstance(value, str) else short(value)
        comparisons.append(shown)
    return comparisons
