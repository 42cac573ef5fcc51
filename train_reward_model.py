"""Learn from comparisons what people prefer: a reward model, the stage between SFT and PPO.

    python train_reward_model.py --data my_pairs.jsonl    # TinyLlama, with the constants below
    python train_reward_model.py --model-name sft_model --data my_pairs.jsonl
    python train_reward_model.py --score "I am happy." "I am sad."    # by the model in OUTPUT_DIR
    python train_rlhf.py --model-name sft_model --reward reward_model

Rows of chosen and rejected, with a prompt or without; of completion_0, completion_1 … and their
ranking; or of a text and its label, 0 or 1. Texts or conversations.
"""

import shlex
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

# isort: off
# fmt: off
from train_rlhf import (
    SettingsError, add_adapter, base_of, blame, check_batches, check_installed, check_output,
    check_resume, claim_output, context_of, count_steps, describe_run, find_model, hash_files,
    join_processes, joined, launch, load_base_model, load_classifier, missing_quotes,
    pick_device, progress, read_rows, save_model, save_results, shorten, torch, transformers,
)
from train_sft import (
    STAGE_RULES, announce, check_alone, draw, fit, ratio, read_data, text_in,
)
# fmt: on
# isort: on

if __name__ == "__main__" and "__file__" in globals():
    sys.excepthook = missing_quotes

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
DATA = "pairs.jsonl"  # a .jsonl, .json, .csv or .parquet file of comparisons, or lines "1 a text"
EVAL_SHARE = 0.1  # of the rows, drawn by SEED: never trained on, but measured
MAX_LENGTH = 512  # tokens of a text; longer ones lose their beginning

# --- Training
TRAINING_EPOCHS = 3  # passes over the comparisons; 0.1 = a tenth of a pass
BATCH_SIZE = 16  # comparisons for one update
MINI_BATCH_SIZE = 0  # comparisons at once, a divisor of BATCH_SIZE; memory grows with it; 0 = all
GROUP_BY_LENGTH = True  # texts of like length in a batch: less padding, but a bumpy loss
GRADIENT_CHECKPOINTING = False  # True saves memory, most with long texts; it is slower
LEARNING_RATE = 2e-4  # at its highest; small models want more: 3e-3 for one of a million parameters
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


# ----------------------------------------------------------------------------------------- the run
def run(settings):
    """Do the whole run: read, tokenize, measure, train, measure again, save, show."""
    device, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device)
    if settings.score:
        show_scores(settings, device)
        return
    rows, eval_rows, left_out = read_comparisons(settings.data, settings.eval_share, settings.seed)
    files = hash_files([settings.data])
    if settings.resume:  # look before anything is loaded
        check_resume(settings, RULES, count_steps(settings, pairs_of(rows)), files)
    model, tokenizer = load_model(settings, device, dtype)
    examples = tokenize(tokenizer, pairs_of(rows))
    eval_examples = tokenize(tokenizer, pairs_of(eval_rows))
    measured = partial(measure, model, tokenizer, eval_examples, settings.eval_batch_size)

    with claim_output(settings.output_dir, settings.resume):
        told = f"{len(rows)} rows with {len(examples)} comparisons, {len(eval_rows)} rows held out"
        announce(model, settings, dtype, examples, told, left_out)
        kind = joined(ComparisonTrainer, transformers.Trainer)
        collate = partial(pad_batch, tokenizer)
        metrics, base = fit(kind, model, examples, collate, measured, settings, RULES, files)
        trained = measured()
        names = ("score_mean", "score_std", "score_accuracy")  # which train_rlhf.py reads
        model.config.update({name: trained[name.replace("score_acc", "acc")] for name in names})
        report = make_report(model, settings, metrics, base, trained)
        save = partial(save_trained, model, tokenizer, settings)
        picture = partial(draw, report, metrics)
        save_results(report, summarize(report), save, picture, settings.output_dir)
        print(summarize(report), flush=True)


