"""Which tokens of an example are learned, in templates of every kind."""

import re

import pytest
from test_examples import AS_IT_IS, right_padded, row_of, tokens_of, turns
from tokenizers.processors import TemplateProcessing

from finetune.data import Data
from finetune.errors import SettingsError
from finetune.examples import read_example
from finetune.fields import LeftOut, Tally
from finetune.labels import tokenize, tokenize_data

# Templates as those of models have them, but without what no test needs.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set last = messages | length - 1 %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 == last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
    "{% else %}{% set content = m.content.split('</think>')[-1] %}"
    "{{ '<|assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<|call|>' + call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return right_padded(demo_model)


@pytest.fixture(scope="module")
def tinyllama(shared_model):
    return right_padded(shared_model("tinyllama-shape"))


@pytest.fixture
def chatting(demo_model):
    """Return a tokenizer with a chat template, and the tokens of the templates above."""

    def make(template):
        tokenizer = right_padded(demo_model)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = template
        return tokenizer

    return make


def talk(*texts, system=None, tools=None):
    """Return a conversation as an example; its first text is the user's."""
    before = [{"role": "system", "content": system}] if system else []
    said = turns(*texts)
    return row_of([*before, *said[:1]], said[1:], tools)


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


def lesson(tokenizer, example):
    """Return an example as a text, with what is learned in it between ⟦ and ⟧."""
    text, before = "", False
    # The first token has nothing before it, whatever its label.
    for token, label in zip(example["input_ids"], [-100, *example["labels"][1:]]):
        assert label in (token, -100)
        if before != (label != -100):
            text += "⟧" if before else "⟦"
        before = label != -100
        text += tokenizer.decode(token)
    return text + "⟧" if before else text


def lessons(tokenizer, *rows, template=AS_IT_IS):
    """Return what is learned of rows, an example each, and what is told of the others."""
    tally = Tally()
    examples, _ = tokenize(tokenizer, list(rows), template, 512, tally)
    return [lesson(tokenizer, example) for example in examples], tally


def refused(tokenizer, row):
    """Return the one reason for which a row is left out."""
    tally = Tally()
    with pytest.raises(ValueError, match="none of its rows can be used"):
        tokenize(tokenizer, [row], AS_IT_IS, 512, tally)
    ((reason, count),) = tally.left_out.items()
    assert count == 1
    return reason


# ------------------------------------------------------- an answer to an instruction
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


def test_of_an_instruction_what_was_said_before_is_learned_with_its_ends(tokenizer):
    row = {"instruction": "And?", "output": "Two", "history": [["One?", "One"], ["", "Hm"]]}
    row["system"] = "Be kind."
    example = read_example(row, Tally())
    told, _ = lessons(tokenizer, example, template="Q: {instruction}\nA:\n")
    before = "<s>Be kind.\n\nQ: One?\nA:\n⟦One</s>⟧Q: \nA:\n⟦Hm</s>⟧"
    assert told == [f"{before}Q: And?\nA:\n⟦Two</s>⟧"]


def test_a_text_with_a_start_and_an_end_of_its_own_gets_no_second(tokenizer):
    rows = [row_of("", "<s>I am happy.</s>"), row_of("<s>Say it:\n", "happy</s>")]
    told, _ = lessons(tokenizer, *rows)
    assert told == ["<s>⟦I am happy.</s>⟧", "<s>Say it:\n⟦happy</s>⟧"]


def append_an_end(tokenizer):
    """Let a tokenizer put an end token behind every text."""
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    processor = TemplateProcessing("<s> $A </s>", None, ends)
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def test_an_end_that_the_tokenizer_adds_is_the_only_one_and_is_learned(demo_model):
    tokenizer = append_an_end(right_padded(demo_model))
    example = tokens_of(tokenizer, row_of("Say\n", "happy."))
    assert tokenizer.decode(example["input_ids"]) == "<s>Say\nhappy.</s>"
    ends = tokenizer.convert_ids_to_tokens(learned(example)[0])
    assert ends == ["happy", ".", "</s>"]


def test_a_tokenizer_that_adds_an_end_adds_none_to_a_conversation(chatting):
    for template in (CHATML, NO_END):
        wanted, _ = lessons(chatting(template), talk("Hi", "Ho", "And?", "Two"))
        told, _ = lessons(append_an_end(chatting(template)), talk("Hi", "Ho", "And?", "Two"))
        assert told == wanted


