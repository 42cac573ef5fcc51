"""Teach a language model to answer as in examples: supervised fine-tuning, the stage before PPO.

    python train_sft.py --data my_examples.jsonl      # TinyLlama, with the constants below
    python train_sft.py --model-name demo_model --data my_examples.jsonl    # offline
    python train_sft.py --help                        # every constant is also a flag

Rows of instruction, input and output, of prompt and completion, of messages, or of text. What comes
out is a model for train_rlhf.py and train_reward_model.py. This stage shares with train_rlhf.py,
beside it, what is not PPO: settings, models, checkpoints, stops, results.
"""

import json
import math
import os
import re
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

# isort: off
# fmt: off
from train_rlhf import (
    SettingsError, add_adapter, blame, check_batches, check_installed, check_output,
    check_resume, claim_output, context_of, count_steps, describe_run, device_name, end_tokens,
    find_model, give_up_on_bad_numbers, hash_files, join_processes, joined, launch,
    load_base_model, load_checkpoint, load_tokenizer, missing_quotes, numpy, open_metrics,
    pick_device, progress, read_table, recent, save_checkpoint, save_model, save_results, shorten,
    stop_on_signal, texts_of, torch, transformers,
)
# fmt: on
# isort: on

if __name__ == "__main__" and "__file__" in globals():
    sys.excepthook = missing_quotes

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
DATA = "instructions.jsonl"  # a .jsonl, .json, .csv, .parquet or .txt file with an example a row
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
LEARNING_RATE = 2e-4  # at its highest; small models want more: 3e-3 for one of a million parameters
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


# ----------------------------------------------------------------------------------------- the run
def run(settings):
    """Do the whole run: read, tokenize, measure, train, measure again, save, show."""
    rows, eval_rows, left_out = read_examples(
        settings.data, settings.template, settings.eval_share, settings.seed
    )
    files = hash_files([settings.data])
    if settings.resume:  # look before anything is loaded
        check_resume(settings, RULES, count_steps(settings, rows), files)
    device, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device)
    remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = load_tokenizer(path)
        tokenizer.padding_side = "right"  # so that positions need not be given
        length = min(settings.max_length, context_of(path))
        examples, rows = tokenize(tokenizer, rows, length, left_out)
        eval_examples, eval_rows = tokenize(tokenizer, eval_rows, length, left_out)
        model = load_base_model(path, device, dtype, settings.quantization)
        own = model.generation_config
        own.eos_token_id = end_tokens(own.eos_token_id, tokenizer)
    collate = make_collator(model, tokenizer, settings.packing)
    model = add_adapter(model, settings, lora_dropout=settings.lora_dropout, task_type="CAUSAL_LM")
    measured = partial(measure, model, tokenizer, eval_examples, eval_rows, settings)

    with claim_output(settings.output_dir, settings.resume):
        told = f"{len(rows)} rows to train on, {len(eval_rows)} held out"
        announce(model, settings, dtype, examples, told, left_out)
        kind = transformers.Trainer
        metrics, base = fit(kind, model, examples, collate, measured, settings, RULES, files)
        trained = measured()
        tokenizer.padding_side = "left"  # as generation needs it
        tokenizer.chat_template = chat_template_of(tokenizer, rows, settings.template)
        falls = [before - after for before, after in zip(base.pop("nats"), trained.pop("nats"))]
        fall, error = ratio(falls, trained.pop("counts"))
        del base["counts"]
        report = describe_run(model, settings, metrics, ["sft"]) | {
            "base": base,
            "trained": trained,
        }
        report["learned"] = fall > 3 * error
        report["chat"] = any(row.get("prompt") or "messages" in row for row in rows)
        save = partial(save_model, model, tokenizer, settings)
        picture = partial(draw, report, metrics)
        save_results(report, summarize(report, "."), save, picture, settings.output_dir)
        print(summarize(report, os.path.join(".", settings.output_dir)), flush=True)


# ---------------------------------------------------------------------------------------- the data
def read_examples(data, template, eval_share, seed):
    """Return the rows to train on, those held out, and a count of what was left out, by reason.

    A row is {"prompt" in its template, "answer"} or {"messages"}, each with "shown": what is asked.
    """
    remedy = "give rows with instruction and output, prompt and completion, messages, or text"
    return read_data(data, eval_share, seed, partial(read_example, template), remedy)


