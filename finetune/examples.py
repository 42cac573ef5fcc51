"""Examples to learn from: what of a row is asked, and what is answered, in a template."""

# Settings are checked with this file before the heavy libraries are loaded, so it needs none.
import json
import re
from collections import Counter
from typing import TYPE_CHECKING

from finetune.data import Reader, read_data
from finetune.dialogues import read_answered
from finetune.errors import SettingsError, shorten
from finetune.fields import LeftOut, Tally
from finetune.files import Row

if TYPE_CHECKING:
    import transformers

# A chat template, but for its first words and for how a question is asked.
CHAT_TEMPLATE = (
    "{{ START }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ QUESTION }}{% endif %}{% endfor %}"
)


# ------------------------------------------------------------------------------ reading
def read_example(row: Row | str, tally: Tally) -> Row:
    """Return what a row has to teach: turns, form and tools of its dialogue, and what is shown of it.

    Raises LeftOut where it has no answer.
    """
    dialogue = read_answered(row, tally)
    places = learned_places(dialogue.turns, dialogue.form)
    if not places and any(turn.get("weight") == 0 for turn in dialogue.turns):
        raise LeftOut("whose answers are marked not to be learned")
    if not places:
        raise LeftOut("without an answer")

    return {**dialogue._asdict(), "shown": shown_of(dialogue.turns, places[0])}


def answers_in(rows: list[Row]) -> list[Row]:
    """Return all turns that are learned; each is an example at most."""
    answers = []
    for row in rows:
        places = learned_places(row["turns"], row["form"])
        answers += [row["turns"][place] for place in places]
    return answers


def shown_of(turns: list[Row], place: int) -> str:
    """Return what is asked before the turn at a place; of a text alone its first words."""
    if place == 0:
        words = turns[0]["content"].split()[:4]
        return " ".join(words)
    asked = turns[place - 1]
    return f"{asked['content']} {asked.get('input', '')}".strip()


EXAMPLES = Reader(
    read=read_example,
    remedy="give rows with instruction and output, prompt and completion, messages, or text",
)


def check_examples(data: str, eval_share: float, seed: int) -> None:
    """Refuse data that can't be used."""
    read_data(data, eval_share, seed, EXAMPLES)


def learned_places(turns: list[Row], form: str) -> list[int]:
    """Return where the turns are that are learned: answers that say something, or a text."""
    if form == "text":
        return [0] if turns[0]["content"].strip() else []

    # What is said first answers nothing.
    places = []
    for place in range(1, len(turns)):
        turn = turns[place]
        says_something = bool(turn["content"].strip() or turn.get("tool_calls"))
        is_marked = turn.get("weight") == 0
        if turn["role"] == "assistant" and says_something and not is_marked:
            places.append(place)
    return places


# ----------------------------------------------------------------------------- template
def in_template(template: str, row: Row, end_token: str) -> tuple[str, list[tuple[int, int]]]:
    """Return an example as a text in TEMPLATE, and where what is learned begins and ends.

    end_token: stands behind each answer but the last one.
    """
    learned = learned_places(row["turns"], row["form"])
    text = ""
    spans = []
    # What comes after the last of these teaches nothing.
    for place, turn in enumerate(row["turns"][: learned[-1] + 1]):
        if turn["role"] == "system":
            text += turn["content"] + "\n\n"
        elif turn["role"] == "user":
            text += fill(template, turn["content"], turn.get("input", ""))
        else:
            is_last = place == learned[-1]
            answer = turn["content"] if is_last else turn["content"] + end_token
            if place in learned:
                spans.append((len(text), len(text) + len(answer)))
            text += answer
    return text, spans


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
    """Return a chat template that asks as the model was taught to be asked, most of the time.

    rows: those that it was taught. It is the tokenizer's own, if any, unless more of them were
    instructions than conversations.
    """
    counts = Counter(row["form"] for row in rows)
    if counts["instruction"] <= counts["messages"]:
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


def forms_in_words(rows: list[Row]) -> str:
    """Return in which templates the rows are put, where that is more than one; behind a comma."""
    counts = Counter(row["form"] for row in rows)
    if not (counts["instruction"] and counts["messages"]):
        return ""
    templates = (
        f"{counts['instruction']:,} in TEMPLATE, {counts['messages']:,} in the chat template"
    )
    return f", {templates}; it will be asked in the one of most"


def as_literal(text: str) -> str:
    """Return a text as it is written in Jinja."""
    return json.dumps(text, ensure_ascii=False)
