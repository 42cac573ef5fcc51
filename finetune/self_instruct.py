"""Self-Instruct: prompts that ask a model for tasks, and what is taken of its answers.

Wang et al. 2023, https://arxiv.org/abs/2212.10560. A task is a row of instruction, input, output and
is_classification. What a model writes is a candidate, {"instruction", "dropped"}, and then has
instances, {"input", "output", "dropped"}; dropped is the reason, None for what is kept.
"""

import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from rouge_score.rouge_scorer import RougeScorer

from finetune.files import Row
from finetune.words import has_word

if TYPE_CHECKING:
    from finetune.writer import Writer


# -------------------------------------------------------------------------- the prompts
def draw_examples(
    seeds: list[str],
    written: list[str],
    count: int,
    key: Sequence[int],
) -> list[str]:
    """Return instructions to show, in an order drawn by key.

    A quarter of them are written, the model's own, as soon as there are as many; the rest are seeds.
    """
    generator = numpy.random.default_rng(key)
    few = shuffle(generator, written)[: count // 4]
    rest = shuffle(generator, seeds)[: count - len(few)]
    return shuffle(generator, few + rest)


def shuffle(generator: numpy.random.Generator, texts: list[str]) -> list[str]:
    """Return the texts in an order drawn by the generator."""
    return [texts[place] for place in generator.permutation(len(texts))]


def in_turns(tasks: list[Row], others: list[Row]) -> list[Row]:
    """Return the tasks and the others, one of each in turn, as long as there are both."""
    pairs = itertools.zip_longest(tasks, others)
    return [task for pair in pairs for task in pair if task]


def list_prompt(examples: list[str]) -> str:
    """Return a numbered list of instructions that wants to go on."""
    lines = ["A list of tasks, each of another kind:"]
    for number, instruction in enumerate(examples, start=1):
        line = " ".join(instruction.split())
        lines.append(f"{number}. {line}")
    lines.append(f"{len(examples) + 1}.")
    return "\n".join(lines)


def kind_prompt(instruction: str, examples: list[Row]) -> str:
    """Return the question whether an instruction is a classification task, after example tasks."""
    text = "Is the answer to the task one of a few fixed labels?\n\n"
    for task in examples:
        answer = "yes" if task["is_classification"] else "no"
        text += f"Task: {task['instruction']}\nLabels: {answer}\n\n"
    return text + f"Task: {instruction}\nLabels:"


def instance_prompt(instruction: str, is_classification: bool, examples: list[Row]) -> str:
    """Return the beginning of an instance of an instruction, after example tasks."""
    names = fields_of(is_classification)
    text = "Examples for each task, with input none where it needs no input:\n\n"
    for task in examples:
        text += f"Task: {task['instruction']}\n"
        for name in names:
            value = task[name.lower()] or "none"
            text += f"{name}: {value}\n"
        text += "\n"
    return text + f"Task: {instruction}\n{names[0]}:"


def fields_of(is_classification: bool) -> list[str]:
    """Return the names of an instance's fields, in the order in which they are written.

    A model that writes the input first would write inputs of one label, so of a classification task
    the label is first.
    """
    return ["Output", "Input"] if is_classification else ["Input", "Output"]


# -------------------------------------------------------------------------- the parsing
def parse_list(answer: str, ended: bool) -> list[tuple[str, bool]]:
    """Return the instructions in a list that begins after a number, and whether each is whole.

    ended: whether the answer came to an end; else its last instruction may have been cut.
    """
    instructions = []
    items = re.split(r"\n\s*\d+[.)](?=\s)", answer)
    for place, item in enumerate(items, start=1):
        # After a blank line the model has left the list.
        text, blank_line, _ = item.strip().partition("\n\n")
        if text:
            whole = ended or place < len(items) or bool(blank_line)
            instructions.append((" ".join(text.split()), whole))
    return instructions


def parse_instances(answer: str, ended: bool, is_classification: bool) -> list[Row]:
    """Return the instances in an answer, rows of input, output, and whether each is whole."""
    # The answer goes on after the name of the first field, with which its prompt ends.
    names = fields_of(is_classification)
    text = f"{names[0]}:{answer}"
    pieces = re.split(r"^[ \t]*(Input|Output):", text, flags=re.MULTILINE)[1:]
    fields = list(zip(pieces[::2], pieces[1::2]))

    instances = []
    for place in range(0, len(fields), 2):
        pair = fields[place : place + 2]
        in_order = [name for name, _ in pair] == names
        is_last = place + 2 >= len(fields)
        texts = dict(pair)
        input_text = texts.get("Input", "").strip()
        if input_text.casefold().rstrip(".") == "none":
            input_text = ""
        instances.append(
            {
                "input": input_text,
                "output": texts.get("Output", "").strip(),
                "whole": in_order and (ended or not is_last),
            }
        )
        # What belongs together can't be told any more.
        if not in_order:
            break
    return instances


# ------------------------------------------------------------------------ the filtering
def words_of(text: str) -> list[str]:
    """Return the words, in any script; a character of Chinese or Japanese counts as a word."""
    text = unicodedata.normalize("NFC", text).casefold()
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text)