def read_data(data, eval_share, seed, read, remedy):
    """Return the rows of a file as read returns each, those held out, and a count of the others."""
    unique, left_out = {}, Counter()
    with blame("DATA", data, remedy):
        for number, row in enumerate(read_table(data, "text"), start=1):
            try:
                example = read({"text": row} if isinstance(row, str) else row, left_out)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"row {number}: {reason}") from error
            if example is None:
                left_out["without an answer"] += 1
            elif str(example) in unique:
                left_out["given twice"] += 1
            else:
                unique[str(example)] = example
        if len(unique) < 2:
            raise ValueError(f"{len(unique)} rows of it can be used, where 2 are the least")
    count = min(math.ceil(eval_share * len(unique)), len(unique) - 1)
    order = numpy.random.default_rng(seed).permutation(len(unique))
    examples = [list(unique.values())[place] for place in order]
    return examples[count:], examples[:count], left_out


def read_example(template, row, left_out):
    """Return what a row has to teach, None where it has no answer."""
    if "messages" in row:
        if not isinstance(row["messages"], list) or len(row["messages"]) < 2:
            raise ValueError(f"its messages are {shorten(row['messages'])}: no conversation")
        names = ("role", "content")
        turns = [{name: text_in(turn, name) for name in names} for turn in row["messages"]]
        said = [n for n in range(1, len(turns)) if turns[n]["role"] == "assistant"]
        if not said or not turns[said[-1]]["content"].strip():
            return None
        return {"messages": turns, "shown": turns[said[0] - 1]["content"]}
    names = ("instruction", "output") if "instruction" in row else ("prompt", "completion")
    if names[0] in row:
        given = text_in(row, "input").strip() if row.get("input") else ""
        if re.sub(r"\W", "", given).lower() == "noinput":
            given = ""
            left_out['inputs that say "noinput"'] += 1
        instruction, answer = (text_in(row, name) for name in names)
        prompt, shown = fill(template, instruction, given), f"{instruction} {given}".strip()
    else:
        prompt, answer = "", text_in(row, "text")
        shown = " ".join(answer.split()[:4])
    return {"prompt": prompt, "answer": answer, "shown": shown} if answer.strip() else None


def text_in(row, name):
    """Return a text of a row, or raise."""
    if not isinstance(row[name], str):
        raise ValueError(f"its {name} is {shorten(row[name])}, no text")
    return row[name]


def fill(template, instruction, given):
    """Return the template with an instruction, and its input where there is one."""
    if given and "{input}" not in template:
        instruction = f"{instruction}\n{given}"
    blocks = [block for block in template.split("\n\n") if given or "{input}" not in block]
    texts = {"{instruction}": instruction, "{input}": given}
    return re.sub("{instruction}|{input}", lambda found: texts[found[0]], "\n\n".join(blocks))


def tokenize(tokenizer, rows, length, left_out):
    """Return the examples, input_ids and labels (-100 = not learned), and the rows they are of.

    Prompt and answer are one text, since apart they might be other tokens: a token is learned where
    it ends inside an answer. The end token is learned too, or the model would never stop.
    """
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer does not tell where its tokens are")
    examples, kept = [], []
    for row in rows:
        whole = "messages" not in row  # a template has its own start and end
        if whole:
            text = row["prompt"] + row["answer"]
            spans = [(len(row["prompt"]), len(text))]
        else:
            text, spans = conversation(tokenizer, row["messages"])
        encoded = tokenizer(text, add_special_tokens=whole, return_offsets_mapping=True)
        ids, labels = encoded["input_ids"], []
        for token, (_, end) in zip(ids, encoded["offset_mapping"]):
            labels.append(token if any(first < end <= last for first, last in spans) else -100)
        if whole:
            ended = ids[-1] == tokenizer.eos_token_id
            ids = ids if ended else [*ids, tokenizer.eos_token_id]
            labels = [*labels[: len(ids) - 1], tokenizer.eos_token_id]
        if set(labels[1:length]) <= {-100}:
            left_out["too long for an answer"] += 1
            continue
        left_out["cut"] += len(ids) > length
        examples.append({"input_ids": ids[:length], "labels": labels[:length]})
        kept.append(row)
    if not kept:
        remedy = "give more or shorter examples, since of none an answer is left"
        raise SettingsError(f"MAX_LENGTH is {length} here: {remedy}")
    return examples, kept