def test_what_is_too_long_is_cut_or_dropped_and_told(tokenizer):
    rows = [
        row_of("Q\n", "I am happy."),
        row_of("Q\n", "I am so happy and so glad."),
        row_of("I am so happy and so glad and so calm\n", "Yes."),
    ]
    whole, _ = tokenize(tokenizer, rows, AS_IT_IS, 512, Tally())
    length, tally = len(whole[0]["input_ids"]), Tally()
    examples, kept = tokenize(tokenizer, rows, AS_IT_IS, length, tally)
    assert [row["turns"] for row in kept] == [row["turns"] for row in rows[:2]]
    assert tally.in_words() == ", 1 cut; left out: 1 too long for an answer"
    assert examples[0] == whole[0]
    assert examples[1] == {name: whole[1][name][:length] for name in whole[1]}
    with pytest.raises(SettingsError, match="MAX_LENGTH is 2 here: give more or shorter"):
        tokenize(tokenizer, rows, AS_IT_IS, 2, Tally())


def test_held_out_rows_that_the_template_refuses_are_not_blamed_on_max_length(chatting):
    tokenizer = chatting(FORGETFUL)
    rows = [talk("Hi", "Ho"), talk("long " * 99, "Ho")]
    data = Data(rows, [talk("a1", "b2", "c3", "d4")], Tally())
    with pytest.raises(ValueError, match="which the chat template leaves away"):
        tokenize_data(tokenizer, data, AS_IT_IS, 64)


# ---------------------------------------------------------------- conversations
def test_of_a_conversation_the_answers_and_their_ends_are_learned(tinyllama):
    row = talk("Hi", "Hello there", "Bye", "See you", system="Be kind.")
    example = tokens_of(tinyllama, row)
    wanted = ["Hello there</s>", "See you</s>"]
    assert [tinyllama.decode(piece) for piece in learned(example)] == wanted
    text = tinyllama.apply_chat_template(row["turns"], tokenize=False)
    assert example["input_ids"] == tinyllama(text, add_special_tokens=False)["input_ids"]
    opened = turns("Welcome", "Hi", "Ho", first="assistant")
    example = tokens_of(tinyllama, row_of(opened[:1], opened[1:]))
    assert [tinyllama.decode(piece) for piece in learned(example)] == ["Ho</s>"]


USER = "<|im_start|>user\n"
ASSISTANT = "<|im_start|>assistant\n"
THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (
            CHATML,
            [
                f"{USER}Hi<|im_end|>\n{ASSISTANT}⟦Ho<|im_end|>⟧\n"
                f"{USER}And?<|im_end|>\n{ASSISTANT}⟦Two<|im_end|>⟧\n"
            ],
        ),
        (
            QWEN3,
            [
                f"{USER}Hi<|im_end|>\n{ASSISTANT}⟦{THOUGHT}Ho<|im_end|>⟧",
                f"{USER}Hi<|im_end|>\n{ASSISTANT}Ho<|im_end|>\n"
                f"{USER}And?<|im_end|>\n{ASSISTANT}⟦{THOUGHT}Two<|im_end|>⟧",
            ],
        ),
        (
            PHI3,
            [
                "<|user|>\nHi<|im_end|>\n<|assistant|>\n⟦Ho<|im_end|>\n</s>⟧",
                "<|user|>\nHi<|im_end|>\n<|assistant|>\nHo<|im_end|>\n"
                "<|user|>\nAnd?<|im_end|>\n<|assistant|>\n⟦Two<|im_end|>\n</s>⟧",
            ],
        ),
        (
            DEEPSEEK_R1,
            ["<s><|user|>Hi<|assistant|>⟦Ho</s>⟧<|user|>And?<|assistant|>⟦Two</s>⟧"],
        ),
        (
            NO_END,
            [
                "user:\nHi\nassistant:\n⟦Ho</s>⟧",
                "user:\nHi\nassistant:\nHo\nuser:\nAnd?\nassistant:\n⟦Two</s>⟧",
            ],
        ),
    ],
    ids=["chatml", "qwen3", "phi3", "deepseek-r1", "no-end"],
)
def test_several_answers_are_learned_in_templates_of_every_kind(chatting, template, wanted):
    told, tally = lessons(chatting(template), talk("Hi", "Ho", "And?", "Two"))
    assert told == wanted
    assert not +tally.left_out and not +tally.changed


