"""The policy and its base model, measured alike before the results are saved."""

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.errors import RunError
from finetune.files import Row
from finetune.measurement import Measured, draw, make_report, write_measured
from finetune.output import whole_results, write_report
from finetune.processes import is_main_process, random_numbers, share_out
from finetune.progress import Metrics
from finetune.prompts import is_turn, last_said
from finetune.sampling import sample_responses
from finetune.saving import as_saved, save_model
from finetune.scale import Scale, scale_of
from finetune.summary import summarize
from finetune.tokens import encode
from finetune.watch import add_page


def measure_scale(learner: Any, rows: list[Row]) -> Scale:
    """Return the scale on which the base model's scores have mean 0 and deviation 1.

    learner: what takes part in a run, as train_rlhf.py has it; so below.
    """
    samples = learner.settings.scale_samples
    if samples == 0:
        return Scale()
    measured = measure(learner, rows, samples, number=0, base=True)
    return scale_of(torch.tensor(measured.scores, dtype=torch.float64))


def measure_and_save(learner: Any, rows: list[Row], eval_rows: list[Row], metrics: Metrics) -> None:
    """Measure the base model and the policy alike; save and show what came of it."""
    settings, model = learner.settings, learner.policy.pretrained_model
    samples = settings.eval_samples
    print(f"\nMeasuring before and after, {samples} samples each time", flush=True)
    base = {"train_prompts": measure(learner, rows, samples, number=1, base=True)}
    if eval_rows:
        base["eval_prompts"] = measure(learner, eval_rows, samples, number=2, base=True)

    # What is saved is what is measured.
    learner.policy.unquantize()
    model = learner.policy.pretrained_model
    with as_saved(model, settings.output_dir):
        trained = {"train_prompts": measure(learner, rows, samples, number=1, base=False)}
        if eval_rows:
            trained["eval_prompts"] = measure(learner, eval_rows, samples, number=2, base=False)

    report = make_report(
        base,
        trained,
        scale=replace(learner.scale, threshold=learner.threshold),
        is_chat=is_turn(rows[0]["prompt"], settings.chat_template),
        model=model,
        settings=settings,
        metrics=metrics,
        score_is=learner.scorer.meaning,
    )
    if is_main_process():
        with whole_results(settings.output_dir) as folder:
            save_model(model, learner.tokenizer, settings, folder)
            scores = base["train_prompts"].scores
            draw(report, scores, metrics, folder / "training.png")
            write_report(report, summarize(report, "."), folder)
            write_measured(base, trained, folder / "measured.jsonl")
        add_page(Path(settings.output_dir))
    print(summarize(report, os.path.join(".", settings.output_dir)), flush=True)


def measure(learner: Any, rows: list[Row], samples: int, number: int, base: bool) -> Measured:
    """Return what the policy, or the base model, says to so many prompts.

    number: tells the random numbers of a measurement from those of another.
    """
    settings = learner.settings
    rows = spread(rows, samples)
    key = (settings.seed, 0, number)
    numbers = random_numbers(key, len(rows), settings.max_new_tokens)
    measured = share_out(sample_and_compare, rows, numbers, learner=learner, base=base)
    check_numbers(measured)
    return measured


def sample_and_compare(
    rows: list[Row], numbers: torch.Tensor, learner: Any, base: bool
) -> Measured:
    """Return the score of a response to each row, and how far it is from the base model."""
    settings, tokenizer, trainer = learner.settings, learner.tokenizer, learner.trainer
    queries = encode(tokenizer, rows, settings.chat_template)

    # The base model is the policy with its adapter off.
    with trainer.optional_peft_ctx() if base else nullcontext():
        responses, texts = sample_responses(
            learner.policy.pretrained_model,
            tokenizer,
            queries,
            numbers,
            batch_size=settings.eval_batch_size,
        )
    kls, ref_logprobs = trainer.compare_with_base(queries, responses, is_base=base)
    return Measured(
        prompts=[last_said(row["prompt"]) for row in rows],
        texts=texts,
        scores=learner.scorer(rows, texts),
        kls=kls,
        ref_logprobs=ref_logprobs,
        lengths=[len(response) for response in responses],
    )


def spread(rows: list[Row], samples: int) -> list[Row]:
    """Return so many rows, spread evenly over the given ones; fewer are each asked several times."""
    rows = rows[:: math.ceil(len(rows) / samples)]
    times = math.ceil(samples / len(rows))
    return [row for row in rows for _ in range(times)]


def check_numbers(measured: Measured) -> None:
    """Refuse a measurement with numbers that are none."""
    if not math.isfinite(sum(measured.kls)):
        raise RunError("the measurement is not finite: set DTYPE float32 or lower TARGET_APPROX_KL")