def show_scores(settings, device):
    """Print the scores of given texts by the model in OUTPUT_DIR, as PPO would get them."""
    rows = read_rows("SCORE", settings.score, "auto")
    size = settings.eval_batch_size
    score, _ = load_classifier("OUTPUT_DIR", settings.output_dir, "", size, device)
    texts = [said_before(row) for row in rows]
    for text, number in zip(texts, score([""] * len(texts), texts)):
        print(f"{number:+8.3f}  {shorten(text)}", flush=True)


def save_trained(model, tokenizer, settings, folder):
    """Save the model, its adapter merged in and by itself too, or without one as it is."""
    if hasattr(model, "peft_config"):
        save_model(model, tokenizer, settings, folder)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------- the data
def read_comparisons(data, eval_share, seed):
    """Return the rows to train on, those held out, and a count of what was left out, by reason.

    A row is a list of comparisons, each of a better and a worse text; one of a label has None for
    what it is compared with, a text whose score is 0.
    """
    remedy = "give rows with chosen and rejected, completion_0 … and ranking, or text and label"
    return read_data(data, eval_share, seed, read_comparison, remedy)


def read_comparison(row, left_out):
    """Return a row's comparisons, None where nothing is preferred."""
    if "chosen" in row:
        before, ranked = said_before(row), [(0, row["chosen"]), (1, row["rejected"])]
        if not before and isinstance(row["chosen"], list):  # each a whole conversation
            before = said_before({"prompt": row["chosen"][:-1]})
    elif "ranking" in row:
        before, ranks = said_before(row), row["ranking"]
        if not isinstance(ranks, list) or f"completion_{len(ranks)}" in row:
            raise ValueError(f"its ranking is {shorten(ranks)}: give a rank for each completion")
        ranked = [(rank, row[f"completion_{number}"]) for number, rank in enumerate(ranks)]
    else:
        if list(row) == ["text"]:  # a line of a file of another kind
            label, _, text = row["text"].partition(" ")
            row = {"text": text, "label": label}
        if str(row["label"]) not in ("0", "1", "True", "False"):
            raise ValueError(f"its label is {shorten(row['label'])}: give 0 or 1")
        text = text_in(row, "text")
        pair = (text, None) if str(row["label"]) in ("1", "True") else (None, text)
        return [pair] if text.strip() else None
    answers = [(rank, joined_text(before, answer_in(answer))) for rank, answer in ranked]
    pairs = []
    for (rank, text), (other_rank, other_text) in combinations(answers, 2):
        if rank != other_rank and text != other_text:
            pairs.append((text, other_text) if rank < other_rank else (other_text, text))
    return pairs or None


def said_before(row):
    """Return what stands before the answers: a prompt, or a conversation with a line for each turn."""
    given = row.get("prompt") or row.get("conversations") or row.get("messages") or ""
    if isinstance(given, str):
        return given
    return "".join(answer_in(turn) + "\n" for turn in given)


def answer_in(answer):
    """Return the text of an answer: a text, a message, or the last of several."""
    if isinstance(answer, list) and answer:
        return answer_in(answer[-1])
    if isinstance(answer, dict):
        return text_in(answer, "content" if "content" in answer else "value")
    return text_in({"answer": answer}, "answer")


def joined_text(before, answer):
    """Return a prompt and its answer as one text, with a space where there is none between them."""
    apart = not before or before[-1].isspace() or answer[:1].isspace()
    return before + answer if apart else f"{before} {answer}"


def pairs_of(rows):
    """Return (row's number, better text, worse text) for each comparison of the rows."""
    return [(number, *pair) for number, row in enumerate(rows) for pair in row]


def tokenize(tokenizer, pairs):
    """Return the comparisons with their texts as input_ids, the sign of each, and both as texts."""
    examples = []
    for number, *texts in pairs:
        given = [(text, sign) for text, sign in zip(texts, (1.0, -1.0)) if text is not None]
        texts, signs = zip(*given)
        ids = [tokenizer(text, truncation=True)["input_ids"] for text in texts]
        example = {"row": number, "texts": texts, "signs": signs, "sequences": ids}
        examples.append(example | {"input_ids": max(ids, key=len)})
    return examples