class AnyScript:
    """A tokenizer for rouge_score, whose own drops all that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return words_of(text)


def candidates_in(
    answer: str,
    ended: bool,
    known: list[str],
    writer: "Writer",
    settings: Any,
) -> list[Row]:
    """Return the candidates in a list of instructions, each with why it is dropped.

    A candidate must not be similar to an instruction that is known, nor to one that is kept before
    it. Arguments as in parse_list and fault_of.
    """
    known = list(known)
    candidates = []
    for instruction, whole in parse_list(answer, ended):
        fault = fault_of(instruction, whole, known, writer, settings)
        candidates.append({"instruction": instruction, "dropped": fault})
        if fault is None:
            known.append(instruction)
    return candidates


def fault_of(
    instruction: str,
    whole: bool,
    known: list[str],
    writer: "Writer",
    settings: Any,
) -> str | None:
    """Return why an instruction is dropped, None where it is not.

    known: the instructions that it must not be similar to. writer: has to have room for the prompts
    about it. settings: min_words, max_words, unanswerable and rouge_limit are used.
    """
    length = len(words_of(instruction))
    if not whole:
        return "unfinished"
    if unicodedata.category(instruction[0])[0] in "PS":
        return "begins with punctuation"
    if length < settings.min_words:
        return "too short"
    if length > settings.max_words or not has_room(instruction, writer):
        return "too long"
    if has_word(instruction, settings.unanswerable):
        return "needs more than text"
    if is_similar(instruction, known, settings.rouge_limit):
        return "similar to another"
    return None


def has_room(instruction: str, writer: "Writer") -> bool:
    """Return whether the prompts about an instruction fit, without examples at least."""
    question = kind_prompt(instruction, examples=[])
    beginning = instance_prompt(instruction, is_classification=False, examples=[])
    return writer.fits(question) and writer.fits(beginning)


def is_similar(instruction: str, known: list[str], limit: float) -> bool:
    """Return whether the ROUGE-L F1 of an instruction with one of those known reaches the limit."""
    scorer = RougeScorer(["rougeL"], tokenizer=AnyScript())
    for other in known:
        score = scorer.score(other, instruction)["rougeL"].fmeasure
        if score >= limit:
            return True
    return False


def instances_in(answer: str, ended: bool, is_classification: bool) -> list[Row]:
    """Return the instances in an answer, each with why it is dropped, None where it is not."""
    return judge(parse_instances(answer, ended, is_classification))


def judge(instances: list[Row]) -> list[Row]:
    """Return instances with why each is dropped, None where it is not."""
    outputs = defaultdict(set)
    for instance in instances:
        if instance["whole"]:
            outputs[instance["input"]].add(instance["output"])

    judged: list[Row] = []
    for instance in instances:
        row = {"input": instance["input"], "output": instance["output"]}
        other_outputs = outputs[row["input"]] - {row["output"]}
        if not instance["whole"]:
            fault = "unfinished"
        elif not row["output"]:
            fault = "empty output"
        elif row["output"].casefold() == row["input"].casefold():
            fault = "output equals input"
        # None of them can be trusted. But without an input there may be many outputs.
        elif row["input"] and other_outputs:
            fault = "same input, another output"
        elif row | {"dropped": None} in judged:
            fault = "written twice"
        else:
            fault = None
        judged.append(row | {"dropped": fault})
    return judged


def kept(candidates: list[Row]) -> list[Row]:
    """Return those of the candidates, or of the instances, that were not dropped."""
    return [candidate for candidate in candidates if not candidate["dropped"]]


def kept_instructions(records: list[Row]) -> list[str]:
    """Return the instructions that were kept of all requests so far."""
    instructions = []
    for record in records:
        for candidate in kept(record["candidates"]):
            instructions.append(candidate["instruction"])
    return instructions
