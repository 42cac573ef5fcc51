"""Learn from comparisons what people prefer: a reward model, between SFT and PPO.

    python train_reward_model.py --data my_pairs.jsonl    # with the constants below
    python train_reward_model.py --model-name sft_model --data my_pairs.jsonl
    python train_reward_model.py --score "I am happy." "I am sad."    # by that model
    python train_rlhf.py --model-name sft_model --reward reward_model

Rows of chosen and rejected, with a prompt or without; of completion_0, completion_1 …
and their ranking; or of a text and its label, 0 or 1. Texts or conversations.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import command, watch
from finetune.checks import OF_TRAINING, check_shares
from finetune.comparisons import COMPARISONS, check_data, check_head
from finetune.data import read_data
from finetune.errors import blame
from finetune.files import Row, hash_files
from finetune.settings import StageSettings, TextsOrNone, Whole, changeable, limits

if command.is_script(globals()):
    command.watch_the_start()

# --- Model
MODEL_NAME = "sft_model"  # a language model or a classifier: a folder, or a name on the Hub
OUTPUT_DIR = "reward_model"  # all that a run leaves; an earlier run there is moved aside
LORA_RANK = 16  # rank of the update of each adapted layer; 0 = the body is frozen, the head learns
LORA_ALPHA = 32  # the update is multiplied by LORA_ALPHA / LORA_RANK
LORA_TARGETS = ["all-linear"]  # layers to adapt, by name; all-linear = all but the head
LORA_DROPOUT = 0.0  # share of an adapter's inputs left out at random; helps with few rows; 0 = off
QUANTIZATION = "none"  # 8bit or 4bit keep the frozen weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda, mps (Apple) or cpu; auto = cuda where there is one, else cpu
DTYPE = "auto"  # float32, bfloat16, float16; auto = 16 bits on a GPU or a CPU with AMX, else 32

# --- Data
DATA = "pairs.jsonl"  # a file of comparisons: .jsonl, .csv, .parquet, …; or a name on the Hub
EVAL_SHARE = 0.1  # of the rows, drawn by SEED: never trained on, but measured
MAX_LENGTH = 512  # tokens of a text; longer ones lose their beginning

# --- Training
TRAINING_EPOCHS = 3  # passes over the comparisons; 0.1 = a tenth of a pass
BATCH_SIZE = 16  # comparisons for one update
MINI_BATCH_SIZE = 0  # comparisons at once, a divisor of BATCH_SIZE; memory grows with it; 0 = all
GROUP_BY_LENGTH = True  # texts of like length in a batch: less padding, but a bumpy loss
GRADIENT_CHECKPOINTING = False  # True saves memory, most with long texts; it is slower
LEARNING_RATE = "auto"  # at its highest; auto = from the width: 5e-4 at 2000, at most 3e-3
WARMUP_SHARE = 0.03  # of the steps, in which the rate rises; then it falls along a cosine; 0 = off
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to this norm; 0 = off

# --- Run
SCORE = []  # texts, or files of them, to score with the model in OUTPUT_DIR; [] = train it
SEED = 0  # the same seed on the same machine gives the same run
EVAL_EVERY = 25  # steps between two held-out accuracies; 0 = only before and after
EVAL_BATCH_SIZE = 32  # held-out texts at once; less saves memory
LOG_EVERY = 10  # steps between two lines of progress in a log file
SAVE_EVERY = 50  # steps between two checkpoints; 0 = only where the run ends or is stopped
SAVE_ADAPTER = True  # the LoRA adapter alone, for PEFT, in adapter/ beside the model; False = off
RESUME = False  # go on from the checkpoint in OUTPUT_DIR
REPORT_TO = []  # tensorboard, wandb, trackio: the metrics there too (pip install them); [] = off


# ------------------------------------------------------------------------- the settings
class Settings(StageSettings):
    """What the constants may be, and which of them --resume may change."""

    score: TextsOrNone = changeable()
    lora_rank: Whole = limits(0, 10**6)


CHECKS = (check_data, check_head, *OF_TRAINING, check_shares)

# The libraries below take seconds to load: --help and bad settings are answered before.
if command.is_script(globals()):
    settings = command.settings_or_exit(globals(), Settings, CHECKS)
command.silence_loggers()

import torch
import transformers
from torch.nn.functional import logsigmoid

from finetune.batches import ComparisonCollator
from finetune.checkpoint import check_resume
from finetune.heads import load_with_head, save_with_head, show_scores
from finetune.held_out import Judged, compare_figures, comparison_figures, draw, end_line
from finetune.judged import row_count, sequences_of, tokenize_comparisons
from finetune.output import claim_output, describe_run, whole_results, write_report
from finetune.processes import is_main_process, join_processes, pick_device, share_out
from finetune.progress import Metrics, count_steps, progress
from finetune.saving import as_saved, unquantized
from finetune.shown import write_compared
from finetune.supervised import Stage, announce, fit
from finetune.tokens import check_ids


# ------------------------------------------------------------------------------ the run
def run(settings: Settings) -> None:
    """Do the whole run: read, tokenize, measure, train, measure again, save, show."""
    device_type, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device_type)
    if settings.score:
        show_scores(settings, device)
        return

    data = read_data(settings.data, settings.eval_share, settings.seed, COMPARISONS)
    files = hash_files([settings.data], by_name=True)
    # Look before anything is loaded.
    if settings.resume:
        comparisons = [pair for row in data.rows for pair in row]
        check_resume(settings, count_steps(settings, comparisons), files)

    model, tokenizer = load_with_head(settings, device, dtype)
    form, examples, eval_examples = tokenize_comparisons(tokenizer, data, settings)
    with blame("MODEL_NAME", settings.model_name, "name another language model or classifier"):
        check_ids(model, tokenizer, sequences_of(examples + eval_examples))
    collate = ComparisonCollator(tokenizer)
    held_out = HeldOut(model, collate, eval_examples, settings.eval_batch_size)
    project = "train_reward_model"
    # With a higher rate little is learned: benchmarks/rates.md.
    stage = Stage(model, examples, collate, held_out.measure, settings, files, project, 3e-3)
    with claim_output(settings.output_dir, settings.resume):
        counts = f"{row_count(examples)} rows with {len(examples)} comparisons"
        counts += f", {row_count(eval_examples)} rows held out"
        announce(stage, dtype, counts, data.tally)
        metrics, base = fit(stage, ComparisonTrainer)
        # What is saved is what is measured.
        model = unquantized(model)
        held_out = replace(held_out, model=model)
        with as_saved(model, settings.output_dir):
            judged = share_out(held_out.judge, eval_examples)
        trained = comparison_figures(eval_examples, judged)
        # A scorer reads these.
        scale = {"score_mean": trained["score_mean"], "score_std": trained["score_std"]}
        more = {"score_accuracy": trained["accuracy"], "conversation_form": form}
        model.config.update(scale | more)
        report = make_report(stage, metrics, base, trained)
        if is_main_process():
            with whole_results(settings.output_dir) as folder:
                save_with_head(model, tokenizer, settings, folder)
                draw(report, metrics, folder / "training.png")
                write_report(report, summarize(report), folder)
                write_compared(eval_examples, judged.scores, folder / "compared.jsonl")
            watch.add_page(Path(settings.output_dir))
        print(summarize(report), flush=True)


# ----------------------------------------------------------------------------- the loss
class ComparisonTrainer(transformers.Trainer):
    """The Trainer of transformers with the loss of Bradley and Terry (1952)."""

    def compute_loss(
        self,
        model: Any,
        inputs: Row,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Return the mean of -ln P(better preferred), P = sigmoid(margin), in nats."""
        # What several processes train is wrapped, and has no dtype.
        unwrapped: Any = self.model
        margins, _ = margins_of(model, inputs, unwrapped.dtype)
        return -logsigmoid(margins).mean()


