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
    where = f"{report['samples']} samples in {report['seconds']:.0f} seconds on {report['device']}"
    lines += ["", f"{where}, seed {settings['seed']}. The first response to each prompt:", ""]
    lines += first_responses(report)

    scores = f"Score: {score_text(before)} before, {score_text(after)} after"
    success = ""
    if before["success_rate"] is not None:
        success = f" Success: {before['success_rate']:.1%} before"
        success += f", {after['success_rate']:.1%} after."
    lines.append(f"""
{scores}, a win rate of {after["win_rate"]:.0%},
at {after["kl"]:z.1f} nats from the base model.{success}{advice(report)}

The model is beside report.json and training.png. To load it:

{how_to_load(report, folder)}
""")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> list[str]:
    """Return the lines of a table, of base and trained model on all prompts."""
    columns = []
    for prompts in report["base"]:
        columns += [report["base"][prompts], report["trained"][prompts]]
    titles = TITLES[: len(columns)]
    lines = [f"| {'':21} | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name in ROWS:
        cells = []
        for title, figures in zip(titles, columns):
            value = figures[name]
            text = "-" if value is None else f"{value:z.3f}"
            cells.append(text.rjust(len(title)))
        lines.append(f"| {name:21} | {' | '.join(cells)} |")
    return lines


def first_responses(report: dict[str, Any]) -> list[str]:
    """Return the lines that show what was said to the first six prompts of each kind."""
    lines = []
    for prompts, figures in report["base"].items():
        ending = " (held out)" if prompts == "eval_prompts" else ""
        after = report["trained"][prompts]["first_sample"]
        for prompt, text in list(figures["first_sample"].items())[:6]:
            lines.append(f"    {in_a_line(prompt)}{ending}")
            lines.append(f"        before  {in_a_line(text)}")
            lines.append(f"        after   {in_a_line(after[prompt])}")
    return lines


def in_a_line(text: str) -> str:
    """Return a text with single spaces between its words."""
    return " ".join(text.split())


def score_text(figures: dict[str, Any]) -> str:
    """Return a mean score with its standard error."""
    return f"{figures['score']:+z.2f} ± {figures['standard_error']:.2f}"


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
