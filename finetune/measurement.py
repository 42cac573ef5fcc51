"""What a policy was, and what it has become: figures, picture and summary."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.figures import RECENT, without_bad_numbers
from finetune.output import describe_run
from finetune.processes import device_name
from finetune.progress import Metrics, count_steps, recent, write_lines
from finetune.prompts import Prompts
from finetune.scale import Scale, success_rate
from finetune.scorers import Scorer

Figures = dict[str, Any]


class Measured(NamedTuple):
    """What a model said to prompts, and how it scored: lists with an item for each response.

    kls: KL(model || base model) in nats. ref_logprobs: of the base model, summed over the
    response. lengths: of the responses in tokens.
    """

    prompts: list[str]
    texts: list[str]
    scores: list[float]
    kls: list[float]
    ref_logprobs: list[float]
    lengths: list[int]


# ------------------------------------------------------------------------- during a run
def announce(
    policy: Any,
    settings: Any,
    prompts: Prompts,
    metrics: Metrics,
    scorer: Scorer,
) -> None:
    """Print what is going to happen.

    policy: as train_rlhf.py has it. prompts: those that fit into the model. metrics: of
    the steps that are done. scorer: the reward function.
    """
    model = policy.pretrained_model
    trained, total = model.get_nb_trainable_parameters()
    weight = model.get_input_embeddings().weight
    dtype = str(weight.dtype).removeprefix("torch.")

    held_out = f"{len(prompts.eval_rows)} held out"
    if prompts.eval_source == "EVAL_SHARE":
        held_out += f": EVAL_SHARE {settings.eval_share:g}, in place of EVAL_PROMPTS"
    held_out += prompts.tally.in_words(with_fields=scorer.text_before is not None)

    steps = count_steps(settings, prompts.rows)
    samples = steps * settings.batch_size
    going_on = f", going on after step {len(metrics)}" if metrics else ""

    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(model.device)}, {dtype} weights")
    if policy.head.layer is None:
        reason = "the output head is trained, or does not make them alone"
        print(f"Logits    kept whole, which takes memory: {reason}")
    print(f"Prompts   {len(prompts.rows)} to train on, {held_out}")
    meaning = f": {scorer.meaning}" if scorer.meaning else ""
    print(f"Reward    {settings.reward}{meaning}")
    print(f"Training  {samples} samples in {steps} steps, seed {settings.seed}")
    print(f"Shown     of each step: means of the last {RECENT} samples")
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


def make_record(
    step: int,
    texts: list[str],
    scores: list[float],
    stats: dict[str, float],
    scale: Scale,
    threshold: float | None,
    prompt_count: int,
) -> dict[str, Any]:
    """Return the line of metrics.jsonl for a step; what is not finite becomes None, JSON's null."""
    samples = step * len(texts)
    scaled = scale.apply(torch.tensor(scores).double()).mean().item()
    record = {
        "step": step,
        "samples": samples,
        "epoch": samples / prompt_count,
        "success_rate": success_rate(scores, threshold),
        "score": sum(scores) / len(scores),
        "reward": scaled - stats["kl_coef"] * stats["kl"],
        **stats,
        "distinct": len(set(texts)) / len(texts),
    }
    return dict(without_bad_numbers(record))


def progress_text(metrics: Metrics) -> str:
    """Return in words how the last 100 samples did."""
    rate = recent(metrics, "success_rate")
    score = recent(metrics, "score")
    kl = recent(metrics, "kl")
    text = f"score {score:+.2f}, KL {kl:z.2f}"
    return text if math.isnan(rate) else f"success {rate:4.0%}, {text}"


def warnings_of(metrics: Metrics, max_new_tokens: int) -> list[str]:
    """Return what the user should know of the last step."""
    lines = []
    skipped_updates = metrics[-1]["skipped_updates"]
    if skipped_updates:
        lines.append(f"updates skipped, since their numbers were not finite: {skipped_updates}")

    # More than a nat per token is far away. It is told once, when it gets there.
    kl, kl_before = recent(metrics, "kl"), recent(metrics[:-1], "kl")
    if kl > max_new_tokens and not kl_before > max_new_tokens:
        lines.append(f"the KL has run away to {kl:.1f} nats: lower TARGET_APPROX_KL, raise KL_COEF")

    scores = [record["score"] for record in metrics]
    if len(scores) == 10 and min(scores) == max(scores):
        lines.append(f"all scores are {scores[0]:g} so far: take words or prompts that vary them")
    return lines


# -------------------------------------------------------------------------- the figures
def make_report(
    base: dict[str, Measured],
    trained: dict[str, Measured],
    scale: Scale,
    is_chat: bool,
    model: Any,
    settings: Any,
    metrics: Metrics,
    score_is: str | None = None,
) -> dict[str, Any]:
    """Return the content of report.json.

    base, trained: what was measured, by the prompts: train_prompts and perhaps eval_prompts.
    scale: on which the scores were trained on. is_chat: whether prompts are asked in a template.
    score_is: what a classifier's score is, in words.
    """
    base_figures: dict[str, Figures] = {}
    trained_figures: dict[str, Figures] = {}
    for name, measured in base.items():
        figures = figures_of(measured, scale.threshold)
        base_figures[name] = figures | {"win_rate": 0.5, "kl_minimum": 0.0}

        figures = figures_of(trained[name], scale.threshold)
        figures["win_rate"] = win_rate(trained[name].scores, measured.scores)
        figures["kl_minimum"] = kl_minimum(figures["score"], measured.scores)
        trained_figures[name] = figures

    before, after = base_figures["train_prompts"], trained_figures["train_prompts"]
    rise = after["score"] - before["score"]
    error = error_of_rise(before, after)
    return describe_run(model, settings, metrics, ["trl", "ppo"]) | {
        "score_is": score_is,
        "scale": asdict(scale),
        "chat": is_chat,
        "learned": rise > 3 * error,  # beyond chance
        "close_to_base": after["kl"] <= settings.max_new_tokens,  # a nat per token
        "base": base_figures,
        "trained": trained_figures,
    }