def conversation(tokenizer, messages):
    """Return a conversation in the tokenizer's template, and where its answers begin and end."""
    say, spans = partial(tokenizer.apply_chat_template, tokenize=False), []
    text = say(messages)
    for number in range(1, len(messages)):
        if messages[number]["role"] == "assistant":
            before = say(messages[:number], add_generation_prompt=True)
            after = say(messages[: number + 1]).rstrip()
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError("its chat template changes what came before an answer")
            spans.append((len(before), len(after)))
    return text, spans


def make_collator(model, tokenizer, packing):
    """Return what makes a batch of examples: padded on the right, or one after another."""
    if not packing:
        return transformers.DataCollatorForSeq2Seq(tokenizer)
    packed = transformers.DataCollatorWithFlattening()
    first, last = ({"input_ids": ids, "labels": ids} for ids in ([*range(9)], [9, 8, 7]))
    with blame("PACKING", packing, "give False"), torch.no_grad():
        logits = []
        for examples in ([last], [first, last]):
            batch = {name: each.to(model.device) for name, each in packed(examples).items()}
            logits.append(model(**batch, use_cache=False).logits[0, -1].float())
        alone, behind = logits
        if (alone - behind).std() > 0.1 * alone.std():
            raise ValueError("in this model an example sees the one before it")
    return packed


