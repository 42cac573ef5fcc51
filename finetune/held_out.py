"""What the stages before PPO measure on what is held out: figures, answers, and the picture."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.functional import cross_entropy, softplus

from finetune.errors import end_of, shorten
from finetune.files import Row
from finetune.progress import Metrics, progress, recent
from finetune.tokens import appends_end, prompt_ids, texts_of


# -------------------------------------------------------------------------- the figures
class Losses(NamedTuple):
    """The nats of each example, and of how many tokens they are the sum."""

    nats: list[float]
    counts: list[int]


def losses_of(
    examples: list[Row],
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    batch_size: int,
) -> Losses:
    """Return how well a model knows each of the examples, so many of them at once."""
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    nats: list[float] = []
    counts: list[int] = []
    model.eval()
    for start in progress(range(0, len(examples), batch_size)):
        batch = collate(examples[start : start + batch_size]).to(model.device)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        losses = cross_entropy(logits.mT, labels, reduction="none")
        nats += losses.sum(1).tolist()
        counts += (labels != -100).sum(1).tolist()
    return Losses(nats, counts)


class Judged(NamedTuple):
    """The margin of each comparison, and the scores of its texts."""

    margins: list[float]
    scores: list[list[float]]


def ratio(sums: list[float], counts: list[int]) -> tuple[float, float]:
    """Return the mean over all that is counted, and its standard error over the groups of it.

    sums, counts: of each group, such as the nats and the tokens of each example.
    """
    total = sum(counts)
    mean = sum(sums) / total
    squares = []
    for part, count in zip(sums, counts):
        difference = part - mean * count
        squares.append(difference**2)
    return mean, math.sqrt(sum(squares)) / total


def comparison_figures(examples: list[Row], judged: Judged) -> Row:
    """Return what is told of how a reward model judged the comparisons."""
    margins = torch.tensor(judged.margins, dtype=torch.float64)

    # A tie is right by half. The comparisons of a row go together.
    right = (margins.sign() + 1) / 2
    rows = torch.tensor([example["row"] for example in examples])
    accuracy, error = ratio(rows.bincount(right).tolist(), rows.bincount().tolist())

    scores: dict[str, float] = {}
    for example, its_scores in zip(examples, judged.scores):
        scores.update(zip(example["texts"], its_scores))
    all_scores = torch.tensor(list(scores.values()), dtype=torch.float64)
    mean = all_scores.mean().item()
    deviation = all_scores.std(correction=0).item() or 1.0
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)
    shown = best_first[:3] + best_first[-3:]
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "guessing": guessing(examples),
        "loss": softplus(-margins).mean().item(),
        "margin": margins.mean().item(),
        "comparisons": len(examples),
        "score_mean": mean,
        "score_std": deviation,
        "calibration": calibration(margins, right),
        "first_sample": {text: (scores[text] - mean) / deviation for text in shown},
    }


def guessing(examples: list[Row]) -> float:
    """Return the accuracy of always naming the more frequent label, or of tossing a coin.

    examples: comparisons; those of a label have a single sign.
    """
    labels = []
    for example in examples:
        if len(example["signs"]) == 1:
            labels.append(example["signs"][0] > 0)
    share = sum(labels) / len(labels) if labels else 0.5
    return max(share, 1 - share)


def calibration(margins: torch.Tensor, right: torch.Tensor, bins: int = 5) -> list[Row]:
    """Return how sure the model was, from 0.5 to 1, and how often it was right, for each bin.

    margins: (comparisons,), the score of the better text less that of the worse. right: the same,
    1 where the model was right, 0.5 for a tie.
    """
    sure = torch.sigmoid(margins.abs())
    places = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    figures = []
    for place in places.unique():
        predicted = sure[places == place]
        observed = right[places == place]
        figures.append(
            {
                "predicted": predicted.mean().item(),
                "observed": observed.mean().item(),
                "comparisons": len(predicted),
            }
        )
    return figures


def compare_figures(base: Row, trained: Row, names: list[str]) -> list[str]:
    """Return the lines of a table in Markdown, of what was measured before and after."""
    lines = ["| held out | base | trained |", "|---|---|---|"]
    for name in names:
        lines.append(f"| {name} | {base[name]:.3f} | {trained[name]:.3f} |")
    return lines


# -------------------------------------------------------------------------- the answers
def answers(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: list[Row],
    examples: list[Row],
    max_new_tokens: int,
) -> dict[str, str]:
    """Return {what is asked: answer}, the likeliest tokens, up to the first end token.

    rows: as of read_example. examples: the same with their input_ids and labels.
    """
    texts = {}
    for row, example in zip(rows, examples):
        query = torch.tensor(query_of(tokenizer, row, example), device=model.device)
        response = generate(model, query, max_new_tokens)
        texts[row["shown"]] = texts_of(tokenizer, query, [response])[0]
    return texts


def query_of(
    tokenizer: transformers.PreTrainedTokenizerBase,
    row: Row,
    example: Row,
) -> list[int]:
    """Return the tokens before the first answer, or of a mere text those of its beginning."""
    ids, labels = example["input_ids"], example["labels"]
    if row["form"] == "text":
        shown = prompt_ids(tokenizer, row["shown"], drops_end=appends_end(tokenizer))
        return shown[: len(ids) - 1]

    first = 1
    while labels[first] == -100:
        first += 1
    return ids[:first]


def generate(model: Any, query: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Return the likeliest tokens after a query, both 1-D, as far as the model's context goes."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    with torch.no_grad():
        sequences = model.generate(
            query[None],
            attention_mask=torch.ones_like(query[None]),
            do_sample=False,
            max_new_tokens=min(max_new_tokens, context - len(query)),
        )
    return sequences[0, len(query) :]


def compare_answers(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return lines of what is asked, and what is answered before and after."""
    lines = []
    for prompt, answer in before.items():
        lines.append(f"    {short_line(prompt)}")
        lines.append(f"        before  {short_line(answer)}")
        lines.append(f"        after   {short_line(after[prompt])}")
    return lines


