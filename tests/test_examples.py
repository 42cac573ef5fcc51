"""Examples to learn from: how a row is read, and how it is put into a template."""

import copy
import json
import re

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from finetune.data import read_data
from finetune.errors import SettingsError
from finetune.examples import (
    EXAMPLES,
    answers_in,
    chat_template_of,
    check_template,
    fill,
    forms_in_words,
    in_template,
    learned_places,
)
from finetune.fields import Tally
from finetune.labels import tokenize
from finetune.tokens import load_tokenizer
from train_sft import TEMPLATE

SHORT = "Task: {instruction}\n\nInput: {input}\n\nAnswer:\n"
AS_IT_IS = "{instruction}"


def turns(*texts, first="user"):
    """Return a conversation of texts, the roles in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def read(path):
    """Return all examples of a file, sorted, and what is told of the others."""
    data = read_data(str(path), 0.1, 0, EXAMPLES)
    return sorted(data.rows + data.eval_rows, key=str), data.tally


def row_of(prompt, answer, tools=None):
    """Return an example of an instruction, of a text where it is empty, or of messages."""
    if isinstance(prompt, list):
        said = [*prompt, *answer]
        return {"turns": said, "form": "messages", "tools": tools, "shown": said[0]["content"]}
    form = "instruction" if prompt else "text"
    said = turns(prompt, answer) if prompt else turns(answer)
    return {"turns": said, "form": form, "tools": None, "shown": prompt or answer}


def tokens_of(tokenizer, row, template=AS_IT_IS):
    """Return the example of a row that is short enough, and has one."""
    (example,), _ = tokenize(tokenizer, [row], template, 512, Tally())
    return example


def right_padded(path):
    """Return a tokenizer as the run has it."""
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "right"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return right_padded(demo_model)


@pytest.fixture(scope="module")
def tinyllama(shared_model):
    return right_padded(shared_model("tinyllama-shape"))


# ---------------------------------------------------------- what is read
def test_an_instruction_is_read_with_its_input_and_without(tmp_path):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Sing", "input": "", "output": "la"},
        {"instruction": "Hum", "input": " \n", "output": "mm"},
        {"instruction": "Rest", "input": "<No Input>", "output": "ok"},
        {"instruction": "Stop", "input": "\\<noinput\\>.", "output": "no"},
        {"prompt": "봄은?", "completion": "따뜻합니다"},
    ]
    found, tally = read(write(tmp_path / "rows.json", rows))
    texts = [in_template(SHORT, row, "</s>")[0] for row in found]
    assert dict(zip(texts, [row["shown"] for row in found])) == {
        "Task: Add\n\nInput: 1 2\n\nAnswer:\n3": "Add 1 2",
        "Task: Sing\n\nAnswer:\nla": "Sing",
        "Task: Hum\n\nAnswer:\nmm": "Hum",
        "Task: Rest\n\nAnswer:\nok": "Rest",
        "Task: Stop\n\nAnswer:\nno": "Stop",
        "Task: 봄은?\n\nAnswer:\n따뜻합니다": "봄은?",
    }
    assert tally.changed == {'inputs that say "noinput"': 2}


def test_conversations_are_read_with_system_turns_and_several_answers(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    talks = [turns("a", "b", "c", "d"), [system, *turns("a", "b")], turns("x", "y", "z")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk, "id": 1}) for talk in talks))
    found, tally = read(path)
    assert sorted(str(row["turns"]) for row in found) == sorted(map(str, talks))
    assert {row["shown"] for row in found} == {"a", "x"}
    assert {row["form"] for row in found} == {"messages"}
    assert tally.unused == {"id": 3}


def test_lines_are_texts_to_learn_whole(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("Once upon a time there was one.\n\n{input} stays\n", encoding="utf-8")
    found, _ = read(path)
    wanted = ["Once upon a time there was one.", "{input} stays"]
    assert [row["turns"][0]["content"] for row in found] == wanted
    assert [(row["form"], row["shown"]) for row in found] == [
        ("text", "Once upon a time"),
        ("text", "{input} stays"),
    ]
    as_rows = write(tmp_path / "rows.json", [{"text": text} for text in wanted])
    assert read(as_rows)[0] == found


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        {"instruction": "Sing", "output": "la"},
        {"instruction": "Sing", "input": "", "output": "la"},  # the same, said otherwise
        {"instruction": "Sing", "output": "lo"},
        {"instruction": "Hum", "output": " \n"},
        {"instruction": "Hum", "output": None},
        {"messages": turns("Hi", "")},
        {"messages": turns("Hi", "Ho", "Hi", " ")},  # of which the first answer is learned
        {"messages": turns("Hello, I greet you", "Hi", first="assistant")},  # answers nothing
        {"text": " "},
    ]
    found, tally = read(write(tmp_path / "rows.json", rows))
    answers = [answer["content"] for answer in answers_in(found)]
    assert sorted(answers) == ["Ho", "la", "lo"]
    assert tally.reasons() == "5 without an answer, 1 given twice"


def test_where_no_row_is_left_all_reasons_are_told(tmp_path):
    rows = [
        {"messages": [{"role": "narrator", "content": "Once"}]},
        {"instruction": "Hum", "output": ""},
        {"instruction": "Hum", "output": "mm"},
        {"instruction": "Hum", "output": "mm"},
    ]
    path = write(tmp_path / "rows.json", rows)
    with pytest.raises(SettingsError) as told:
        read(path)
    reasons = "1 with the unknown role narrator, 1 without an answer, 1 given twice"
    problem = f"1 of 4 rows can be used, where 2 are the least: {reasons}"
    found = f"{problem}; the first row has messages"
    assert f": it can't be used ({found})" in str(told.value)


def test_alpaca_is_read(shared):
    path = shared("data/alpaca_5000.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    letters = ["".join(filter(str.isalpha, row["input"])).lower() for row in rows]
    noinput = letters.count("noinput")
    found, tally = read(path)
    assert tally.changed == {'inputs that say "noinput"': noinput} and noinput >= 20
    assert tally.reasons() == "2 without an answer" and not tally.unused
    assert len(found) == 4998
    prompts = []
    for row in found:
        text, ((start, _),) = in_template(TEMPLATE, row, "")
        prompts.append(text[:start])
    assert not any("noinput" in prompt.lower() for prompt in prompts)
    with_block = sum("### Input:" in prompt for prompt in prompts)
    with_input = sum(bool(row["input"]) for row in rows if row["output"].strip())
    assert with_block == with_input - noinput


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "Hi"}, "row 2: it has nothing that answers its instruction"),
        ({"prompt": "Hi"}, "row 2: it has nothing that answers its prompt: its fields are prompt"),
        pytest.param(
            {"prompt": "Hi", "completion": 7},
            "row 2: its completion is 7, no text",
        ),
        ({"prompt": "Hi", "completion": None}, "1 of 2 rows can be used"),
        ({"question": "Hi"}, "row 2: it has nothing that answers its question"),
        ({"title": "Hi", "": 1}, "row 2: it has nothing that asks: its fields are title,"),
        ({}, "row 2: it has nothing that asks: its fields are none"),
        (7, "row 2: it is 7: no text, and nothing with fields"),
        (["Hi", "Ho"], "row 2: it is ['Hi', 'Ho']: no text"),
        ({"instruction": "Hi", "input": 7, "output": "Ho"}, "row 2: its input is 7, no text"),
        ({"instruction": "Hi", "output": "\0"}, "row 2: its output is"),
        ({"instruction": "Hi", "output": "\ud800"}, "row 2: its output is"),
        ({"text": 7}, "row 2: its text is 7"),
        ({"messages": "Hi"}, "row 2: its messages is Hi, no list"),
        ({"messages": ["Hi", "Ho"]}, "row 2: its messages has Hi, no message"),
        ({"messages": [{"role": "user"}] * 2}, "row 2: its messages 1 has no content, but role"),
        ({"messages": [{"content": "Hi"}]}, "row 2: its messages 1 has no role, but content"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "row 2: its messages 1, content is 7, no text",
        ),
        ({"messages": [{"role": 1, "content": "Hi"}]}, "row 2: its messages 1, role is 1, no text"),
        (
            {"instruction": "Hi", "output": "Ho", "history": [["a"]]},
            "row 2: its history has ['a'], no pair of texts",
        ),
        ({"instruction": "Hi", "output": "Ho", "history": "a"}, "row 2: its history is a, no list"),
        ({"instruction": "Hi", "output": ""}, "1 of 2 rows can be used"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "r.json", [{"prompt": "Hi", "completion": "Ho"}, row])
    with pytest.raises(SettingsError) as told:
        read(path)
    assert f"DATA is {path}: it can't be used ({problem}" in str(told.value)
    remedy = "give rows with instruction and output, prompt and completion, messages, or text"
    assert str(told.value).endswith(f"): {remedy}")


def test_what_was_marked_or_says_nothing_is_no_answer_to_learn():
    said = [*turns("Hi", "Ho", "Hi", " ", "Hi", "Hum"), *turns("Ha", first="assistant")]
    said[1]["weight"] = 0
    assert learned_places(said, "messages") == [5, 6]
    assert learned_places(turns("Hello", "Hi", first="assistant"), "messages") == []
    calls = [{"role": "assistant", "content": "", "tool_calls": [{}]}]
    assert learned_places(turns("Hi") + calls, "messages") == [1]
    assert learned_places(turns("Hi"), "text") == [0]
    assert learned_places(turns(" "), "text") == []


# ---------------------------------------------------------- the template
def test_a_template_is_filled_with_the_texts_as_they_are():
    assert fill(TEMPLATE, "Sing", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSing\n\n### Response:\n"
    )
    assert fill(TEMPLATE, "Sing", "a song").endswith(
        "### Instruction:\nSing\n\n### Input:\na song\n\n### Response:\n"
    )
    texts = "{input} {0} {{x}} \\1 {instruction}\n\nmore", "{instruction} {}"
    assert fill(SHORT, *texts) == f"Task: {texts[0]}\n\nInput: {texts[1]}\n\nAnswer:\n"
    assert fill("Q: {instruction}\nA:", "Add", "1 2") == "Q: Add\n1 2\nA:"
    assert fill("Q: {instruction}\nA:", "Add", "") == "Q: Add\nA:"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Answer:\n", "put {instruction} into it once"),
        ("{instruction}{instruction}", "put {instruction} into it once"),
        ("{instruction}\n\n{input}\n\n{input}\n", "{input} at most once"),
        ("{instruction}\n{input}\n", "give {input} a paragraph of its own"),
        ("Q: {instruction}\nA: ", "end it without the space"),
    ],
)
def test_a_template_that_would_not_work_is_refused(template, problem):
    with pytest.raises(SettingsError, match=f"^TEMPLATE is .*{re.escape(problem)}"):
        check_template(template)


@pytest.mark.parametrize("model", ["demo_model", "tinyllama-shape", "stories260K"])
def test_the_chat_template_asks_in_the_tokens_of_the_training(model, demo_model, shared_model):
    tokenizer = right_padded(demo_model if model == "demo_model" else shared_model(model))
    for template in (TEMPLATE, '{instruction} "}}" {{ x }} {% if %} \\n 🙂 봄\n'):
        row = row_of("Say it.", "You are kind.")
        example = tokens_of(tokenizer, row, template)
        trained = example["input_ids"][: example["labels"].count(-100)]
        assert trained[0] == tokenizer.bos_token_id
        tokenizer.chat_template = chat_template_of(tokenizer, [row], template)
        asked = turns("Say it.")
        for options in ({}, {"add_generation_prompt": True}):
            assert tokenizer.apply_chat_template(asked, **options)["input_ids"] == trained
        said = turns("Say it.", "You are kind.")
        assert tokenizer.apply_chat_template(said)["input_ids"] == example["input_ids"]


def test_a_tokenizer_without_a_start_token_gets_none(demo_model):
    tokenizer = AutoTokenizer.from_pretrained(demo_model, bos_token=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    rows = [row_of("Hi", "Ho")]
    tokenizer.chat_template = chat_template_of(tokenizer, rows, "{instruction}\n")
    asked = tokenizer.apply_chat_template(turns("Hi"), tokenize=False)
    assert asked == "Hi\n"


def test_conversations_and_texts_keep_the_chat_template_there_is(tinyllama):
    for row in (row_of(turns("Hi"), turns("Ho", first="assistant")), row_of("", "Ho")):
        assert chat_template_of(tinyllama, [row], SHORT) == tinyllama.chat_template


def test_the_chat_template_asks_with_a_system_text_and_what_was_said_before(tokenizer):
    system = {"role": "system", "content": "Be kind."}
    row = row_of("Hi", "Ho")
    row["turns"] = [system, *turns("Hi", "Ho", "And?", "Two")]
    example = tokens_of(tokenizer, row, SHORT)
    text = "<s>Be kind.\n\nTask: Hi\n\nAnswer:\nHo</s>Task: And?\n\nAnswer:\nTwo</s>"
    assert tokenizer.decode(example["input_ids"]) == text
    asker = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    asker.chat_template = chat_template_of(tokenizer, [row], SHORT)
    assert asker.apply_chat_template(row["turns"])["input_ids"] == example["input_ids"]


def test_a_model_is_asked_as_it_was_taught_most_of_the_time(tokenizer):
    """Few instructions among conversations do not take the place of the model's own template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "its own"
    asked, said = {"form": "instruction"}, {"form": "messages"}
    assert chat_template_of(tokenizer, [asked, said, said], SHORT) == "its own"
    assert "Task: " in chat_template_of(tokenizer, [asked, asked, said], SHORT)
    told = ", 2 in TEMPLATE, 1 in the chat template; it will be asked in the one of most"
    assert forms_in_words([asked, asked, said, {"form": "text"}]) == told
    assert forms_in_words([asked, asked]) == forms_in_words([said]) == ""