# ------------------------------------------------------------------------------------ the training
def fit(kind, model, examples, collate, measured, settings, rules, files):
    """Train what is not frozen with transformers' Trainer; return metrics, and the figures before."""
    total = count_steps(settings, examples)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, settings.learning_rate)
    metrics, base = [], None
    if settings.resume:
        state = load_checkpoint(model, optimizer, None, settings, rules, total, files)
        metrics, base = state["metrics"], state["base"]
        print(f"Going on after step {len(metrics)}", flush=True)
    base = base or measured()
    done, batch_size = len(metrics), settings.batch_size
    # The order of the whole run is known, so that it can go on anywhere.
    rest = [examples[place] for place in order_of(examples, total, settings)[done * batch_size :]]
    mini_batch_size = settings.mini_batch_size or batch_size
    arguments = transformers.TrainingArguments(
        output_dir=settings.output_dir,
        max_steps=max(total - done, 1),
        train_sampling_strategy="sequential",
        per_device_train_batch_size=mini_batch_size,
        gradient_accumulation_steps=batch_size // mini_batch_size,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=model.device.type == "cpu",
        fp16=model.dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # its checkpoints are torn by a kill; ours are not
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # it would spread a batch over all of them
    warmup = round(settings.warmup_share * total)
    cosine = transformers.get_cosine_schedule_with_warmup
    schedule = cosine(optimizer, warmup, total, last_epoch=done - 1)
    used_cache = getattr(model.config, "use_cache", None)
    trainer = kind(model, arguments, collate, rest, optimizers=(optimizer, schedule))
    scaler = trainer.accelerator.scaler
    if settings.resume and scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    learner = model, optimizer, scaler
    save = partial(save_checkpoint, *learner, settings, metrics, base=base, files=files)
    with stop_on_signal(True) as stop, open_metrics(settings, metrics, total) as show:
        recorder = joined(Recorder, transformers.TrainerCallback)
        parts = trainer, settings, metrics, len(examples), total, measured, show, save, stop
        trainer.add_callback(recorder(*parts))
        trainer.remove_callback(transformers.PrinterCallback)
        if done < total:
            trainer.train()
    model.config.use_cache = used_cache  # Trainer would have it saved with the model
    return metrics, base


def order_of(examples, total, settings):
    """Return the places of the run's examples; every epoch has each once, in an order of its own."""
    grouped = transformers.trainer_pt_utils.get_length_grouped_indices
    lengths = [len(each["input_ids"]) * settings.group_by_length for each in examples]  # 0: alike
    order, size = [], settings.batch_size
    for epoch in range(math.ceil(total * size / len(examples))):
        drawn = torch.Generator().manual_seed(settings.seed * 10**6 + epoch)
        order += grouped(lengths, size, generator=drawn)
    return order[: total * size]


class Recorder:
    """What is done around each step of transformers' Trainer: records, checkpoints, stops."""

    def __init__(self, trainer, settings, metrics, rows, total, measured, show, save, stop):
        self.trainer, self.settings, self.metrics = trainer, settings, metrics
        self.rows, self.total, self.measured = rows, total, measured
        self.show, self.save, self.stop = show, save, stop
        self.start = time.perf_counter() - (metrics[-1]["seconds"] if metrics else 0)

    def on_step_begin(self, arguments, state, control, **others):
        """Begin a step with random numbers of its own, so that a run can go on anywhere."""
        torch.manual_seed(self.settings.seed * 10**6 + len(self.metrics) + 1)
        self.trainer._tr_loss.zero_()  # or one loss that is not finite would stay for good

    def on_pre_optimizer_step(self, arguments, state, control, **others):
        """Leave out an update whose gradient is not finite: without gradients nothing moves."""
        gradients = [weight.grad for weight in self.trainer.optimizer.param_groups[0]["params"]]
        finite = all(each.isfinite().all() for each in gradients if each is not None)
        if not finite and not arguments.fp16:  # float16's scaler leaves it out by itself
            self.trainer.optimizer.zero_grad()

    def on_log(self, arguments, state, control, logs, **others):
        """Record a step that was taken, show it, and save what is due."""
        if "loss" not in logs:  # the summary of them all
            return
        step, settings, metrics = len(self.metrics) + 1, self.settings, self.metrics
        samples = step * settings.batch_size
        figures = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}
        wrong = [name for name in figures if not math.isfinite(figures[name])]
        loss_alone = arguments.fp16  # whose gradients are too large now and then: its way to scale
        skipped = "loss" in wrong if loss_alone else bool(wrong)
        due = settings.eval_every and step % settings.eval_every == 0 and step < self.total
        measured = self.measured(whole=False) if due else {}
        record = {"step": step, "samples": samples, "epoch": samples / self.rows, **figures}
        record |= dict.fromkeys(wrong) | {"skipped_updates": int(skipped)}
        record |= {f"eval_{name}": measured.get(name) for name in ("loss", "accuracy")}
        metrics.append(record | {"seconds": time.perf_counter() - self.start})
        held_out = [each["eval_loss"] for each in metrics if each["eval_loss"] is not None]
        text = f"loss {recent(metrics, 'loss'):.3f}"
        text += f", held out {held_out[-1]:.3f}" if held_out else ""
        self.show(metrics, text)
        give_up_on_bad_numbers(metrics)
        due = settings.save_every and step % settings.save_every == 0
        if (due and not skipped) or self.stop.requested or step == self.total:
            self.save()
        control.should_training_stop = bool(self.stop.requested)


# --------------------------------------------------------------------------------- the measurement
def measure(model, tokenizer, examples, rows, settings, whole=True):
    """Return the held-out loss in nats a token, of the whole measurement with answers beside it."""
    nats, counts = [], []
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    model.eval()
    for start in progress(range(0, len(examples), settings.eval_batch_size)):
        batch = collate(examples[start : start + settings.eval_batch_size]).to(model.device)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        nats += losses.sum(1).tolist()
        counts += (labels != -100).sum(1).tolist()
    loss, error = ratio(nats, counts)
    if not whole:
        return {"loss": loss}
    figures = {"loss": loss, "standard_error": error, "perplexity": math.exp(min(loss, 700))}
    figures |= {"examples": len(examples), "tokens": sum(counts), "nats": nats, "counts": counts}
    return figures | {"first_sample": answers(model, tokenizer, examples, rows[:6], settings)}


def ratio(sums, counts):
    """Return the mean over all that is counted, and its standard error over the groups of it."""
    mean = sum(sums) / sum(counts)
    squares = sum((each - mean * count) ** 2 for each, count in zip(sums, counts))
    return mean, math.sqrt(squares) / sum(counts)


