"""Measure how fast train_rlhf.py is, where the time of a step goes, and how near that is to the floor.

    python benchmarks/throughput.py            # three models: throughput.md
    python benchmarks/throughput.py --whole    # the whole command on TinyLlama's shape, 90 steps
    python benchmarks/throughput.py --whole --training-epochs 25    # 15 steps: the README's table

Any flag of train_rlhf.py may follow; then the table is shown, but not written. The models are the
demo model and two random Llamas, of 246 million parameters and of TinyLlama's shape, whose words
mean nothing, so that only seconds and memory do. Beside each stands, measured in the same round,

- the way of the script that this one grew out of: one response after another, minibatches of 2,
  four epochs, TRL's step as it comes, an adapter on the q and v projections alone;
- the floor: the passes that a step can't do without, from their shapes, at the rate of a matrix
  product of that shape and at the memory bandwidth, both measured there and then.

Scoring is the base model's pass without its output head, whose work is among the updates: logits
are made there, a piece at a time. Each is a process of its own, in turn, for several rounds; the
table has medians.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from learning import ROOT, commit

sys.path.insert(0, str(ROOT))
SHAPES = {
    "246 M": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "TinyLlama's shape": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
STEPS = {"demo_model": 30, "246 M": 5, "TinyLlama's shape": 3}  # the first is not counted
PARTS = ("generation", "scoring", "updates", "rest")


# -------------------------------------------------------------------------------------- the models
def make_model(name, folder):
    """Save a random model of that shape, with the demo model's tokenizer, and return its folder."""
    if name == "demo_model":
        return ROOT / "demo_model"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, logging

    logging.disable_progress_bar()
    config = LlamaConfig(**SHAPES[name], vocab_size=32000, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo_model").save_pretrained(folder)
    return folder


# ------------------------------------------------------- what is measured, each in its own process
def ours(folder, steps, flags):
    """Return the median seconds of a step of train_rlhf.py, and of its parts."""
    import train_rlhf

    spent, marks = {"generation": 0.0, "scoring": 0.0, "step": 0.0}, []

    def timed(part, function):
        def call(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            synchronize()
            spent[part] += time.perf_counter() - start
            return result

        return call

    def mark(*arguments, **options):
        marks.append(spent | {"all": time.perf_counter()})
        return make_record(*arguments, **options)

    trainer, make_record = train_rlhf.ExactKLTrainer, train_rlhf.measurement.make_record
    train_rlhf.sample_responses = timed("generation", train_rlhf.sample_responses)
    trainer.ref_pass = timed("scoring", trainer.ref_pass)
    trainer.step = timed("step", trainer.step)
    train_rlhf.measurement.make_record = mark
    with tempfile.TemporaryDirectory() as output:
        options = ["--model-name", str(folder), "--output-dir", str(Path(output, "run"))]
        options += ["--training-epochs", str(steps * 10 / 6), "--eval-samples", "1"]
        status = train_rlhf.main([*options, "--save-every", "0", *flags])
        report = json.loads(Path(output, "run", "report.json").read_text())
    assert status == 0 and len(marks) == steps
    found = []
    for before, after in itertools.pairwise(marks):
        step = {part: after[part] - before[part] for part in after}
        updates, rest = step["step"] - step["scoring"], step["all"] - step["step"]
        rest -= step["generation"]
        found.append(step | {"updates": updates, "rest": rest})
    figures = {part: statistics.median(step[part] for step in found) for part in found[0]}
    figures["samples"] = report["settings"]["batch_size"]
    figures["epochs"] = report["settings"]["ppo_epochs"]
    figures["device"], figures["dtype"] = report["device"], report["dtype"]
    figures["memory"] = peak_memory()
    return figures


def original(folder, steps, flags):
    """Return the median seconds of a step done the way of the script that this one grew out of."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    import train_rlhf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLMWithValueHead(get_peft_model(model, lora)).to(device)
    model.is_peft_model = True
    config = PPOConfig(
        batch_size=10, mini_batch_size=2, accelerator_kwargs={"cpu": device == "cpu"}
    )
    trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer)
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": 10}
    sampling["pad_token_id"] = tokenizer.pad_token_id
    seconds = []
    for step in range(steps):
        prompts = [train_rlhf.PROMPTS[(step * 10 + i) % 6] for i in range(10)]
        start = time.perf_counter()
        queries = [tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in prompts]
        queries = [query.to(device) for query in queries]
        responses = [
            trainer.generate(query, return_prompt=False, **sampling)[0] for query in queries
        ]
        texts = [tokenizer.decode(response) for response in responses]
        scores = train_rlhf.positive_word_reward(prompts, texts)
        trainer.step(queries, responses, [torch.tensor(score) for score in scores])
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"all": statistics.median(seconds[1:]), "samples": 10, "memory": peak_memory()}


def floor(folder, steps, flags):
    """Return the seconds that the passes of a step need at the machine's own rates."""
    import torch
    from transformers import AutoConfig

    from finetune.processes import pick_device

    # In the dtype that the run has, which is 16 bits on a GPU and on a CPU with AMX.
    device, dtype_name = pick_device("auto", dtype_of(flags))
    dtype = getattr(torch, dtype_name)
    config = AutoConfig.from_pretrained(folder)
    hidden, wide = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    body = config.num_hidden_layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * wide)
    head = hidden * config.vocab_size
    size = torch.finfo(dtype).bits // 8
    batch, query, response = 10, 4, 10  # the prompts have 3 to 5 tokens

    count = max(2**28 // (hidden * wide * size), 1)  # weights that no cache holds
    weights = torch.randn(count, wide, hidden, device=device, dtype=dtype)

    def seconds(rows):
        """Return the time of a product of so many rows with all these weights."""
        rows = torch.randn(rows, hidden, device=device, dtype=dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(rows, weight)
            synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    rate = 2 * batch * (query + response) * weights.numel() / seconds(batch * (query + response))
    bandwidth, few = (weights.numel() * size / seconds(rows) for rows in (1, batch))

    def time_of(rows, head_rows):
        """Return the time of a forward pass: of its arithmetic or its weights, what is longer."""
        operations = 2 * (rows * body + head_rows * head)
        return max(operations / rate, (body + head) * size / bandwidth)

    generation = time_of(batch * query, batch) + (response - 1) * time_of(batch, batch)
    scoring = time_of(batch * (query + response), batch * response)
    figures = {"generation": generation, "scoring": scoring, "update": 2 * scoring}
    figures |= {"rate": rate, "bandwidth": bandwidth, "few": few}
    figures["weights"] = (body + 2 * head) * size
    return figures


def dtype_of(flags):
    """Return the DTYPE that the flags of train_rlhf.py ask for, auto where they don't."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--dtype", default="auto")
    return parser.parse_known_args(flags)[0].dtype


def synchronize():
    """Wait for a GPU, if there is one, so that what was timed is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory():
    """Return the most memory held so far in bytes: the GPU's where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------ the benchmark
def measure(way, folder, steps, flags):
    """Return what a way of this file gives in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    command += ["--steps", str(steps), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} of {folder} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rounds, way):
    """Return the medians of the numbers that a way gave in several rounds."""
    figures = dict(rounds[0][way])
    for name, value in figures.items():
        if not isinstance(value, str):
            figures[name] = statistics.median(each[way][name] for each in rounds)
    return figures


def row(name, rounds):
    """Return a model's row of the table."""
    new, least = median(rounds, "ours"), median(rounds, "floor")
    needed = least["generation"] + least["scoring"] + new["epochs"] * least["update"]
    speeds = [each["ours"]["samples"] / each["ours"]["all"] for each in rounds]
    before = [each["original"]["samples"] / each["original"]["all"] for each in rounds]
    ratio = statistics.median(ours / original for ours, original in zip(speeds, before))
    cells = [
        name,
        f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})",
        f"{statistics.median(before):.2f}",
        f"{ratio:.1f}",
        f"{new['all']:.2f}",
        *(f"{new[part]:.2f}" for part in PARTS),
        f"{needed:.2f}",
        f"{needed / new['all']:.0%}",
        f"{new['memory'] / 1e9:.1f}",
        f"{least['weights'] / 1e9:.2f}",
    ]
    rates = f"- {name}: {least['rate'] / 1e9:.0f} GFLOP/s for a forward pass; weights are read at"
    rates += f" {least['bandwidth'] / 1e9:.0f} GB/s for one row, which is what the floor takes, and"
    rates += f" at {least['few'] / 1e9:.0f} GB/s for ten rows, which is what the library reaches."
    return "| " + " | ".join(cells) + " |", rates, new


