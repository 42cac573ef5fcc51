"""The result of a run in Markdown: a table, what was said before and after, what to try."""

from pathlib import Path
from typing import Any

ROWS = (
    "score",
    "standard_error",
    "win_rate",
    "success_rate",
    "kl",
    "kl_minimum",
    "distinct",
    "perplexity_under_base",
)
TITLES = ("  base", "trained", "base, held out", "trained, held out")


def summarize(report: dict[str, Any], folder: str) -> str:
    """Return the result in Markdown, with what to try, and Python that loads the model.

    folder: where the model is, as that Python names it.
    """
    settings = report["settings"]
    before = report["base"]["train_prompts"]
    after = report["trained"]["train_prompts"]

    lines = [f"# {Path(settings['model_name']).name}, fine-tuned with PPO", ""]
    lines += table(report)
    lines += ["", what_was_done(report), ""]
    lines += first_responses(report)

    lines += ["", *verdict(before, after)]
    lines[-1] += advice(report)
    lines += [
        "",
        "The model is beside report.json and watch.html, which shows how it learned. To load it:",
        "",
    ]
    lines += [how_to_load(report, folder), ""]
    return "\n".join(lines)


def what_was_done(report: dict[str, Any]) -> str:
    """Return in a line how much was learned from, where, and how long that took."""
    samples = report["samples"]
    seconds = report["seconds"]
    device = report["device"]
    seed = report["settings"]["seed"]
    line = f"{samples} samples in {seconds:.0f} seconds on {device}"
    return f"{line}, seed {seed}. The first response to each prompt:"


def verdict(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return two lines with the scores before and after, and what they cost."""
    score_before = score_text(before)
    score_after = score_text(after)
    first = f"Score: {score_before} before, {score_after} after"
    first += f", a win rate of {after['win_rate']:.0%},"

    second = f"at {after['kl']:z.1f} nats from the base model."
    if before["success_rate"] is not None:
        rate_before = before["success_rate"]
        rate_after = after["success_rate"]
        second += f" Success: {rate_before:.1%} before"
        second += f", {rate_after:.1%} after."
    return [first, second]


def table(report: dict[str, Any]) -> list[str]:
    """Return the lines of a table, of base and trained model on all prompts."""
    columns = []
    for prompts in report["base"]:
        columns.append(report["base"][prompts])
        columns.append(report["trained"][prompts])
    titles = TITLES[: len(columns)]

    border = "|---" * (len(columns) + 1)
    lines = [table_row("", list(titles)), border + "|"]
    for name in ROWS:
        cells = []
        for title, figures in zip(titles, columns):
            value = figures[name]
            text = "-" if value is None else f"{value:z.3f}"
            cells.append(text.rjust(len(title)))
        lines.append(table_row(name, cells))
    return lines


def table_row(name: str, cells: list[str]) -> str:
    """Return a line of the table."""
    return f"| {name:21} | {' | '.join(cells)} |"


def first_responses(report: dict[str, Any]) -> list[str]:
    """Return the lines that show what was said to the first six prompts of each kind."""
    lines = []
    for prompts, figures in report["base"].items():
        ending = " (held out)" if prompts == "eval_prompts" else ""
        before = figures["first_sample"]
        after = report["trained"][prompts]["first_sample"]
        for prompt in list(before)[:6]:
            asked = in_a_line(prompt)
            lines.append(f"    {asked}{ending}")
            lines.append("        before  " + in_a_line(before[prompt]))
            lines.append("        after   " + in_a_line(after[prompt]))
    return lines


def in_a_line(text: str) -> str:
    """Return a text with single spaces between its words."""
    return " ".join(text.split())


def score_text(figures: dict[str, Any]) -> str:
    """Return a mean score with its standard error."""
    score = figures["score"]
    error = figures["standard_error"]
    return f"{score:+z.2f} ± {error:.2f}"


def advice(report: dict[str, Any]) -> str:
    """Return lines with what to try, where a run did not do well, and whom it believed."""
    before = report["base"]["train_prompts"]
    after = report["trained"]["train_prompts"]
    text = ""
    if not report["close_to_base"]:
        text = "\nLittle is left of it: lower LEARNING_RATE, TARGET_APPROX_KL or raise KL_COEF."
    elif before["standard_error"] == after["standard_error"] == 0:
        text = "\nAll responses score the same: try words or prompts with which some are better."
    elif not report["learned"]:
        text = "\nBeyond chance this run did not learn: raise TRAINING_EPOCHS or lower KL_COEF."

    accuracy = report["scale"].get("accuracy")
    if accuracy is not None:
        text += "\nThe reward model, which says so, agrees"
        text += f" with {accuracy:.0%} of held-out comparisons."
    return text


def how_to_load(report: dict[str, Any], folder: str) -> str:
    """Return Python that loads the model and asks it one of the prompts, indented."""
    # There is no pipeline for an encoder-decoder.
    if report["encoder_decoder"]:
        load = "    from transformers import AutoModelForSeq2SeqLM\n\n"
        return load + f"    model = AutoModelForSeq2SeqLM.from_pretrained({folder!r})"

    prompt = next(iter(report["base"]["train_prompts"]["first_sample"]))
    asked = [{"role": "user", "content": prompt}] if report["chat"] else prompt
    load = "    from transformers import pipeline\n\n"
    return load + f'    print(pipeline("text-generation", {folder!r})({asked!r}))'