def answers(model, tokenizer, examples, rows, settings):
    """Return {what is asked: answer}, the likeliest tokens, up to the first end token."""
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    said = {}
    for row, example in zip(rows, examples):
        labels = example["labels"]
        first = next(n for n in range(1, len(labels)) if labels[n] != -100)
        query = tokenizer(row["shown"])["input_ids"][: len(labels) - 1]  # of a text its beginning
        if "messages" in row or row["prompt"]:
            query = example["input_ids"][:first]
        query = torch.tensor(query, device=model.device)
        options = {"attention_mask": torch.ones_like(query[None]), "do_sample": False}
        options["max_new_tokens"] = min(settings.max_new_tokens, context - len(query))
        with torch.no_grad():
            sequence = model.generate(query[None], **options)[0]
        said[row["shown"]] = texts_of(tokenizer, query, [sequence[len(query) :]])[0]
    return said


# ------------------------------------------------------------------------------- screen and report
def announce(model, settings, dtype, examples, told, left_out):
    """Print what is going to happen."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    left = "".join(f", {number} {reason}" for reason, number in left_out.items() if number)
    steps = count_steps(settings, examples)
    print(f"Model     {settings.model_name}, {total:,} parameters, {trained:,} of them trained")
    print(f"Device    {device_name(model.device)}, {dtype} weights")
    print(f"Data      {settings.data}: {told}{left}")
    print(f"Training  {steps} steps of {settings.batch_size}, seed {settings.seed}")
    print(f"Output    {settings.output_dir}/\n", flush=True)


def chat_template_of(tokenizer, rows, template):
    """Return a chat template that asks as the model was taught to be asked."""
    if not any(row.get("prompt") for row in rows):  # of messages or texts
        return tokenizer.chat_template
    start = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("")["input_ids"] else ""
    asked = fill(template, "Hi", "")
    ids = tokenizer(start + asked, add_special_tokens=False)["input_ids"]
    if ids != tokenizer(asked)["input_ids"]:  # a space before the first word, but not after a token
        start += " "
    before, after = fill(template, "\0", "").split("\0")
    parts = [json.dumps(text, ensure_ascii=False) for text in (start, before, after)]
    return (
        "{{{{ {} }}}}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}"
        "{{{{ message['content'] + eos_token }}}}{{% else %}}"
        "{{{{ {} + message['content'] + {} }}}}{{% endif %}}{{% endfor %}}"
    ).format(*parts)


def draw(report, metrics, path):
    """Draw loss or accuracy over the examples, and whether the model is as sure as it should be."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    bins = report["trained"].get("calibration")
    name, unit = ("accuracy", "share") if bins else ("loss", "nats a token")
    figure = Figure(figsize=(11 if bins else 7, 4.4), layout="constrained")
    left, *others = figure.subplots(1, 2 if bins else 1, squeeze=False)[0]
    left.set(title="Learning", xlabel="examples", ylabel=f"{name} ({unit})")
    if name in metrics[0]:
        recently = [recent(metrics[:step], name) for step in range(1, len(metrics) + 1)]
        samples = [record["samples"] for record in metrics]
        left.plot(samples, recently, color="0.7", label="training, the last 100 examples")
    held_out = [(0, report["base"][name])]
    held_out += [(each["samples"], each[f"eval_{name}"]) for each in metrics]
    held_out.append((report["samples"], report["trained"][name]))
    held_out = [point for point in held_out if point[1] is not None]
    left.plot(*zip(*held_out), "o-", label="held out")
    left.legend()
    for right in others:
        right.set(title="Calibration", xlabel="how sure it is", ylabel="how often it is right")
        right.plot([0.5, 1], [0.5, 1], "k", label="as sure as it should be")
        points = [[each[name] for each in bins] for name in ("predicted", "observed")]
        right.plot(*points, "o-", label="held-out comparisons")
        right.legend()
    figure.savefig(path, dpi=100)