def whole(flags):
    """Run the whole command on TinyLlama's shape, and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("TinyLlama's shape", Path(folder, "model"))
        command = [sys.executable, ROOT / "train_rlhf.py", "--model-name", "model", *flags]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True)
        total = time.perf_counter() - start
        output = Path(folder, "trained_model")
        report = json.loads((output / "report.json").read_text())
        disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    if not report["device"].startswith("CPU"):
        memory = report["peak_memory_mb"] / 1e3
    steps = report["samples"] / report["settings"]["batch_size"]
    print(f"\n{report['device']}, {report['dtype']}: {report['samples']} samples")
    print(f"in {report['seconds'] / 60:.1f} minutes, {report['seconds'] / steps:.2f} s a step;")
    print(f"the whole command {total / 60:.1f} minutes,")
    print(f"{memory:.2f} GB at the peak, {disk:.1f} GB on the disk")


def main():
    """Run, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--models", nargs="+", default=list(STEPS), choices=list(STEPS))
    add("--rounds", type=int, default=3, help="of each model (default: %(default)s)")
    add("--whole", action="store_true", help="the whole command on TinyLlama's shape")
    for name in ("--way", "--folder", "--steps"):
        add(name, help=argparse.SUPPRESS)  # of the processes that this one starts
    options, flags = parser.parse_known_args()
    if options.way:
        ways = {"ours": ours, "original": original, "floor": floor}
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            figures = ways[options.way](options.folder, int(options.steps), flags)
        print(json.dumps(figures))
        return
    if options.whole:
        whole(flags)
        return
    rows, rates, machine = [], [], ""
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(name, folder)
            rounds = []
            for _ in range(options.rounds):
                ways = ("ours", "original", "floor")
                rounds.append({way: measure(way, model, STEPS[name], flags) for way in ways})
        line, rate, figures = row(name, rounds)
        rows.append(line)
        rates.append(rate)
        machine = f"{figures['device']}, {figures['dtype']}"
    columns = "samples/s (lowest, highest) | original's | times | s/step | "
    columns += " | ".join(PARTS) + " | floor, s/step | of the floor | peak, GB | weights, GB"
    lines = [f"Commit {commit()}, {machine} ({platform.machine()}, {os.cpu_count()} cores), "]
    lines[0] += f"medians of {options.rounds} rounds."
    lines += ["", f"| | {columns} |", "|---|" + "---|" * len(columns.split(" | ")), *rows, ""]
    lines += ["Rates measured beside, medians too:", "", *rates]
    table = "\n".join(lines) + "\n"
    print(table)
    if not flags and options.models == list(STEPS):
        (ROOT / "benchmarks" / "throughput.md").write_text(table)


if __name__ == "__main__":
    main()