@pytest.mark.parametrize("template", [CHATML, QWEN3, PHI3, DEEPSEEK_R1, NO_END])
def test_what_is_learned_follows_what_the_model_is_asked(chatting, template):
    """The tokens before an answer are those that the template asks with, or all but its end."""
    tokenizer = chatting(template)
    row = talk("Hi", "Ho", "And?", "Two")
    ids = []
    for example in tokenize(tokenizer, [row], AS_IT_IS, 512, Tally()).examples:
        labels = example["labels"]
        starts = [n for n in range(1, len(labels)) if labels[n] != -100 == labels[n - 1]]
        ids += [example["input_ids"][:start] for start in starts]
    asked = [row["turns"][:1], row["turns"][:3]]
    for before, turns_before in zip(ids, asked, strict=True):
        prompt = tokenizer.apply_chat_template(turns_before, add_generation_prompt=True)
        if template is DEEPSEEK_R1:  # which begins to think where it is asked
            assert prompt["input_ids"][: len(before)] == before
        else:
            assert prompt["input_ids"] == before


def test_an_example_of_each_answer_shows_what_it_answers(chatting):
    row = talk("Hi", "Ho", "And?", "Two")
    for template, shown in ((QWEN3, ["Hi", "And?"]), (CHATML, ["Hi"])):
        rows = tokenize(chatting(template), [row], AS_IT_IS, 512, Tally()).rows
        assert [row["shown"] for row in rows] == shown


FORGETFUL = "{% for m in messages[-2:] %}{{ m['content'] + eos_token }}{% endfor %}"
NUMBERED = (
    "{% for m in messages %}{{ messages | length ~ m['role'] ~ m['content'] ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ (messages | length + 1) ~ 'assistant' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (FORGETFUL, "with a turn of user, which the chat template leaves away"),
        (NUMBERED, "where the chat template changes what came before an answer"),
    ],
)
def test_a_chat_template_that_changes_what_was_said_is_refused(chatting, template, reason):
    assert refused(chatting(template), talk("a1", "b2", "c3", "d4")) == reason


def test_a_model_without_a_chat_template_is_told_of_conversations(chatting):
    with pytest.raises(ValueError, match="it has conversations, and the model has no chat templ"):
        tokenize(chatting(None), [talk("Hi", "Ho")], AS_IT_IS, 512, Tally())
    told, _ = lessons(chatting(None), row_of("Hi\n", "Ho"))
    assert told == ["<s>Hi\n⟦Ho</s>⟧"]


# ------------------------------------------------------------- what is not to be learned
@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0"},
        {"train": False},
        {"training": False},
        {"training": "false"},
        {"loss": False},
        {"loss": 0},
    ],
    ids=str,
)
def test_an_answer_that_is_marked_is_context(chatting, mark):
    said = turns("Hi", "Ho", "And?", "Two")
    said[1] |= mark
    row = read_example({"messages": said}, Tally())
    told, _ = lessons(chatting(CHATML), row)
    assert told == [
        f"{USER}Hi<|im_end|>\n{ASSISTANT}Ho<|im_end|>\n"
        f"{USER}And?<|im_end|>\n{ASSISTANT}⟦Two<|im_end|>⟧\n"
    ]
    told, _ = lessons(chatting(QWEN3), row)
    assert [text.count("⟦") for text in told] == [1]
    assert f"Ho<|im_end|>\n{USER}" in told[0] and f"⟦{THOUGHT}Two<|im_end|>⟧" in told[0]


@pytest.mark.parametrize("mark", [{"weight": 1}, {"weight": "1"}, {"train": True}, {"loss": None}])
def test_an_answer_that_is_marked_to_be_learned_is_learned(chatting, mark):
    said = turns("Hi", "Ho")
    said[1] |= mark
    told, _ = lessons(chatting(CHATML), read_example({"messages": said}, Tally()))
    assert told == [f"{USER}Hi<|im_end|>\n{ASSISTANT}⟦Ho<|im_end|>⟧\n"]