def figures_of(measured: Measured, threshold: float | None) -> Figures:
    """Return the figures of a measurement; a score above the threshold is a success."""
    count = len(measured.texts)
    scores = torch.tensor(measured.scores, dtype=torch.float64)
    mean_ref_logprob = sum(measured.ref_logprobs) / sum(measured.lengths)

    first_sample: dict[str, str] = {}
    for prompt, text in zip(measured.prompts, measured.texts):
        first_sample.setdefault(prompt, text)

    return {
        "samples": count,
        "score": scores.mean().item(),
        "standard_error": scores.std(correction=0).item() / math.sqrt(count),
        "success_rate": success_rate(measured.scores, threshold),
        "kl": sum(measured.kls) / count,
        "distinct": len(set(measured.texts)) / count,
        "perplexity_under_base": math.exp(min(-mean_ref_logprob, 700)),
        "first_sample": first_sample,
    }


def win_rate(scores: list[float], base_scores: list[float]) -> float:
    """Return how often a response scores higher than the base model's; a tie is half a win."""
    wins = 0.0
    for score, base_score in zip(scores, base_scores):
        if score > base_score:
            wins += 1
        elif score == base_score:
            wins += 0.5
    return wins / len(scores)


def error_of_rise(before: Figures, after: Figures) -> float:
    """Return the standard error of how much the mean score rose."""
    # All of a few samples may score the same by chance, so that they show no spread. A third error,
    # which is large where samples are few, stands for what they do not show.
    rise = after["score"] - before["score"]
    least_error = rise / math.sqrt(2 * before["samples"])
    return math.hypot(before["standard_error"], after["standard_error"], least_error)


def kl_minimum(score: float, base_scores: list[float]) -> float | None:
    """Return the least KL of any policy with this mean score, None where all scores are one.

    It is the largest tilt * score - ln E[e^(tilt * score)] over all tilts (Donsker and Varadhan
    1983), E over samples of the base model.
    """
    if min(base_scores) == max(base_scores):
        return None
    all_scores = torch.tensor(base_scores, dtype=torch.float64)
    count = len(base_scores)
    mean, deviation = all_scores.mean(), all_scores.std()
    scores = (all_scores - mean) / deviation

    # The mean is kept half a sample off the best and the worst.
    kept = 1 - 0.5 / count
    wanted = (score - mean) / deviation
    wanted = wanted.clamp(kept * scores.min(), kept * scores.max())

    # Those of the other sign lower the mean.
    tilts = wanted.sign() * torch.logspace(-3, 3, 1000, dtype=torch.float64)
    log_means = torch.logsumexp(tilts[:, None] * scores, dim=1) - math.log(count)
    return max((tilts * wanted - log_means).max().item(), 0.0)


def write_measured(
    base: dict[str, Measured],
    trained: dict[str, Measured],
    path: Path,
) -> None:
    """Write a line for each response that was measured; by the prompts, as make_report has them."""
    lines = []
    for model, measurements in (("base", base), ("trained", trained)):
        for prompts, measured in measurements.items():
            columns = (measured.prompts, measured.texts, measured.scores, measured.kls)
            for prompt, text, score, kl in zip(*columns):
                line = {
                    "model": model,
                    "prompts": prompts,
                    "prompt": prompt,
                    "response": text,
                    "score": score,
                    "kl": kl,
                }
                lines.append(line)
    write_lines(path, lines)


# -------------------------------------------------------------------------- the picture
def draw(
    report: dict[str, Any], base_scores: list[float], metrics: Metrics, path: Path | str
) -> None:
    """Draw the learning curve, and the score against KL under the line of what is possible."""
    # It takes a second to load.
    from matplotlib.figure import Figure

    base = report["base"]["train_prompts"]
    trained = report["trained"]["train_prompts"]
    samples, scores, kls = learning_curve(metrics)

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning", xlabel="samples", ylabel="mean score")
    right.set(title="What it costs", xlabel="KL against the base model (nats per response)")
    for axes, x in ((left, samples), (right, kls)):
        axes.plot(x, scores, ".-", label="mean of the last 100 samples")
        axes.plot(0, base["score"], "ks", label="base model, measured")

    label = "trained model, measured"
    right.plot(trained["kl"], trained["score"], "*", markersize=15, label=label)
    if trained["kl_minimum"] is not None:
        reachable = torch.linspace(base["score"], max(base_scores), 50).tolist()
        least = [kl_minimum(score, base_scores) for score in reachable]
        right.plot(least, reachable, "k", label="least KL for a mean score")
    right.legend()
    figure.savefig(path, dpi=100)


def learning_curve(metrics: Metrics) -> tuple[list[int], list[float], list[float]]:
    """Return the samples so far, and the means of score and KL over the last 100 of them."""
    # Means of fewer samples would be noise.
    first = min(100, metrics[-1]["samples"])
    samples, scores, kls = [], [], []
    for step, record in enumerate(metrics, start=1):
        if record["samples"] >= first:
            samples.append(record["samples"])
            scores.append(recent(metrics[:step], "score"))
            kls.append(recent(metrics[:step], "kl"))
    return samples, scores, kls