def summarize(report, folder):
    """Return the result in Markdown, with what to try, and Python that loads the model."""
    settings, base, trained = report["settings"], report["base"], report["trained"]
    lines = [f"# {Path(settings['model_name']).name}, taught by {Path(settings['data']).name}", ""]
    lines += ["| held out | base | trained |", "|---|---|---|"]
    for name in ("loss", "standard_error", "perplexity"):
        lines.append(f"| {name} | {base[name]:.3f} | {trained[name]:.3f} |")
    where = f"{report['samples']} examples in {report['seconds']:.0f} seconds on {report['device']}"
    lines += ["", f"{where}, seed {settings['seed']}. Answers to held-out prompts:", ""]
    for prompt, before in base["first_sample"].items():
        texts = prompt, before, trained["first_sample"][prompt]
        texts = [shorten(" ".join(text.split())) for text in texts]
        lines.append("    {}\n        before  {}\n        after   {}".format(*texts))
    advice = ""
    if not report["learned"]:
        advice = "\nBeyond chance this run did not learn: raise TRAINING_EPOCHS or LEARNING_RATE."
    prompt = next(iter(base["first_sample"]))
    asked = [{"role": "user", "content": prompt}] if report["chat"] else prompt
    lines.append(f"""
Loss: {base["loss"]:.3f} before, {trained["loss"]:.3f} after, in nats a token, each token counting
alike, over {trained["tokens"]} tokens of {trained["examples"]} held-out answers.{advice}

The model is beside report.json and training.png. To load it:

    from transformers import pipeline

    print(pipeline("text-generation", {folder!r})({asked!r}))
""")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ the settings
STAGE_RULES = [  # what to give for a constant, its limits, whether --resume may change it, names
    ("a text", None, False, "MODEL_NAME DATA"),
    ("a text", None, True, "OUTPUT_DIR"),
    ("none, 8bit or 4bit", None, False, "QUANTIZATION"),
    ("auto, cpu, cuda or mps", None, True, "DEVICE"),
    ("auto, float32, bfloat16 or float16", None, False, "DTYPE"),
    ("a list of texts, none empty", 1, False, "LORA_TARGETS"),
    ("a list of texts, tensorboard, wandb or trackio", 0, True, "REPORT_TO"),
    ("True or False", None, False, "GROUP_BY_LENGTH"),
    ("True or False", None, True, "RESUME GRADIENT_CHECKPOINTING SAVE_ADAPTER"),
    ("a whole number", (1, 10**6), False, "LORA_ALPHA BATCH_SIZE"),
    ("a whole number", (2, 10**6), False, "MAX_LENGTH"),
    ("a whole number", (1, 10**6), True, "EVAL_BATCH_SIZE LOG_EVERY"),
    ("a whole number", (0, 10**6), True, "MINI_BATCH_SIZE EVAL_EVERY SAVE_EVERY"),
    ("a whole number", (0, 2**32 - 1), False, "SEED"),
    ("a number", (1e-6, 10**6), False, "TRAINING_EPOCHS"),  # on which the rates depend
    ("a number", (1e-30, 1e30), False, "LEARNING_RATE"),
    ("a number", (0, 1e30), True, "MAX_GRAD_NORM"),
    ("a number", (0.001, 0.9), False, "EVAL_SHARE"),
    ("a number", (0, 0.9), False, "LORA_DROPOUT WARMUP_SHARE"),
]
RULES = [
    *STAGE_RULES,
    ("a text", None, False, "TEMPLATE"),
    ("True or False", None, False, "PACKING"),
    ("a whole number", (1, 10**6), False, "LORA_RANK"),
    ("a whole number", (1, 10**6), True, "MAX_NEW_TOKENS"),
]


def check_template(template):
    """Refuse a template that can't be filled, or whose end would be another token before an answer."""
    blocks = template.split("\n\n")
    if template.count("{instruction}") != 1 or template.count("{input}") > 1:
        problem = "put {instruction} into it once, and {input} at most once"
    elif any("{instruction}" in block and "{input}" in block for block in blocks):
        problem = "give {input} a paragraph of its own, between empty lines"
    elif template.endswith(" "):
        problem = "end it without the space, for that belongs to the answer's first token"
    else:
        return
    raise SettingsError(f"TEMPLATE is {shorten(template)}: {problem}")


def check_alone(output_dir):
    """Refuse a launch of several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problem = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this stage is one process"
        raise SettingsError(f"{problem}: start it with python")


CHECKS = (check_template, read_examples, check_batches, check_installed, check_output, check_alone)


def main(argv=()):
    """Fine-tune, by the constants above, overridden by flags in argv; return the exit status."""
    return launch(run, argv, globals(), RULES, CHECKS)


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
