"""Teach a language model to answer as in examples: supervised fine-tuning, before PPO.

    python train_sft.py --data my_examples.jsonl    # TinyLlama, with the constants below
    python train_sft.py --model-name demo_model --data my_examples.jsonl    # offline
    python train_sft.py --help                      # every constant is also a flag

Rows of instruction, input and output, of prompt and completion, of messages, or of text.
What comes out is a model for train_rlhf.py and train_reward_model.py.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import command, watch
from finetune.checks import OF_TRAINING, check_shares
from finetune.data import Data, read_data
from finetune.errors import blame
from finetune.examples import (
    EXAMPLES,
    answers_in,
    chat_template_of,
    check_examples,
    check_template,
    forms_in_words,
)
from finetune.files import Row, hash_files
from finetune.settings import StageSettings, Switch, Text, Whole, limits

if command.is_script(globals()):
    command.watch_the_start()

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hub, or a local folder
OUTPUT_DIR = "sft_model"  # all that a run leaves; an earlier run there is moved aside
LORA_RANK = 16  # rank of the update of each adapted layer; less saves memory, more can express more
LORA_ALPHA = 32  # the update is multiplied by LORA_ALPHA / LORA_RANK
LORA_TARGETS = ["all-linear"]  # layers to adapt, by name; all-linear = all but the output head
LORA_DROPOUT = 0.0  # share of an adapter's inputs left out at random; helps with few rows; 0 = off
QUANTIZATION = "none"  # 8bit or 4bit keep the frozen weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda, mps (Apple) or cpu; auto = cuda where there is one, else cpu
DTYPE = "auto"  # float32, bfloat16, float16; auto = 16 bits on a GPU or a CPU with AMX, else 32

# --- Data
DATA = "instructions.jsonl"  # a file of examples: .jsonl, .csv, .parquet, …; or a name on the Hub
EVAL_SHARE = 0.1  # of the rows, drawn by SEED: never trained on, but measured
TEMPLATE = (  # of instructions and prompts; a paragraph with {input} is left out where it is empty
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MAX_LENGTH = 512  # tokens of an example; longer ones are cut, at the model's context at the latest

# --- Training
TRAINING_EPOCHS = 3  # passes over the rows; 0.1 = a tenth of a pass
BATCH_SIZE = 16  # examples for one update
MINI_BATCH_SIZE = 0  # examples at once, a divisor of BATCH_SIZE; memory grows with it; 0 = all
PACKING = False  # True = examples of a minibatch one after another, without padding; same loss
GROUP_BY_LENGTH = True  # examples of like length in a batch: less padding, but a bumpy loss
GRADIENT_CHECKPOINTING = False  # True saves memory, most with long examples; it is slower
LEARNING_RATE = "auto"  # at its highest; auto = from the model's width: 5e-4 at 2000
WARMUP_SHARE = 0.03  # of the steps, in which the rate rises; then it falls along a cosine; 0 = off
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0 = off

# --- Run
SEED = 0  # the same seed on the same machine gives the same run
EVAL_EVERY = 25  # steps between two held-out losses; 0 = only before and after
EVAL_BATCH_SIZE = 16  # held-out examples at once; less saves memory
MAX_NEW_TOKENS = 40  # length in tokens, at most, of the answers that are shown
LOG_EVERY = 10  # steps between two lines of progress in a log file
SAVE_EVERY = 50  # steps between two checkpoints; 0 = only where the run ends or is stopped
SAVE_ADAPTER = True  # the LoRA adapter alone, for PEFT, in adapter/ beside the model; False = off
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = []  # tensorboard, wandb, trackio: the metrics there too (pip install them); [] = off


# ------------------------------------------------------------------------- the settings
class Settings(StageSettings):
    """What the constants may be, and which of them --resume may change."""

    template: Text
    packing: Switch
    lora_rank: Whole = limits(1, 10**6)
    max_new_tokens: Whole = limits(1, 10**6, changeable=True)


CHECKS = (check_template, check_examples, *OF_TRAINING, check_shares)

# The libraries below take seconds to load: --help and bad settings are answered before.
if command.is_script(globals()):
    settings = command.settings_or_exit(globals(), Settings, CHECKS)
command.silence_loggers()

import torch
import transformers

from finetune.batches import make_collator
from finetune.checkpoint import check_resume
from finetune.held_out import answers, compare_answers, compare_figures, draw, losses_of, ratio
from finetune.hub import context_of, find_model
from finetune.labels import Learned, tokenize_data
from finetune.models import add_adapter, load_base_model
from finetune.output import claim_output, describe_run, whole_results, write_report
from finetune.processes import is_main_process, join_processes, pick_device, share_out
from finetune.progress import Metrics, count_steps
from finetune.saving import as_saved, save_model, unquantized
from finetune.shown import write_learned
from finetune.supervised import Stage, announce, fit
from finetune.tokens import check_ids, end_tokens, load_tokenizer


# ------------------------------------------------------------------------------ the run
def run(settings: Settings) -> None:
    """Do the whole run: read, tokenize, measure, train, measure again, save, show."""
    data = read_data(settings.data, settings.eval_share, settings.seed, EXAMPLES)
    files = hash_files([settings.data], by_name=True)
    # Look before anything is loaded.
    if settings.resume:
        check_resume(settings, count_steps(settings, answers_in(data.rows)), files)

    device_type, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device_type)
    model, tokenizer, learned, eval_learned = load_and_tokenize(settings, data, device, dtype)
    collate = make_collator(model, tokenizer, settings.packing)
    options = {"lora_dropout": settings.lora_dropout, "task_type": "CAUSAL_LM"}
    model = add_adapter(model, settings, **options)
    held_out = HeldOut(model, tokenizer, *eval_learned, settings)
    stage = Stage(model, learned.examples, collate, held_out.measure, settings, files, "train_sft")

    with claim_output(settings.output_dir, settings.resume):
        counts = f"{len(learned.examples)} examples to train on"
        counts += f", {len(eval_learned.examples)} held out{forms_in_words(learned.rows)}"
        announce(stage, dtype, counts, data.tally)
        write_learned(tokenizer, learned, eval_learned, Path(settings.output_dir, "learned.jsonl"))
        metrics, base = fit(stage)
        # What is saved is what is measured.
        model = unquantized(model)
        held_out = replace(held_out, model=model)
        with as_saved(model, settings.output_dir):
            trained = held_out.measure()
        report = make_report(stage, metrics, base, trained, learned.rows)

        # The model is asked as it was taught to be, and generates behind its padding.
        tokenizer.chat_template = chat_template_of(tokenizer, learned.rows, settings.template)
        tokenizer.padding_side = "left"
        if is_main_process():
            with whole_results(settings.output_dir) as folder:
                save_model(model, tokenizer, settings, folder)
                draw(report, metrics, folder / "training.png")
                write_report(report, summarize(report, "."), folder)
            watch.add_page(Path(settings.output_dir))
        print(summarize(report, os.path.join(".", settings.output_dir)), flush=True)


def load_and_tokenize(
    settings: Settings,
    data: Data,
    device: torch.device,
    dtype: str,
) -> tuple[Any, transformers.PreTrainedTokenizerBase, Learned, Learned]:
    """Return the model, its tokenizer, what is learned and what is held out of it."""
    remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = load_tokenizer(path)
        # Then positions need not be given.
        tokenizer.padding_side = "right"
        length = int(min(settings.max_length, context_of(path)))

        give = "name a model with a chat template that takes them, or give instruction and output"
        with blame("DATA", settings.data, give, length=600):
            learned, eval_learned = tokenize_data(tokenizer, data, settings.template, length)
        model: Any = load_base_model(path, device, dtype, settings.quantization)
        own_ids = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = end_tokens(own_ids, tokenizer)
        sequences = [row["input_ids"] for row in learned.examples + eval_learned.examples]
        check_ids(model, tokenizer, sequences)
    return model, tokenizer, learned, eval_learned


# ---------------------------------------------------------------------- the measurement
@dataclass(frozen=True)
class HeldOut:
    """The model to measure, and the examples that are held out, with their rows."""

    model: Any
    tokenizer: transformers.PreTrainedTokenizerBase
    examples: list[Row]
    rows: list[Row]
    settings: Settings

    def measure(self, whole: bool = True) -> Row:
        """Return the loss in nats a token; of the whole measurement six answers, too."""
        nats, counts = share_out(
            losses_of,
            self.examples,
            model=self.model,
            tokenizer=self.tokenizer,
            batch_size=self.settings.eval_batch_size,
        )
        loss, error = ratio(nats, counts)
        if not whole:
            return {"loss": loss}
        responses = answers(
            self.model,
            self.tokenizer,
            self.rows[:6],
            self.examples[:6],
            self.settings.max_new_tokens,
        )
        return {
            "loss": loss,
            "standard_error": error,
            "perplexity": math.exp(min(loss, 700)),
            "examples": len(self.examples),
            "tokens": sum(counts),
            "nats": nats,
            "counts": counts,
            "first_sample": responses,
        }


# --------------------------------------------------------------------------- the report
def make_report(
    stage: Stage,
    metrics: Metrics,
    base: Row,
    trained: Row,
    rows: list[Row],
) -> Row:
    """Return the content of report.json; base and trained are what was measured.

    The losses of the examples, by which the two are compared, do not stay in it.
    """
    before, after = base.pop("nats"), trained.pop("nats")
    falls = [first - last for first, last in zip(before, after)]
    fall, error = ratio(falls, trained.pop("counts"))
    del base["counts"]
    return {
        **describe_run(stage.model, stage.settings, metrics, tags=["sft"]),
        "learning_rate": stage.learning_rate,
        "base": base,
        "trained": trained,
        "learned": fall > 3 * error,
        "chat": any(row["form"] != "text" for row in rows),
    }


def summarize(report: Row, folder: str) -> str:
    """Return the result in Markdown, what to try, and Python that loads the model."""
    settings, base, trained = report["settings"], report["base"], report["trained"]
    name = Path(settings["model_name"]).name
    lines = [f"# {name}, taught by {Path(settings['data']).name}", ""]
    lines += compare_figures(base, trained, ["loss", "standard_error", "perplexity"])

    device, seed = report["device"], settings["seed"]
    where = f"{report['samples']} examples in {report['seconds']:.0f} seconds on {device}"
    lines += ["", f"{where}, seed {seed}. Answers to held-out prompts:", ""]
    lines += compare_answers(base["first_sample"], trained["first_sample"])

    advice = ""
    if not report["learned"]:
        remedy = "raise TRAINING_EPOCHS or LEARNING_RATE"
        advice = f"\nBeyond chance this run did not learn: {remedy}."
    prompt = next(iter(base["first_sample"]))
    asked = [{"role": "user", "content": prompt}] if report["chat"] else prompt
    losses = f"{base['loss']:.3f} before, {trained['loss']:.3f} after"
    lines.append(f"""
Loss: {losses}, in nats a token, each token counting
alike, over {trained["tokens"]} tokens of {trained["examples"]} held-out answers.{advice}

The model is beside report.json and watch.html, which shows how it learned. To load it:

    from transformers import pipeline

    print(pipeline("text-generation", {folder!r})({asked!r}))
""")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> int:
    """Fine-tune by the constants, overridden by flags in argv; return the exit status."""
    return command.run_main(run, argv, globals(), Settings, CHECKS)


if command.is_script(globals()):
    sys.exit(command.launch(run, settings))
elif __name__ == "__main__":  # a cell of a notebook
    main()