def margins_of(
    model: Any,
    batch: Mapping[str, Any],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the better text's score less the worse one's, and the scores of all texts.

    batch: as from ComparisonCollator. dtype: of the model. Returns float32, (comparisons,)
    and (texts,).
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    owners, signs = batch["owners"], batch["signs"]
    uses_16_bits = dtype != torch.float32
    with torch.autocast(signs.device.type, dtype, enabled=uses_16_bits):
        scores = model(**inputs).logits[:, 0].float()
    margins = torch.zeros(int(owners[-1]) + 1, device=scores.device)
    return margins.index_add(0, owners, signs * scores), scores


# ---------------------------------------------------------------------- the measurement
@dataclass(frozen=True)
class HeldOut:
    """The model to measure, and the comparisons that are held out."""

    model: Any
    collate: ComparisonCollator
    examples: list[Row]
    batch_size: int

    def measure(self, whole: bool = True) -> Row:
        """Return loss and accuracy; of the whole measurement all that is told of it."""
        judged = share_out(self.judge, self.examples)
        figures = comparison_figures(self.examples, judged)
        if whole:
            return figures
        return {"loss": figures["loss"], "accuracy": figures["accuracy"]}

    def judge(self, examples: list[Row]) -> Judged:
        """Return what the model says of each comparison."""
        margins: list[float] = []
        scores: list[list[float]] = []
        self.model.eval()
        for start in progress(range(0, len(examples), self.batch_size)):
            comparisons = examples[start : start + self.batch_size]
            batch = self.collate(comparisons).to(self.model.device)
            with torch.no_grad():
                values, texts_scores = margins_of(self.model, batch, self.model.dtype)
            margins += values.tolist()
            counts = [len(one["texts"]) for one in comparisons]
            scores += [of_one.tolist() for of_one in texts_scores.split(counts)]
        return Judged(margins, scores)


# --------------------------------------------------------------------------- the report
def make_report(stage: Stage, metrics: Metrics, base: Row, trained: Row) -> Row:
    """Return the content of report.json; base and trained are what was measured."""
    # Of a few comparisons all may be right by chance, with a standard error of 0.
    error = max(trained["standard_error"], 0.5 / trained["comparisons"] ** 0.5)
    tags, task = ["reward-model"], "text-classification"
    return {
        **describe_run(stage.model, stage.settings, metrics, tags, task),
        "learning_rate": stage.learning_rate,
        "learned": trained["accuracy"] - 3 * error > trained["guessing"],
        "base": base,
        "trained": trained,
    }


def summarize(report: Row) -> str:
    """Return the result in Markdown, what to try, and the line that trains on it."""
    settings = report["settings"]
    base = report["base"]
    trained = report["trained"]
    source = Path(settings["data"]).name
    lines = [f"# A reward model from {source}", ""]
    figures = ["accuracy", "standard_error", "guessing", "loss", "margin"]
    lines += compare_figures(base, trained, figures)

    where = f"{report['samples']} comparisons in {report['seconds']:.0f} seconds"
    where += f" on {report['device']}, seed {settings['seed']}."
    lines += ["", where, ""]
    lines += ["The held-out texts that score highest and lowest:", ""]
    for text, score in trained["first_sample"].items():
        lines.append(f"    {score:+6.2f}  {end_line(text)}")

    advice = ""
    if not report["learned"]:
        remedy = "take more comparisons or TRAINING_EPOCHS"
        advice = f"\nThat is no better than guessing: {remedy}."
    accuracy = f"{trained['accuracy']:.1%}"
    accuracy += f" ± {trained['standard_error']:.1%}"
    comparisons = f"{trained['comparisons']} held-out comparisons"
    by_chance = f"guessing is right in {trained['guessing']:.0%}"
    scale = f"(raw - {trained['score_mean']:.3f}) / {trained['score_std']:.3f}"
    folder = shlex.quote(settings["output_dir"])
    lines.append(f"""
Right: {accuracy} of {comparisons}, where {by_chance}.{advice}
A score is {scale}: 0 is as likely chosen as rejected.

The model is beside report.json and watch.html, which shows how it learned. To use it:

    python train_rlhf.py --reward {folder}
    python train_reward_model.py --output-dir {folder} --score "I feel good."
""")
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> int:
    """Learn by the constants, overridden by flags in argv; return the exit status."""
    return command.run_main(run, argv, globals(), Settings, CHECKS)


if command.is_script(globals()):
    sys.exit(command.launch(run, settings))
elif __name__ == "__main__":  # a cell of a notebook
    main()
