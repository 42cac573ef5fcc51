"""Examples to learn from: rows of a file, as prompts and answers, and what is learned of them."""

# Settings are checked with this file before the heavy libraries are loaded, so it needs none; a
# tokenizer is handed to it where it takes one.
import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from finetune.data import Row, read_data, text_in
from finetune.errors import SettingsError, shorten

if TYPE_CHECKING:
    import transformers

REMEDY = "give rows with instruction and output, prompt and completion, messages, or text"

# A chat template, but for its first words and for how a question is asked.
CHAT_TEMPLATE = (
    "{{ START }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ QUESTION }}{% endif %}{% endfor %}"
)


# ------------------------------------------------------------------------------ reading
def read_examples(
    data: str,
    template: str,
    eval_share: float,
    seed: int,
) -> tuple[list[Row], list[Row], Counter[str]]:
    """Return the rows to train on, those held out, and a count of what was left out, by reason.

    A row is {"prompt" in its template, "answer"} or {"messages"}, each with "shown": what is asked.
    """
    return read_data(
        data=data,
        eval_share=eval_share,
        seed=seed,
        read=read_example,
        remedy=REMEDY,
        template=template,
    )


def read_example(row: Row, left_out: Counter[str], template: str) -> Row | None:
    """Return what a row has to teach, None where it has no answer.

    Raises KeyError or ValueError for what is no such row.
    """
    if "messages" in row:
        return read_conversation(row)
    if "instruction" in row:
        return read_instruction(row, "instruction", "output", left_out, template)
    if "prompt" in row:
        return read_instruction(row, "prompt", "completion", left_out, template)

    answer = text_in(row, "text")
    first_words = answer.split()[:4]
    return example_of("", answer, shown=" ".join(first_words))


def read_conversation(row: Row) -> Row | None:
    """Return the turns of a conversation, None where its last answer is empty or there is none."""
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"its messages are {shorten(messages)}: no conversation")
    turns = []
    for message in messages:
        role = text_in(message, "role")
        turns.append({"role": role, "content": text_in(message, "content")})

    # What is said first answers nothing.
    places = range(1, len(turns))
    answers = [place for place in places if turns[place]["role"] == "assistant"]
    if not answers or not turns[answers[-1]]["content"].strip():
        return None
    question = turns[answers[0] - 1]
    return {"messages": turns, "shown": question["content"]}


def read_instruction(
    row: Row,
    instruction_field: str,
    answer_field: str,
    left_out: Counter[str],
    template: str,
) -> Row | None:
    """Return an instruction, with its input where there is one, in the template, and its answer."""
    input_text = text_in(row, "input").strip() if row.get("input") else ""
    # Alpaca's data set and its likes say so where an instruction needs no input.
    if re.sub(r"\W", "", input_text).lower() == "noinput":
        input_text = ""
        left_out['inputs that say "noinput"'] += 1

    instruction = text_in(row, instruction_field)
    answer = text_in(row, answer_field)
    prompt = fill(template, instruction, input_text)
    return example_of(prompt, answer, shown=f"{instruction} {input_text}".strip())


def example_of(prompt: str, answer: str, shown: str) -> Row | None:
    """Return a prompt and its answer as a row, None where the answer is empty."""
    if not answer.strip():
        return None
    return {"prompt": prompt, "answer": answer, "shown": shown}


# ----------------------------------------------------------------------------- template
def fill(template: str, instruction: str, input_text: str) -> str:
    """Return the template with an instruction, and its input where there is one."""
    if input_text and "{input}" not in template:
        instruction = f"{instruction}\n{input_text}"
    blocks = template.split("\n\n")
    if not input_text:
        blocks = [block for block in blocks if "{input}" not in block]

    # In one go, since an instruction may have "{input}" in it.
    texts = {"{instruction}": instruction, "{input}": input_text}
    pieces = re.split("({instruction}|{input})", "\n\n".join(blocks))
    return "".join(texts.get(piece, piece) for piece in pieces)


