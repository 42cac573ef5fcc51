"""Let a language model write instructions with answers, and keep those that are worth training on.

    python make_instructions.py                             # TinyLlama-1.1B-Chat, constants below
    python make_instructions.py --model-name demo_model     # the small model beside this: offline
    python make_instructions.py --help                      # every constant is also a flag
    python train_sft.py --data instructions/instructions.jsonl    # trains on what was kept

This is Self-Instruct (Wang et al. 2023, https://arxiv.org/abs/2212.10560). What a model as tiny as
demo_model writes means nothing, and next to none of it is kept: it shows that all works.
"""

import importlib.metadata
import itertools
import json
import os
import re
import shlex
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# isort: off
# fmt: off
from train_rlhf import (
    Library, SettingsError, blame, check_installed, check_output, claim_output, context_of,
    device_name, encode, end_tokens, find_model, join_processes, launch, load_base_model,
    load_tokenizer, missing_quotes, numpy, pick_device, read_table, shorten, stop_on_signal,
    texts_of, torch, transformers,
)
# fmt: on
# isort: on

if __name__ == "__main__" and "__file__" in globals():  # a script, not a cell of a notebook
    sys.excepthook = missing_quotes

rouge_scorer = Library("rouge_score.rouge_scorer")

# --- Model
MODEL_NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"  # a name on the Hub, or a local folder
OUTPUT_DIR = "instructions"  # all that a run leaves; an earlier run there is moved aside
QUANTIZATION = "none"  # 8bit or 4bit keep the weights small, with bitsandbytes; none = off
DEVICE = "auto"  # cuda, mps (Apple) or cpu; auto = cuda where there is one, else cpu
DTYPE = "auto"  # float32, bfloat16, float16; auto = 16 bits on a GPU or a CPU with AMX, else 32

# --- Requests
SEED_TASKS = "auto"  # .jsonl or .json: rows of instruction, input, output; auto = the twelve below
REQUESTS = 20  # how many times the model is asked for new instructions
EXAMPLES = 8  # tasks shown in a request; a quarter of them are its own, as soon as it has some
MAX_NEW_TOKENS = 300  # length of an answer in tokens, at most; never over half the model's context
TEMPERATURE = 0.7  # of new instructions, as in the paper; all else is greedy; 1.0 = as they are
TOP_P = 0.5  # only the likeliest tokens that sum to it, as in the paper; 1.0 = all tokens
BATCH_SIZE = 8  # answers generated at once; less saves memory

# --- Filters
MIN_WORDS = 4  # of an instruction; shorter ones say too little; 1 = off
MAX_WORDS = 150  # of an instruction; longer ones are rarely one task
ROUGE_LIMIT = 0.7  # ROUGE-L F1 with one that is kept: as high is too similar; 1 = same words
UNANSWERABLE = [  # an instruction with one of these whole words needs more than text; [] = off
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "photos", "file", "files",
    "map", "maps", "draw", "plot", "video", "videos", "audio", "music", "diagram", "flowchart",
]  # fmt: skip

# --- Run
SEED = 0  # the same seed on the same machine gives the same instructions
LOG_EVERY = 1  # requests between two lines of progress
RESUME = False  # go on after the last whole line of answers.jsonl in OUTPUT_DIR


