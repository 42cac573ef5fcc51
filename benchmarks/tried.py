"""Measure ways to learn from fewer samples that were tried, beside the script as it is.

    python benchmarks/tried.py      # tried.md, three seeds: half an hour
    python benchmarks/tried.py 5    # so many seeds: the table is shown, but not written

None of them is in train_rlhf.py: they are other settings, or functions below that change the script
before it runs. They are here so that nobody has to try them again, and because they tell what
limits the learner. The last rows have more samples: what more steps and less noise would give.
"""

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from learning import COLUMNS, MODELS, RARE, STORIES, commit, row, run

FIRST_SAMPLES = 240  # as many as are measured before and after
TASKS = {"demo_model": MODELS["demo_model"]}
RARE_TASK = "stories260K: dog, cat, bird"
if STORIES.is_dir():
    TASKS[RARE_TASK] = RARE[RARE_TASK]


# ----------------------------------------------------------- the numbers that sample tokens
def numbers_even_in_a_batch(script):
    """Give each place of the responses of a step numbers from all parts of (0, 1]."""
    draw = script.processes.random_numbers

    def draw_evenly(key, count, length):
        generator = torch.Generator().manual_seed(key[0] * 10**6 + key[1])
        ranks = [torch.randperm(count, generator=generator) for _ in range(length)]
        return (torch.stack(ranks, 1) + draw(key, count, length)) / count

    script.processes.random_numbers = draw_evenly


def numbers_even_over_visits(script):
    """Let the numbers of a prompt's successive visits be spread evenly: a Kronecker sequence."""
    draw, batch_of_step = script.processes.random_numbers, script.batch_of_step
    primes = [prime for prime in range(2, 200) if all(prime % n for n in range(2, prime))]
    steps = torch.tensor(primes, dtype=torch.float64).sqrt() % 1
    visits = []

    def remember_visits(step, rows, size, seed):
        batch = batch_of_step(step, rows, size, seed)
        visits.clear()
        for index, drawn in enumerate(batch, start=(step - 1) * size):
            epoch = index // len(rows)
            visits.append((epoch, rows.index(drawn)))
        return batch

    def draw_evenly(key, count, length):
        if key[1] == 0 or count != len(visits):
            return draw(key, count, length)
        numbers = torch.empty(count, length)
        for i, (epoch, place) in enumerate(visits):
            start = draw((key[0], 10**6, place), 1, length)[0]
            numbers[i] = (start + epoch * steps[:length]) % 1
        return numbers.clamp(min=1e-7)

    script.batch_of_step = remember_visits
    script.processes.random_numbers = draw_evenly


# ------------------------------------------------------------------------- the prompts
def prompts_that_fail(script):
    """Draw prompts by the share of their responses that failed lately, from step 15 on."""
    batch_of_step, make_record = script.batch_of_step, script.measurement.make_record
    successes, batch = {}, []

    def draw_failing(step, rows, size, seed):
        if step < 15:
            batch[:] = batch_of_step(step, rows, size, seed)
        else:
            weights = [1.15 - successes.get(row["prompt"], 0.0) for row in rows]
            batch[:] = random.Random(seed * 10**6 + step).choices(rows, weights, k=size)
        return batch[:]

    def remember_successes(step, texts, scores, *others, **options):
        for each, score in zip(batch, scores):
            before = successes.get(each["prompt"], 0.0)
            successes[each["prompt"]] = 0.8 * before + 0.2 * (score > 0)
        return make_record(step, texts, scores, *others, **options)

    script.batch_of_step = draw_failing
    script.measurement.make_record = remember_successes


def many_samples_first(script):
    """Let the first step learn from many samples of the base model: 4 passes of 4 updates."""
    batch_of_step, step = script.batch_of_step, script.ExactKLTrainer.step
    make_record = script.measurement.make_record

    def draw_many(number, rows, size, seed):
        if number > 1:
            return batch_of_step(number, rows, size, seed)
        return batch_of_step(number, rows, FIRST_SAMPLES, seed)

    def learn_from_many(trainer, queries, responses, token_scores):
        usual = trainer.config.mini_batch_size, trainer.config.ppo_epochs
        if len(queries) == FIRST_SAMPLES:
            trainer.config.mini_batch_size, trainer.config.ppo_epochs = 60, 4
        result = step(trainer, queries, responses, token_scores)
        trainer.config.mini_batch_size, trainer.config.ppo_epochs = usual
        return result

    def count_all(number, texts, *others, **options):
        record = make_record(number, texts, *others, **options)
        if number > 1:
            record["samples"] = FIRST_SAMPLES + (number - 1) * len(texts)
        return record

    script.batch_of_step = draw_many
    script.measurement.make_record = count_all
    script.ExactKLTrainer.step = learn_from_many


# -------------------------------------------------------------------------- the critic
def critic_that_sees_the_end(script):
    """Let what the critic expects shrink with the tokens that are left to say it in."""
    forward, make_policy = script.PolicyWithValueHead.forward, script.make_policy

    def remember_length(model, tokenizer, settings):
        script.PolicyWithValueHead.longest = settings.max_new_tokens
        return make_policy(model, tokenizer, settings)

    def shrinking(policy, earned, **inputs):
        states, values = forward(policy, earned=earned, **inputs)
        places = torch.arange(earned.shape[1], device=earned.device)
        return states, values * (1 - places / policy.longest)

    script.PolicyWithValueHead.longest = 1
    script.make_policy = remember_length
    script.PolicyWithValueHead.forward = shrinking


VARIANTS = {  # name: flags, and the function above that changes the script
    "as it is": ([], None),
    "numbers even in a batch": ([], numbers_even_in_a_batch),
    "numbers even over visits": ([], numbers_even_over_visits),
    "prompts that fail": ([], prompts_that_fail),
    "many samples first": ([], many_samples_first),
    "critic that sees the end": ([], critic_that_sees_the_end),
    "LORA_RANK 64": (["--lora-rank", 64, "--lora-alpha", 128], None),
    "BATCH_SIZE 5": (["--batch-size", 5], None),
    "twice the TARGET_APPROX_KL": (["--target-approx-kl", 0.016], None),
    "270 steps of 10": (["--training-epochs", 450], None),
    "90 steps of 30": (["--training-epochs", 450, "--batch-size", 30], None),
}


def run_variant(task, variant, seed):
    """Return the figures of one run."""
    flags, change = VARIANTS[variant]
    patch = ""
    if change is not None:
        patch = f"sys.path.append({str(Path(__file__).parent)!r})\nimport tried\n"
        patch += f"tried.{change.__name__}(train_rlhf)"
    return run(patch, [*TASKS[task], *flags], seed)


def main():
    """Run all, and print and write the table."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    runs = [(task, variant, seed) for task in TASKS for variant in VARIANTS for seed in seeds]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(run_variant, *zip(*runs))
        figures = dict(zip(runs, results))

    lines = [
        f"Commit {commit()}, seeds 0 to {seeds[-1]}, float32, a CPU with one thread a run; 900 samples,",
        f"{FIRST_SAMPLES - 10} more with many samples first, three times as many in the last two rows of",
        "each model. Where prompts are drawn that fail, the last 200 samples are of harder prompts.",
        "",
        f"| | {COLUMNS} |",
        "|---|" + "---|" * len(COLUMNS.split("|")),
    ]
    for task in TASKS:
        for variant in VARIANTS:
            found = [figures[task, variant, seed] for seed in seeds]
            lines.append(row(f"{task}: {variant}", found))
    print("\n".join(lines))
    if len(sys.argv) == 1:
        Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