@pytest.mark.parametrize("empty", ["", " \n", None])
def test_an_empty_answer_is_never_learned(chatting, empty):
    said = turns("Hi", "Ho", "And?", empty)
    if empty is None:
        said[3] |= {"content": None}
    for template in (CHATML, QWEN3, PHI3, NO_END):
        told, _ = lessons(chatting(template), read_example({"messages": said}, Tally()))
        assert len(told) == 1 and told[0].count("⟦") == 1
        assert "⟦Ho" in told[0] or f"⟦{THOUGHT}Ho" in told[0]


# ----------------------------------------------------------------------------- tools
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
ASKED_A_TOOL = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "noon", "name": "clock"},
    {"role": "assistant", "content": "Noon."},
]


def test_a_call_of_a_tool_is_learned_and_its_tools_are_shown(chatting):
    example = read_example({"messages": ASKED_A_TOOL, "tools": TOOLS}, Tally())
    (text,), _ = lessons(chatting(WITH_TOOLS), example)
    before, call, result = text.partition("<|im_end|>")[2].partition(ASSISTANT)
    assert text.startswith('<|tools|>[{"type": "function", "function": {"name": "clock"')
    assert before == f"{USER}Time?<|im_end|>\n" and call
    assert result == (
        '⟦<|call|>{"name": "clock", "arguments": {}}<|im_end|>⟧\n'
        "<|im_start|>tool\nnoon<|im_end|>\n"
        f"{ASSISTANT}⟦Noon.<|im_end|>⟧\n"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": ASKED_A_TOOL},
            "with tool_calls, which the chat template does not know",
        ),
        (
            {"messages": turns("Hi", "Ho"), "tools": TOOLS},
            "with tools, which the chat template does not know",
        ),
    ],
)
def test_a_template_that_knows_no_tools_refuses_them(chatting, row, reason):
    template = CHATML.replace("m.content", "(m.content or '')")
    assert refused(chatting(template), read_example(row, Tally())) == reason


# ------------------------------------------------------------------ beginnings alike
def test_an_answer_that_begins_as_the_template_does_is_learned_whole(chatting):
    told, _ = lessons(chatting(DEEPSEEK_R1), talk("Hi", "<b>Ho</b>"))
    assert told == ["<s><|user|>Hi<|assistant|>⟦<b>Ho</b></s>⟧"]


def test_a_thought_that_the_template_leaves_away_is_told(chatting):
    """As in data of a model that thinks, for a template that hides thoughts."""
    row = talk("Hi", "<think>\nA greeting.\n</think>\n\nHo")
    tally = Tally()
    try:
        examples, _ = tokenize(chatting(DEEPSEEK_R1), [row], AS_IT_IS, 512, tally)
    except ValueError:
        examples = []
    texts = [lesson(chatting(DEEPSEEK_R1), example) for example in examples]
    assert any("A greeting." in text for text in texts) or +tally.left_out or +tally.changed


def test_an_empty_answer_behind_a_history_leaves_the_row_out():
    with pytest.raises(LeftOut, match="without an answer"):
        read_example({"instruction": "Q", "output": "", "history": [["a", "b"]]}, Tally())


def test_a_special_token_in_what_is_said_is_told(tokenizer):
    """It becomes that token: behind an end token within an answer the model would stop."""
    rows = [{"instruction": "What is </s>?", "output": "An end."}, {"text": "Hi</s>"}]
    tally = Tally()
    tokenize(tokenizer, [read_example(row, tally) for row in rows], AS_IT_IS, 64, tally)
    assert tally.changed == {"with a special token in what is said": 1, "cut": 0}


def test_where_all_that_was_held_out_is_too_long_the_last_row_is_held_out_whole(chatting):
    tokenizer = chatting(NO_END)
    rows = [read_example({"messages": turns("Hi", str(n), "More", "Yes")}, Tally()) for n in "12"]
    long = read_example({"messages": turns("so " * 200, "No")}, Tally())
    data = Data(rows, [long], Tally())
    learned, held_out = tokenize_data(tokenizer, data, AS_IT_IS, 64)
    assert [len(learned.examples), len(held_out.examples)] == [2, 2]  # an example for each answer
    assert {id(row["turns"]) for row in held_out.rows} == {id(rows[1]["turns"])}
    assert data.tally.left_out["too long for an answer"] == 1