# ----------------------------------------------------------------------------------------- the run
def run(settings):
    """Do the whole run: load, ask, filter, write down, report."""
    tasks = read_seed_tasks(settings.seed_tasks)
    if settings.resume:
        read_answers(settings, tasks)  # look before anything is loaded
    device, dtype = pick_device(settings.device, settings.dtype)
    device = join_processes(device)
    writer = Writer(settings, device, dtype)
    folder = Path(settings.output_dir)

    with claim_output(settings.output_dir, settings.resume):
        records = open_answers(settings, tasks)
        announce(writer, settings, tasks, records, device_name(device), dtype)
        before, start = len(records), time.perf_counter()
        try:
            with stop_on_signal(True) as stop:
                for number in range(before + 1, settings.requests + 1):
                    record = answer_request(number, writer, tasks, records, settings)
                    append(folder / "answers.jsonl", [record])
                    append(folder / "instructions.jsonl", rows_of(record))
                    records.append(record)
                    show_progress(records, before, time.perf_counter() - start, settings)
                    if stop.requested:
                        break
            libraries = ("torch", "transformers", "rouge_score")
            report = {
                "settings": vars(settings),
                "versions": {name: importlib.metadata.version(name) for name in libraries},
                "device": device_name(device),
                "dtype": dtype,
                "seconds": time.perf_counter() - start,
                "requests_in_these_seconds": len(records) - before,
                "yield": tally(records),
            }
            new = folder / "checkpoint" / "new" / "report.json"
            new.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            new.replace(folder / "report.json")
            print(summarize(report), flush=True)
        except BaseException as error:
            if records:
                saved = f"the answers to {len(records)} requests are saved"
                error.add_note(f"{saved}. To go on, run the same line with --resume")  # for launch
            raise


def answer_request(number, writer, tasks, records, settings):
    """Return the record of a request: what the model wrote, and what came of each candidate."""
    torch.manual_seed(settings.seed * 10**6 + number)  # a run can go on anywhere
    own = [each["instruction"] for record in records for each in kept(record["candidates"])]
    seeds = [task["instruction"] for task in tasks]
    examples = draw_examples(seeds, own, settings.examples, (settings.seed, number))
    prompt, count = writer.fill(list_prompt, examples)
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
    stop = f"\n{2 * settings.examples + 1}."  # the paper shows eight, and stops after sixteen
    ((answer, ended),) = writer.write([prompt], stop, top_k=0, **sampling)

    known, candidates = seeds + own, []
    for instruction, whole in parse_list(answer, ended):
        fault = fault_of(instruction, whole, known, writer, settings)
        candidates.append({"instruction": instruction, "dropped": fault})
        known += [] if fault else [instruction]
    write_instances(kept(candidates), writer, tasks)
    record = {"request": number, "examples": count, "answer": answer, "ended": ended}
    return record | {"candidates": candidates}


def write_instances(candidates, writer, tasks):
    """Let the model tell the kind of each candidate and write its instances, all put into it."""
    labelled = [task for task in tasks if task["is_classification"]]
    others = [task for task in tasks if not task["is_classification"]]
    pairs = itertools.zip_longest(labelled, others)
    mixed = [task for pair in pairs for task in pair if task]  # where few fit there are both
    prompts = []
    for each in candidates:
        prompts.append(writer.fill(partial(kind_prompt, each["instruction"]), mixed)[0])
    for each, (text, _) in zip(candidates, writer.write(prompts, "\n", new_tokens=5)):
        each["kind_answer"] = text
        each["is_classification"] = text.strip().casefold().startswith("yes")
    prompts = []
    for each in candidates:
        like = labelled if each["is_classification"] else others
        make = partial(instance_prompt, each["instruction"], each["is_classification"])
        prompts.append(writer.fill(make, like)[0])
    for each, (text, ended) in zip(candidates, writer.write(prompts, "\nTask:")):
        each["instance_answer"] = text
        each["instances"] = judge(parse_instances(text, ended, each["is_classification"]))
        each["dropped"] = None if kept(each["instances"]) else "no instance kept"