def check_template(template: str) -> None:
    """Refuse a template that can't be filled, or whose end would be another token before an answer."""
    blocks = template.split("\n\n")
    shared = [block for block in blocks if "{instruction}" in block and "{input}" in block]
    if template.count("{instruction}") != 1 or template.count("{input}") > 1:
        problem = "put {instruction} into it once, and {input} at most once"
    elif shared:
        problem = "give {input} a paragraph of its own, between empty lines"
    elif template.endswith(" "):
        problem = "end it without the space, for that belongs to the answer's first token"
    else:
        return
    raise SettingsError(f"TEMPLATE is {shorten(template)}: {problem}")


def chat_template_of(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    rows: list[Row],
    template: str,
) -> str | None:
    """Return a chat template that asks as the model was taught to be asked.

    rows: those that it was taught. Of messages and texts alone it is the tokenizer's own, if any.
    """
    if not any(row.get("prompt") for row in rows):
        return tokenizer.chat_template

    has_start = tokenizer.bos_token_id in tokenizer("")["input_ids"]
    start = tokenizer.bos_token if has_start else ""
    # A tokenizer may put a space before the first word, but not after a token.
    question = fill(template, "Hi", "")
    ids = tokenizer(start + question, add_special_tokens=False)["input_ids"]
    if ids != tokenizer(question)["input_ids"]:
        start += " "

    before, after = fill(template, "\0", "").split("\0")
    question = f"{as_literal(before)} + message['content'] + {as_literal(after)}"
    beginning, end = CHAT_TEMPLATE.split("QUESTION")
    return beginning.replace("START", as_literal(start)) + question + end


def as_literal(text: str) -> str:
    """Return a text as it is written in Jinja."""
    return json.dumps(text, ensure_ascii=False)


# --------------------------------------------------------------------------- the tokens
def tokenize(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    rows: list[Row],
    length: int,
    left_out: Counter[str],
) -> tuple[list[Row], list[Row]]:
    """Return the examples, input_ids and labels (-100 = not learned), and the rows they are of.

    length: of an example in tokens, at most. Raises SettingsError where no answer is left.
    """
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer does not tell where its tokens are")

    examples, rows_used = [], []
    for row in rows:
        ids, labels = tokenize_row(tokenizer, row)
        # The first token is never learned, since nothing stands before it.
        if set(labels[1:length]) <= {-100}:
            left_out["too long for an answer"] += 1
            continue
        left_out["cut"] += len(ids) > length
        examples.append({"input_ids": ids[:length], "labels": labels[:length]})
        rows_used.append(row)

    if not rows_used:
        remedy = "give more or shorter examples, since of none an answer is left"
        raise SettingsError(f"MAX_LENGTH is {length} here: {remedy}")
    return examples, rows_used


def tokenize_row(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    row: Row,
) -> tuple[list[int], list[int]]:
    """Return the tokens of a row, and what is to be learned of them, -100 where nothing is.

    Prompt and answer are one text, since apart they might be other tokens: a token is learned where
    it ends inside an answer. The end token is learned too, or the model would never stop.
    """
    is_conversation = "messages" in row
    if is_conversation:
        text, spans = conversation(tokenizer, row["messages"])
    else:
        text = row["prompt"] + row["answer"]
        spans = [(len(row["prompt"]), len(text))]

    # A chat template has its own start and end.
    encoded = tokenizer(
        text,
        add_special_tokens=not is_conversation,
        return_offsets_mapping=True,
    )
    ids = encoded["input_ids"]
    labels = []
    for token, (_, end) in zip(ids, encoded["offset_mapping"]):
        is_answer = any(first < end <= last for first, last in spans)
        labels.append(token if is_answer else -100)
    if is_conversation:
        return ids, labels

    end_token = tokenizer.eos_token_id
    if ids[-1] != end_token:
        ids = [*ids, end_token]
    return ids, [*labels[: len(ids) - 1], end_token]


def conversation(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[Row],
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation in the tokenizer's template, and where its answers begin and end."""
    text = in_template(tokenizer, messages)
    spans = []
    for number in range(1, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        before = in_template(tokenizer, messages[:number], add_generation_prompt=True)
        after = in_template(tokenizer, messages[: number + 1]).rstrip()
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError("its chat template changes what came before an answer")
        spans.append((len(before), len(after)))
    return text, spans


def in_template(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    messages: list[Row],
    add_generation_prompt: bool = False,
) -> str:
    """Return messages as a text in the tokenizer's template."""
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return str(text)