def end_line(text: str, length: int = 80) -> str:
    """Return the end of a text in one line: what is judged is behind what was asked."""
    return end_of(" ".join(text.split()), length)


def short_line(text: str) -> str:
    """Return a text in one line, shortened."""
    return shorten(" ".join(text.split()))


# -------------------------------------------------------------------------- the picture
def draw(report: Row, metrics: Metrics, path: Path) -> None:
    """Draw loss or accuracy over the examples, and whether the model is as sure as it should be."""
    # It takes a second to load.
    from matplotlib.figure import Figure

    bins = report["trained"].get("calibration")
    if bins:
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_learning(left, report, metrics, "accuracy", "share")
        draw_calibration(right, bins)
    else:
        figure = Figure(figsize=(7, 4.4), layout="constrained")
        draw_learning(figure.subplots(), report, metrics, "loss", "nats a token")
    figure.savefig(path, dpi=100)


def draw_learning(axes: Any, report: Row, metrics: Metrics, name: str, unit: str) -> None:
    """Draw a figure over the examples, in training and held out."""
    axes.set(title="Learning", xlabel="examples", ylabel=f"{name} ({unit})")
    if name in metrics[0]:
        samples = []
        means = []
        for step, record in enumerate(metrics, start=1):
            samples.append(record["samples"])
            means.append(recent(metrics[:step], name))
        axes.plot(samples, means, color="0.7", label="training, the last 100 examples")

    # Of most steps nothing was held out.
    samples = [0]
    values = [report["base"][name]]
    for record in metrics:
        value = record[f"eval_{name}"]
        if value is not None:
            samples.append(record["samples"])
            values.append(value)
    samples.append(report["samples"])
    values.append(report["trained"][name])
    axes.plot(samples, values, "o-", label="held out")
    axes.legend()


def draw_calibration(axes: Any, bins: list[Row]) -> None:
    """Draw how often the model is right over how sure it is."""
    axes.set(title="Calibration", xlabel="how sure it is", ylabel="how often it is right")
    axes.plot([0.5, 1], [0.5, 1], "k", label="as sure as it should be")
    predicted = [row["predicted"] for row in bins]
    observed = [row["observed"] for row in bins]
    axes.plot(predicted, observed, "o-", label="held-out comparisons")
    axes.legend()