# -------------------------------------------------------------------------------------- the writer
class Writer:
    """A language model that goes on with prompts, and knows how much it can take."""

    def __init__(self, settings, device, dtype):
        remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
        with blame("MODEL_NAME", settings.model_name, remedy):
            path = find_model("MODEL_NAME", settings.model_name)
            self.tokenizer = load_tokenizer(path)
            self.model = load_base_model(path, device, dtype, settings.quantization).eval()
            self.context = context_of(path)
            self.new_tokens = int(min(settings.max_new_tokens, self.context / 2))
            if not self.fits(list_prompt([])):
                raise ValueError(f"its context of {self.context} tokens is too small")
        end_ids = end_tokens(self.model.generation_config.eos_token_id, self.tokenizer)
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=end_ids, pad_token_id=self.tokenizer.pad_token_id
        )
        self.batch_size = settings.batch_size

    def fits(self, prompt):
        """Return whether a prompt leaves room for an answer in the context."""
        return len(self.tokenizer(prompt)["input_ids"]) + self.new_tokens <= self.context

    def fill(self, make, examples):
        """Return the prompt made with as many of the examples as fit, and their number."""
        counts = range(len(examples), 0, -1)
        count = next((n for n in counts if self.fits(make(examples[:n]))), 0)
        return make(examples[:count]), count

    def write(self, prompts, stop, new_tokens=None, **sampling):
        """Return what follows each prompt up to the text stop, and whether it came to an end."""
        options = {"max_new_tokens": new_tokens or self.new_tokens, "stop_strings": [stop]}
        options |= {"tokenizer": self.tokenizer} | sampling
        end_ids = torch.tensor(self.model.generation_config.eos_token_id)
        queries = encode(self.tokenizer, [{"prompt": prompt} for prompt in prompts], False)
        answers = []
        for start in range(0, len(queries), self.batch_size):
            some = {"input_ids": queries[start : start + self.batch_size]}
            inputs = self.tokenizer.pad(some, padding_side="left", return_tensors="pt")
            width = inputs["input_ids"].shape[1]
            with torch.no_grad():
                sequences = self.model.generate(**inputs.to(self.model.device), **options)
            for query, row in zip(queries[start:], sequences[:, width:].cpu()):
                (text,) = texts_of(self.tokenizer, query, [row])
                ended = stop in text or bool(torch.isin(row, end_ids).any())
                answers.append((text.partition(stop)[0], ended))
        return answers


# ------------------------------------------------------------------------------------- the prompts
def draw_examples(seeds, own, count, key):
    """Return instructions to show, a quarter of them the model's own, in an order drawn by key."""
    numbers = numpy.random.default_rng(key)
    few = [own[place] for place in numbers.permutation(len(own))[: count // 4]]
    rest = [seeds[place] for place in numbers.permutation(len(seeds))[: count - len(few)]]
    shown = few + rest
    return [shown[place] for place in numbers.permutation(len(shown))]


def list_prompt(instructions):
    """Return a list of instructions that wants to go on."""
    lines = [f"{n}. {' '.join(text.split())}\n" for n, text in enumerate(instructions, start=1)]
    return f"A list of tasks, each of another kind:\n{''.join(lines)}{len(lines) + 1}."


def kind_prompt(instruction, tasks):
    """Return the question whether an instruction is a classification task."""
    parts = ["Is the answer to the task one of a few fixed labels?\n\n"]
    for task in tasks:
        answer = "yes" if task["is_classification"] else "no"
        parts.append(f"Task: {task['instruction']}\nLabels: {answer}\n\n")
    return "".join([*parts, f"Task: {instruction}\nLabels:"])


def fields_of(is_classification):
    """Return what is written first, and what then: of a classification task the label is first."""
    return ["Output", "Input"] if is_classification else ["Input", "Output"]


def instance_prompt(instruction, is_classification, tasks):
    """Return the beginning of an instance of an instruction, after examples."""
    names = fields_of(is_classification)
    parts = ["Examples for each task, with input none where it needs no input:\n\n"]
    for task in tasks:
        fields = [f"{name}: {task[name.lower()] or 'none'}\n" for name in names]
        parts += [f"Task: {task['instruction']}\n", *fields, "\n"]
    return "".join([*parts, f"Task: {instruction}\n{names[0]}:"])


# ------------------------------------------------------------------------- parsing and filtering
def parse_list(answer, ended):
    """Return the instructions in a list that begins after a number, and if each is whole."""
    found = []
    items = re.split(r"\n\s*\d+[.)](?=\s)", answer)
    for place, item in enumerate(items, start=1):
        text, blank, _ = item.strip().partition("\n\n")  # after which the model has left the list
        if text:
            whole = ended or place < len(items) or bool(blank)
            found.append((" ".join(text.split()), whole))
    return found


def words_of(text):
    """Return the words, in any script; a character of Chinese or Japanese counts as a word."""
    text = unicodedata.normalize("NFC", text).casefold()
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text)


def fault_of(instruction, whole, known, writer, settings):
    """Return why an instruction is dropped, None where it is not."""
    length = len(words_of(instruction))
    words = "|".join(re.escape(word.strip()) for word in settings.unanswerable)
    bare = [kind_prompt(instruction, []), instance_prompt(instruction, False, [])]
    if not whole:
        return "unfinished"
    if unicodedata.category(instruction[0])[0] in "PS":
        return "begins with punctuation"
    if length < settings.min_words:
        return "too short"
    if length > settings.max_words or not all(map(writer.fits, bare)):
        return "too long"
    if words and re.search(rf"(?<!\w)({words})(?!\w)", instruction, re.IGNORECASE):
        return "needs more than text"
    tokenizer = SimpleNamespace(tokenize=words_of)  # rouge_score's own drops all that is not ASCII
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=tokenizer)
    scores = (scorer.score(text, instruction)["rougeL"].fmeasure for text in known)
    return "similar to another" if any(score >= settings.rouge_limit for score in scores) else None


