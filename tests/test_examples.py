"""Examples to learn from: how a row is read, put into a template, and which tokens are learned."""

import json
import re
from collections import Counter

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from finetune.errors import SettingsError
from finetune.examples import (
    chat_template_of,
    check_template,
    conversation,
    fill,
    read_examples,
    tokenize,
)
from finetune.tokens import load_tokenizer
from train_sft import TEMPLATE

SHORT = "Task: {instruction}\n\nInput: {input}\n\nAnswer:\n"


def turns(*texts, first="user"):
    """Return a conversation of texts, the roles in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def read(path, template=SHORT):
    """Return all rows of a file, sorted, and what was left out."""
    rows, eval_rows, left_out = read_examples(str(path), template, 0.1, 0)
    return sorted(rows + eval_rows, key=str), left_out


def row_of(prompt, answer):
    return {"prompt": prompt, "answer": answer, "shown": prompt or answer}


def tokens_of(tokenizer, row):
    """Return the example of a row that is short enough."""
    (example,), _ = tokenize(tokenizer, [row], 512, Counter())
    return example


def learned(example):
    """Return the learned tokens of an example, in pieces without a gap."""
    pieces, before = [], False
    for token, label in zip(example["input_ids"], example["labels"]):
        assert label in (token, -100)
        if label != -100:
            pieces = pieces if before else [*pieces, []]
            pieces[-1].append(label)
        before = label != -100
    return pieces


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
    found, left_out = read(write(tmp_path / "rows.json", rows))
    assert {row["prompt"]: (row["answer"], row["shown"]) for row in found} == {
        "Task: Add\n\nInput: 1 2\n\nAnswer:\n": ("3", "Add 1 2"),
        "Task: Sing\n\nAnswer:\n": ("la", "Sing"),
        "Task: Hum\n\nAnswer:\n": ("mm", "Hum"),
        "Task: Rest\n\nAnswer:\n": ("ok", "Rest"),
        "Task: Stop\n\nAnswer:\n": ("no", "Stop"),
        "Task: 봄은?\n\nAnswer:\n": ("따뜻합니다", "봄은?"),
    }
    assert left_out == {'inputs that say "noinput"': 2}


def test_conversations_are_read_with_system_turns_and_several_answers(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    talks = [turns("a", "b", "c", "d"), [system, *turns("a", "b")], turns("x", "y", "z")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": talk, "id": 1}) for talk in talks))
    found, _ = read(path)
    assert sorted(str(row["messages"]) for row in found) == sorted(map(str, talks))
    assert {row["shown"] for row in found} == {"a", "x"}


def test_lines_are_texts_to_learn_whole(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("Once upon a time there was one.\n\n{input} stays\n", encoding="utf-8")
    found, _ = read(path)
    assert [(row["prompt"], row["answer"]) for row in found] == [
        ("", "Once upon a time there was one."),
        ("", "{input} stays"),
    ]
    as_rows = write(tmp_path / "rows.json", [{"text": row["answer"]} for row in found])
    assert read(as_rows)[0] == found


def test_what_is_dropped_is_counted(tmp_path):
    rows = [
        {"instruction": "Sing", "output": "la"},
        {"instruction": "Sing", "input": "", "output": "la"},  # the same, said otherwise
        {"instruction": "Sing", "output": "lo"},
        {"instruction": "Hum", "output": " \n"},
        {"messages": turns("Hi", "")},
        {"messages": turns("Hi", "Ho", "Hi", " ")},
        {"messages": turns("Hello, I greet you", "Hi", first="assistant")},  # answers nothing
        {"text": " "},
    ]
    found, left_out = read(write(tmp_path / "rows.json", rows))
    assert [row["answer"] for row in found] == ["la", "lo"]
    assert left_out == {"given twice": 1, "without an answer": 5}


def test_alpaca_is_read(shared):
    path = shared("data/alpaca_5000.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    letters = ["".join(filter(str.isalpha, row["input"])).lower() for row in rows]
    noinput = letters.count("noinput")
    found, left_out = read(path, TEMPLATE)
    assert left_out.pop('inputs that say "noinput"') == noinput >= 20
    assert left_out == {"without an answer": 2}
    assert len(found) == 4998
    assert not any("noinput" in row["prompt"].lower() for row in found)
    with_block = sum("### Input:" in row["prompt"] for row in found)
    with_input = sum(bool(row["input"]) for row in rows if row["output"].strip())
    assert with_block == with_input - noinput


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "Hi"}, "row 2: it has no 'output'"),
        ({"prompt": "Hi"}, "row 2: it has no 'completion'"),
        ({"prompt": "Hi", "completion": None}, "row 2: its completion is None, no text"),
        ({"question": "Hi"}, "row 2: it has no 'text'"),
        (7, "row 2: "),
        (["Hi", "Ho"], "row 2: "),
        ({"instruction": "Hi", "input": 7, "output": "Ho"}, "row 2: its input is 7"),
        ({"messages": turns("Hi")}, "row 2: its messages are"),
        ({"messages": "Hi"}, "row 2: its messages are Hi: no conversation"),
        ({"messages": ["Hi", "Ho"]}, "row 2: "),
        ({"messages": [{"role": "user"}] * 2}, "row 2: it has no 'content'"),
        ({"instruction": "Hi", "output": ""}, "1 rows of it can be used, where 2"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "r.json", [{"prompt": "Hi", "completion": "Ho"}, row])
    with pytest.raises(SettingsError) as told:
        read(path)
    assert f"DATA is {path}: it can't be used ({problem}" in str(told.value)
    remedy = "give rows with instruction and output, prompt and completion, messages, or text"
    assert str(told.value).endswith(f"): {remedy}")


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
        row = row_of(fill(template, "Say it.", ""), "You are kind.")
        example = tokens_of(tokenizer, row)
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
    rows = [row_of("Hi\n", "Ho")]
    tokenizer.chat_template = chat_template_of(tokenizer, rows, "{instruction}\n")
    asked = tokenizer.apply_chat_template(turns("Hi"), tokenize=False)
    assert asked == "Hi\n"


def test_conversations_and_texts_keep_the_chat_template_there_is(tinyllama):
    for row in ({"messages": turns("Hi", "Ho")}, row_of("", "Ho")):
        assert chat_template_of(tinyllama, [row], SHORT) == tinyllama.chat_template


# ------------------------------------------------------- what is learned
def bytes_of(tokenizer, token):
    """Return the bytes that a token of TinyLlama stands for."""
    text = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch("<0x..>", text):
        return bytes([int(text[3:5], 16)])
    return b"" if token in tokenizer.all_special_ids else text.replace("▁", " ").encode()


@pytest.mark.parametrize("answer", ["You are kind.", "  two spaces", "\nnew", "봄은 뷁 🙂", "{}"])
def test_the_learned_tokens_are_those_that_reach_into_the_answer(tinyllama, answer):
    """The place of a token is counted in bytes, without the offsets that a tokenizer tells."""
    prompt = "Task: 봄은?\n\nAnswer:\n"
    example = tokens_of(tinyllama, row_of(prompt, answer))
    ids, labels = example["input_ids"], example["labels"]
    assert ids == [*tinyllama(prompt + answer)["input_ids"], tinyllama.eos_token_id]
    reached, wanted = -1, []  # the space that the tokenizer puts before a text
    for token in ids:
        reached += len(bytes_of(tinyllama, token))
        is_learned = reached > len(prompt.encode()) or token == tinyllama.eos_token_id
        wanted.append(token if is_learned else -100)
    assert labels == wanted
    assert bytes_of(tinyllama, ids[1])[:1] == b" "
    assert reached == len((prompt + answer).encode())


def test_prompt_and_answer_are_one_text(tokenizer):
    example = tokens_of(tokenizer, row_of("I am hap", "py."))
    answer = tokenizer("py.", add_special_tokens=False)["input_ids"]
    apart = tokenizer("I am hap")["input_ids"] + answer
    assert example["input_ids"][:-1] != apart
    assert example["input_ids"][:-1] == tokenizer("I am happy.")["input_ids"]
    ends = tokenizer.convert_ids_to_tokens(learned(example)[0])
    assert ends == ["Ġhappy", ".", "</s>"]


def test_a_text_is_learned_whole(tokenizer):
    example = tokens_of(tokenizer, row_of("", "I am so happy."))
    assert example["labels"] == [-100, *example["input_ids"][1:]]
    assert tokenizer.decode(example["input_ids"]) == "<s>I am so happy.</s>"


def test_an_end_that_the_tokenizer_adds_is_the_only_one_and_is_learned(demo_model):
    tokenizer = right_padded(demo_model)
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    processor = TemplateProcessing("<s> $A </s>", None, ends)
    tokenizer.backend_tokenizer.post_processor = processor
    example = tokens_of(tokenizer, row_of("Say\n", "happy."))
    assert tokenizer.decode(example["input_ids"]) == "<s>Say\nhappy.</s>"
    ends = tokenizer.convert_ids_to_tokens(learned(example)[0])
    assert ends == ["happy", ".", "</s>"]


def test_what_is_too_long_is_cut_or_dropped_and_told(tokenizer):
    rows = [
        row_of("Q\n", "I am happy."),
        row_of("Q\n", "I am so happy and so glad."),
        row_of("I am so happy and so glad and so calm\n", "Yes."),
    ]
    whole, _ = tokenize(tokenizer, rows, 512, Counter())
    length, left_out = len(whole[0]["input_ids"]), Counter()
    examples, kept = tokenize(tokenizer, rows, length, left_out)
    assert kept == rows[:2]
    assert left_out == {"too long for an answer": 1, "cut": 1}
    assert examples[0] == whole[0]
    assert examples[1] == {name: whole[1][name][:length] for name in whole[1]}
    with pytest.raises(SettingsError, match="MAX_LENGTH is 2 here: give more or shorter"):
        tokenize(tokenizer, rows, 2, Counter())


def test_of_a_conversation_the_answers_and_their_ends_are_learned(tinyllama):
    system = {"role": "system", "content": "Be kind."}
    talk = [system, *turns("Hi", "Hello there", "Bye", "See you")]
    example = tokens_of(tinyllama, {"messages": talk})
    wanted = ["Hello there</s>", "See you</s>"]
    assert [tinyllama.decode(piece) for piece in learned(example)] == wanted
    text = tinyllama.apply_chat_template(talk, tokenize=False)
    assert example["input_ids"] == tinyllama(text, add_special_tokens=False)["input_ids"]
    opened = turns("Welcome", "Hi", "Ho", first="assistant")
    example = tokens_of(tinyllama, {"messages": opened})
    assert [tinyllama.decode(piece) for piece in learned(example)] == ["Ho</s>"]


FORGETFUL = "{% for m in messages[-2:] %}{{ m['content'] + eos_token }}{% endfor %}"
ENDS_ONCE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ENDS_ONCE += "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}"


@pytest.mark.parametrize("template", [FORGETFUL, ENDS_ONCE])
def test_a_chat_template_that_changes_what_was_said_is_refused(demo_model, template):
    tokenizer = AutoTokenizer.from_pretrained(demo_model, chat_template=template)
    with pytest.raises(ValueError, match="chat template changes"):
        conversation(tokenizer, turns("a", "b", "c", "d"))