def pad_batch(tokenizer, examples):
    """Return a batch of comparisons: all their texts, the sign of each, and whose it is."""
    sequences = [ids for example in examples for ids in example["sequences"]]
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    batch["signs"] = torch.tensor([sign for example in examples for sign in example["signs"]])
    owners = [place for place, example in enumerate(examples) for _ in example["signs"]]
    batch["owners"] = torch.tensor(owners)
    return batch


# --------------------------------------------------------------------------------------- the model
def load_model(settings, device, dtype):
    """Return a model with one output, its head zero, and what is trained of it; and its tokenizer."""
    remedy = "name a language model or a classifier with config.json, *.safetensors and a tokenizer"
    options = {"kind": "AutoModelForSequenceClassification", "new_head": True, "num_labels": 1}
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_of(path))
        model = load_base_model(path, device, dtype, settings.quantization, **options)
        limits = settings.max_length, tokenizer.model_max_length, context_of(path)
        tokenizer.model_max_length = min(limits)
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"  # an answer is the end
    own = (None, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    if tokenizer.pad_token in own:  # the score is read where the last token stands that is no pad
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    heads = [name for name in parts if name != model.base_model_prefix]
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for parameter in layers[-1].parameters():
        torch.nn.init.zeros_(parameter)  # random first scores would mean nothing
    for head in heads:
        model.get_submodule(head).float()
    if settings.lora_rank:
        given = {"modules_to_save": heads, "exclude_modules": heads, "task_type": "SEQ_CLS"}
        return add_adapter(model, settings, lora_dropout=settings.lora_dropout, **given), tokenizer
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in heads
    return model, tokenizer


# ------------------------------------------------------------------------------------ the training
class ComparisonTrainer:
    """The Trainer of transformers with the loss of Bradley and Terry (1952)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean of -ln P(better text preferred), where P = sigmoid(margin), in nats."""
        margins, _ = margins_of(model, inputs)
        return -torch.nn.functional.logsigmoid(margins).mean()


def margins_of(model, batch):
    """Return the score of the better text less that of the worse, and the scores of all texts."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    device = model.device.type
    with torch.autocast(device, model.dtype, enabled=model.dtype != torch.float32):
        scores = model(**inputs).logits[:, 0].float()
    margins = torch.zeros(int(batch["owners"][-1]) + 1, device=scores.device)
    return margins.index_add(0, batch["owners"], batch["signs"] * scores), scores


# --------------------------------------------------------------------------------- the measurement
def measure(model, tokenizer, examples, size, whole=True):
    """Return the held-out accuracy and loss; of the whole measurement all that is told."""
    margins, scores = [], {}
    model.eval()
    for start in progress(range(0, len(examples), size)):
        some = examples[start : start + size]
        with torch.no_grad():
            found, raw = margins_of(model, pad_batch(tokenizer, some).to(model.device))
        margins += found.tolist()
        texts = [text for example in some for text in example["texts"]]
        scores |= zip(texts, raw.tolist())
    margins = torch.tensor(margins, dtype=torch.float64)
    right = (margins.sign() + 1) / 2  # a tie is a half
    rows = torch.tensor([example["row"] for example in examples])
    sums, counts = rows.bincount(right).tolist(), rows.bincount().tolist()
    accuracy, error = ratio(sums, counts)  # comparisons of a row go together
    loss = torch.nn.functional.softplus(-margins).mean().item()
    if not whole:
        return {"loss": loss, "accuracy": accuracy}
    raw = torch.tensor([*scores.values()], dtype=torch.float64)
    labels = [example["signs"][0] for example in examples if len(example["signs"]) == 1]
    share = sum(sign > 0 for sign in labels) / len(labels) if labels else 0.5
    best_first = sorted(scores, key=scores.get, reverse=True)
    mean, deviation = raw.mean().item(), raw.std(correction=0).item() or 1.0
    shown = best_first[:3] + best_first[-3:]
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "guessing": max(share, 1 - share),
        "loss": loss,
        "margin": margins.mean().item(),
        "comparisons": len(examples),
        "score_mean": mean,
        "score_std": deviation,
        "calibration": calibration(margins, right),
        "first_sample": {text: (scores[text] - mean) / deviation for text in shown},
    }


def calibration(margins, right, bins=5):
    """Return how sure the model was, from 0.5 to 1, and how often it was right, for each bin."""
    sure = torch.sigmoid(margins.abs())
    places = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for place in places.unique():
        predicted, observed = sure[places == place], right[places == place]
        figures = {"predicted": predicted.mean().item(), "observed": observed.mean().item()}
        found.append(figures | {"comparisons": len(predicted)})
    return found


# ------------------------------------------------------------------------------- screen and report
def make_report(model, settings, metrics, base, trained):
    """Return the content of report.json."""
    # Of a few comparisons all may be right by chance, with a standard error of 0.
    error = max(trained["standard_error"], 0.5 / trained["comparisons"] ** 0.5)
    learned = trained["accuracy"] - 3 * error > trained["guessing"]
    figures = {"learned": learned, "base": base, "trained": trained}
    told = model, settings, metrics, ["reward-model"], "text-classification"
    return describe_run(*told) | figures


def summarize(report):
    """Return the result in Markdown, with what to try, and the line that trains on it."""
    settings, base, trained = report["settings"], report["base"], report["trained"]
    lines = [f"# A reward model from {Path(settings['data']).name}", ""]
    lines += ["| held out | base | trained |", "|---|---|---|"]
    for name in ("accuracy", "standard_error", "guessing", "loss", "margin"):
        lines.append(f"| {name} | {base[name]:.3f} | {trained[name]:.3f} |")
    where = f"{report['samples']} comparisons in {report['seconds']:.0f} seconds"
    lines += ["", f"{where} on {report['device']}, seed {settings['seed']}.", ""]
    lines += ["The held-out texts that score highest and lowest:", ""]
    for text, score in trained["first_sample"].items():
        lines.append(f"    {score:+6.2f}  {shorten(' '.join(text.split()))}")
    advice = ""
    if not report["learned"]:
        advice = "\nThat is no better than guessing: take more comparisons or TRAINING_EPOCHS."
    folder = shlex.quote(settings["output_dir"])
    lines.append(f"""
Right: {trained["accuracy"]:.1%} ± {trained["standard_error"]:.1%} of {trained["comparisons"]} held-out \
comparisons, where guessing is right in {trained["guessing"]:.0%}.{advice}
A score is (raw - {trained["score_mean"]:.3f}) / {trained["score_std"]:.3f}: 0 is as likely chosen as rejected.

The model is beside report.json and training.png. To train on it, and to score texts with it:

    python train_rlhf.py --reward {folder}
    python train_reward_model.py --output-dir {folder} --score "I feel good."
""")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the settings
RULES = [
    *STAGE_RULES,
    ("a list of texts, none empty", 0, True, "SCORE"),
    ("a whole number", (0, 10**6), False, "LORA_RANK"),
]


def check_data(score, output_dir, data, eval_share, seed):
    """Refuse data that can't be used, or, to score with, a folder without a model."""
    if not score:
        read_comparisons(data, eval_share, seed)
    elif not Path(output_dir, "config.json").exists():
        raise SettingsError(f"OUTPUT_DIR is {output_dir}: there is no model in it: train one first")


def check_head(quantization, lora_rank):
    """Refuse to train a head alone on a quantized body, which transformers' Trainer won't do."""
    if quantization != "none" and lora_rank == 0:
        raise SettingsError(f"QUANTIZATION is {quantization}: give none, or LORA_RANK 1 or more")


CHECKS = (check_data, check_head, check_batches, check_installed, check_output, check_alone)


def main(argv=()):
    """Learn from comparisons, by the constants above, overridden by flags in argv; return the status."""
    return launch(run, argv, globals(), RULES, CHECKS)


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