def parse_instances(answer, ended, is_classification):
    """Return the instances in an answer, dictionaries of input, output, and if each is whole."""
    names = fields_of(is_classification)
    _, *parts = re.split(r"^[ \t]*(Input|Output):", f"{names[0]}:{answer}", flags=re.MULTILINE)
    pairs = [*zip(parts[::2], parts[1::2])]
    instances = []
    for place in range(0, len(pairs), 2):
        found = dict(pairs[place : place + 2])
        in_order = [name for name, _ in pairs[place : place + 2]] == names
        whole = in_order and (ended or place + 2 < len(pairs))
        text = found.get("Input", "").strip()
        text = "" if text.casefold().rstrip(".") == "none" else text
        output = found.get("Output", "").strip()
        instances.append({"input": text, "output": output, "whole": whole})
        if not in_order:
            break  # what belongs together can't be told any more
    return instances


def judge(instances):
    """Return instances with why each is dropped, None where it is not."""
    outputs, judged = defaultdict(set), []
    for each in instances:
        if each["whole"]:
            outputs[each["input"]].add(each["output"])
    for each in instances:
        row = {"input": each["input"], "output": each["output"]}
        others = outputs[row["input"]] - {row["output"]}
        faults = {
            "unfinished": not each["whole"],
            "empty output": not row["output"],
            "output equals input": row["output"].casefold() == row["input"].casefold(),
            "same input, another output": row["input"] and others,  # none of them can be trusted
            "written twice": row | {"dropped": None} in judged,
        }
        judged.append(row | {"dropped": next((name for name in faults if faults[name]), None)})
    return judged


def kept(things):
    """Return those of the candidates, or of the instances, that were not dropped."""
    return [thing for thing in things if not thing["dropped"]]


# ------------------------------------------------------------------------------- what is on disk
def read_seed_tasks(seed_tasks):
    """Return the tasks to begin with: those at the end of this file, or the rows of another."""
    if seed_tasks == "auto":
        return TASKS
    remedy = "give a .jsonl or .json file, its rows with instruction, input and output"
    with blame("SEED_TASKS", seed_tasks, remedy):
        rows = read_table(seed_tasks)
        if not rows:
            raise ValueError("it has no tasks")
        return [task_of(row, number) for number, row in enumerate(rows, start=1)]


def task_of(row, number):
    """Return the seed task in a row, with an empty input and of no class where it has none."""
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is {shorten(row)}, not in braces")
    given = {name: value for name, value in row.items() if value is not None}
    task = {"instruction": "", "input": "", "output": "", "is_classification": False}
    for name, default in task.items():
        value = given.get(name, default)
        lacking = not str(value).strip() and name != "input"
        if lacking or not isinstance(value, type(default)):
            wanted = "true or false" if default is False else "a text"
            raise ValueError(f"row {number}: its {name} is {shorten(value)}, not {wanted}")
        task[name] = value.strip() if isinstance(value, str) else value
    json.dumps(task, ensure_ascii=False).encode()  # an error for half a character
    return task


def lasting(settings):
    """Return the settings that --resume may not change."""
    names = [name.lower() for _, _, free, names in RULES for name in names.split() if not free]
    return {name: getattr(settings, name) for name in names}


def read_answers(settings, tasks):
    """Return the records of an earlier run, and the bytes of its whole lines, if it can go on."""
    with blame("RESUME", True, "start without it"):
        content = Path(settings.output_dir, "answers.jsonl").read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a killed run may have torn the last line
        if not whole:
            raise ValueError("answers.jsonl has no whole line")
        first, *records = [json.loads(line) for line in whole.splitlines()]
        before, tasks_before = first["settings"], first["seed_tasks"]
    problems = []
    for name, value in lasting(settings).items():
        if value != before.get(name):
            problem = f"{name.upper()} is {shorten(value)}, but was {shorten(before.get(name))}"
            problems.append(f"{problem}: give that or start anew")
    if tasks_before != tasks:
        problem = f"SEED_TASKS is {shorten(settings.seed_tasks)}, whose tasks are not those so far"
        problems.append(f"{problem}: give those or start anew")
    if len(records) > settings.requests:
        problem = f"REQUESTS is {settings.requests}, but {len(records)} are done"
        problems.append(f"{problem}: give at least that")
    if problems:
        raise SettingsError(*problems)
    return records, whole


def open_answers(settings, tasks):
    """Make both files, or cut them to what is whole; return the records of what is done."""
    folder, records = Path(settings.output_dir), []
    if settings.resume:
        records, whole = read_answers(settings, tasks)
        os.truncate(folder / "answers.jsonl", len(whole))
        (folder / "instructions.jsonl").unlink(missing_ok=True)
    else:
        append(folder / "answers.jsonl", [{"settings": lasting(settings), "seed_tasks": tasks}])
    rows = [row for record in records for row in rows_of(record)]
    append(folder / "instructions.jsonl", rows)
    return records


def rows_of(record):
    """Return the rows to train on that a request gave."""
    return [
        {"instruction": task["instruction"], "input": each["input"], "output": each["output"]}
        for task in kept(record["candidates"])
        for each in kept(task["instances"])
    ]


def append(path, things):
    """Append things to a .jsonl file, a line each."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in things))


# ---------------------------------------------------------------------------- screen and report
def tally(records):
    """Return the yield: how many requests, what they wrote, what was kept, what dropped and why."""
    candidates = [each for record in records for each in record["candidates"]]
    instances = [each for task in candidates for each in task.get("instances", [])]
    counts = {"requests": len(records)}
    for name, things in {"instructions": candidates, "instances": instances}.items():
        dropped = Counter(thing["dropped"] for thing in things if thing["dropped"])
        figures = {"written": len(things), "kept": len(kept(things))}
        counts[name] = figures | {"dropped": dict(dropped.most_common())}
    return counts


def announce(writer, settings, tasks, records, device, dtype):
    """Print what is going to happen."""
    examples = [task["instruction"] for task in tasks][: settings.examples]
    _, fitting = writer.fill(list_prompt, examples)
    going_on = f", going on after request {len(records)}" if records else ""
    print(f"Model     {settings.model_name}, {dtype} weights, on {device}")
    print(f"Requests  {settings.requests}, seed {settings.seed}")
    if fitting < len(examples) or writer.new_tokens < settings.max_new_tokens:
        room = f"{writer.new_tokens} for an answer, about {fitting} examples fit into the rest"
        print(f"Context   {writer.context} tokens: {room}")
    print(f"Output    {settings.output_dir}/{going_on}\n", flush=True)


def show_progress(records, before, seconds, settings):
    """Print a line of progress where one is due, and the last instruction that was kept."""
    done, total = len(records), settings.requests
    if done % settings.log_every == 0 or done == total:
        found = tally(records)["instructions"]
        left = seconds / (done - before) * (total - done)
        figures = f"{found['written']} instructions written, {found['kept']} kept"
        print(f"request {done}/{total}, {left:.0f} s left, {figures}", flush=True)
        for task in kept(records[-1]["candidates"])[-1:]:
            print(f"    {shorten(task['instruction'])}", flush=True)


def summarize(report):
    """Return the yield in words, and what trains on it."""
    found = report["yield"]
    lines = [f"\n{found['requests']} requests in all"]
    for name in ("instructions", "instances"):
        reasons = [f"{reason} {count}" for reason, count in found[name]["dropped"].items()]
        dropped = ", ".join(reasons) or "nothing"
        kept_of = f"{found[name]['kept']} of {found[name]['written']}"
        lines.append(f"{name} kept: {kept_of}; dropped: {dropped}")
    path = os.path.join(report["settings"]["output_dir"], "instructions.jsonl")
    line = f"To train on them: python train_sft.py --data {shlex.quote(path)}"
    nothing = "Nothing was kept to train on: try a larger model, or more REQUESTS"
    return "\n".join([*lines, line if found["instances"]["kept"] else nothing])


# ------------------------------------------------------------------------------------ the settings
RULES = [  # what to give for a constant, its limits, whether --resume may change it, and its name
    ("a text", None, False, "MODEL_NAME"),
    ("a text", None, True, "OUTPUT_DIR SEED_TASKS"),  # of SEED_TASKS the tasks are compared
    ("none, 8bit or 4bit", None, False, "QUANTIZATION"),
    ("auto, cpu, cuda or mps", None, True, "DEVICE"),
    ("auto, float32, bfloat16 or float16", None, False, "DTYPE"),
    ("a list of texts, none empty", 0, False, "UNANSWERABLE"),
    ("True or False", None, True, "RESUME"),
    ("a whole number", (1, 10**6), False, "EXAMPLES MAX_NEW_TOKENS MIN_WORDS MAX_WORDS"),
    ("a whole number", (1, 10**6), True, "REQUESTS BATCH_SIZE LOG_EVERY"),
    ("a whole number", (0, 2**32 - 1), False, "SEED"),
    ("a number", (0.01, 100), False, "TEMPERATURE"),
    ("a number", (0.01, 1), False, "TOP_P ROUGE_LIMIT"),
]


def check_machine(device, dtype):
    """Refuse a device or a dtype that is not there, and several processes."""
    check_installed(device, dtype, [])
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise SettingsError(f"WORLD_SIZE is {processes}: start a single process, with python alone")


CHECKS = (read_seed_tasks, check_machine, check_output)


def main(argv=()):
    """Make instructions, by the constants above, overridden by flags in argv; return the status."""
    return launch(run, argv, globals(), RULES, CHECKS)


# ------------------------------------------------------------------------------------ seed tasks
FIELDS = ("instruction", "input", "output", "is_classification")
TASKS = [dict(zip(FIELDS, task)) for task in (
    ("Rewrite the message so that it sounds polite.", "Send me the keys today.",
     "Could you please send me the keys today?", False),
    ("Decide whether the customer review is positive or negative.",
     "The kettle broke after two days.", "negative", True),
    ("Give three reasons to walk to work instead of driving.", "",
     "It costs nothing, it keeps you fit, and it leaves the air clean.", False),
    ("How many minutes are there in the given number of hours?", "2.5 hours", "150 minutes", False),
    ("Name the language in which the sentence is written.", "Der Zug kommt um acht.", "German",
     True),
    ("Summarize the paragraph in one short sentence.",
     "The library closes in July for new floors. Books may be kept until August.",
     "The library is closed in July, and loans last until August.", False),
    ("Write a Python function that returns the larger of two numbers.", "",
     "def larger(a, b): return a if a > b else b", False),
    ("Does the second statement follow from the first? Answer yes or no.",
     "All herons have wings. The bird at the pond is a heron, so it has wings.", "yes", True),
    ("List the ingredients that the recipe step mentions.",
     "Stir the flour into the milk, then add two eggs.", "flour, milk, eggs", False),
    ("Explain to a child why the moon seems to change its shape.", "",
     "The sun lights one half of the moon, and we see more or less of that half.", False),
    ("Is the email spam, personal or about work?",
     "The meeting on the budget moves to Tuesday at ten.", "about work", True),
    ("Find the mistake in the sentence and correct it.", "She don't like cold tea.",
     "She doesn't like cold tea.", False),
)]  # fmt: skip


if __name__ == "__main__" and "__file__" in globals():
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__main__":  # in a cell of a notebook
    main()
