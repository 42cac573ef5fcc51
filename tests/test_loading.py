"""A base model and the prompts that its template, its context and its embedding take."""

import json

import pytest
from helpers import refusals
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import SettingsError
from finetune.fields import Tally
from finetune.loading import load_model, prompts_that_fit
from finetune.prompts import read_prompts
from finetune.tokens import check_ids, encode, load_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool['name'] }};{% endfor %}" + CHATML
CALLS = "{{ message['tool_calls'] | tojson if message['tool_calls'] else '' }}"
WITH_CALLS = WITH_TOOLS.replace("{{ message['content']", CALLS + "{{ message['content']")
CONTEXT = 256  # of demo_model, in tokens
SYSTEM = {"role": "system", "content": "Be kind."}
SAID = {"role": "assistant", "content": "Good day."}
TOOLS = [{"name": "look"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def tokenizer(demo_model):
    tokenizer = load_tokenizer(str(demo_model))
    tokenizer.chat_template = CHATML
    return tokenizer


# ------------------------------------------------------------------- what fits
LONG = "very " * 100 + "good"


@pytest.fixture
def fitting(tokenizer, make_settings):
    """Return the rows that leave room for a response of so many tokens, and how many don't."""

    def find(new_tokens, *rows, flags=(), context=CONTEXT):
        settings = make_settings("--max-new-tokens", str(new_tokens), *flags)
        tally = Tally()
        found = prompts_that_fit(context, tokenizer, [*rows], settings, tally)
        return found, tally.left_out.total()

    return find


@pytest.mark.parametrize("prompt", [LONG, [user(LONG)]], ids=["text", "chat"])
def test_prompt_and_response_have_to_fit_into_the_context(tokenizer, fitting, prompt):
    """What does not fit is left out; it is told where nothing fits."""
    short, long = {"prompt": "My cat"}, {"prompt": prompt}
    length = len(encode(tokenizer, [long], False)[0])
    room = CONTEXT - length
    assert fitting(room, short, long) == ([short, long], 0)
    assert fitting(room + 1, long, short, long) == ([short], 2)
    assert fitting(CONTEXT + 1) == ([], 0)  # of none that were asked for none are missed
    assert fitting(10**6, long, context=float("inf")) == ([long], 0)
    with pytest.raises(SettingsError) as error:
        fitting(room + 1, long, long)
    (problem,) = error.value.args
    told = f"MAX_NEW_TOKENS is {room + 1}, too many for every prompt, such as 'very very"
    assert problem.startswith(told)
    remedy = f"give less, or shorter prompts; the model's context is {CONTEXT}"
    assert problem.endswith(f"', {length} tokens: {remedy}")
    assert len(problem) < 300


def test_the_template_takes_of_the_context_too(tokenizer, fitting):
    """Of 256 tokens 4 are left for a prompt: enough for it, not for its template."""
    row = {"prompt": "I feel so"}
    assert len(tokenizer("I feel so")["input_ids"]) <= 4
    assert fitting(252, row) == ([row], 0)
    with pytest.raises(SettingsError, match="MAX_NEW_TOKENS is 252, too many for every"):
        fitting(252, row, flags=["--chat-template"])


# ---------------------------------------------------------------- templates
def taken(tokenizer, settings, *rows):
    """Return the prompts that the template takes, and what is told of the others."""
    tally = Tally()
    found = prompts_that_fit(CONTEXT, tokenizer, [*rows], settings, tally)
    return [row["prompt"] for row in found], tally.in_words()


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
)
LAST_ALONE = "{{ messages[-1]['content'] }}!"
QUESTIONS_ALONE = CHATML.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] == 'user' %}"
)
NEVER = "{{ raise_exception('Not for these') }}"


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (
            NO_SYSTEM + CHATML,
            {"prompt": [SYSTEM, user("Hi")]},
            "that the chat template refuses (No system here)",
        ),
        (
            LAST_ALONE,
            {"prompt": [SYSTEM, user("Hi")]},
            "with a turn of system, which the chat template leaves away",
        ),
        (
            QUESTIONS_ALONE,
            {"prompt": [user("Hi"), SAID, user("And?")]},
            "with a turn of assistant, which the chat template leaves away",
        ),
        (
            CHATML,
            {"prompt": [user("Hi")], "tools": TOOLS},
            "with tools, which the chat template does not know",
        ),
        (
            WITH_TOOLS,
            {
                "prompt": [
                    user("Hi"),
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                    {"role": "tool", "content": "Nothing"},
                ],
                "tools": TOOLS,
            },
            "with tool_calls, which the chat template does not know",
        ),
        (
            "{% if messages | length == 1 %}{{ messages[0]['content'] }}{% endif %}",
            {"prompt": [SYSTEM, user("Hi")]},
            "of which the chat template renders nothing",
        ),
        (
            "{{ messages[3]['content'] + 'x' }}",
            {"prompt": [SYSTEM, user("Hi")]},
            "that the chat template refuses (",
        ),
    ],
)
def test_a_prompt_that_the_template_does_not_take_is_left_out_with_its_reason(
    tokenizer, settings, template, row, reason
):
    """It is counted beside others; where there are no others CHAT_TEMPLATE is told."""
    tokenizer.chat_template = template
    prompts, words = taken(tokenizer, settings, row, {"prompt": "a text"}, row)
    assert prompts == ["a text"]
    assert words.startswith(f"; left out: 2 {reason}")
    with pytest.raises(SettingsError) as error:
        taken(tokenizer, settings, row, row)
    (problem,) = error.value.args
    told = "CHAT_TEMPLATE is False: no prompt can be put into the model's template (2 "
    assert problem.startswith(told + reason)
    remedy = "name a model with a chat template that takes these prompts, or give texts and False"
    assert problem.endswith(f": {remedy}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ '' }}", "of which the chat template renders nothing"),
        ("{# nothing #}", "of which the chat template renders nothing"),
        (" \n", "of which the chat template renders nothing"),
        (NEVER, "that the chat template refuses (Not for these)"),
        ("{% for", "that the chat template refuses ("),
    ],
)
@pytest.mark.parametrize("prompt", ["Hi", [user("Hi")]])
def test_a_template_that_renders_nothing_or_is_broken_is_refused(
    tokenizer, make_settings, template, reason, prompt
):
    tokenizer.chat_template = template
    with pytest.raises(SettingsError) as error:
        taken(tokenizer, make_settings("--chat-template"), {"prompt": prompt})
    (problem,) = error.value.args
    told = "CHAT_TEMPLATE is True: no prompt can be put into the model's template (1 "
    assert problem.startswith(told + reason)
    assert "MODEL_NAME" not in problem and len(problem) < 450


@pytest.mark.parametrize("prompt", ["Hi", [user("Hi")]])
def test_a_template_that_ignores_what_is_asked_is_refused(tokenizer, make_settings, prompt):
    tokenizer.chat_template = "{{ bos_token }}Answer:"
    with pytest.raises(SettingsError, match="with a turn of user, which the chat template leaves"):
        taken(tokenizer, make_settings("--chat-template"), {"prompt": prompt})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, user("Hi"), SAID, user(" And? \n")]},
        {"prompt": [user("Hi")], "tools": TOOLS},
        {"prompt": [user("Hi")], "tools": None},
        {
            "prompt": [
                user("Hi"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "Nothing"},
            ],
            "tools": TOOLS,
        },
    ],
)
def test_what_the_template_knows_is_taken_whole(tokenizer, settings, row):
    tokenizer.chat_template = WITH_CALLS
    assert taken(tokenizer, settings, row) == ([row["prompt"]], "")
    text = tokenizer.decode(encode(tokenizer, [row], False)[0])
    assert all(turn["content"].strip() in text for turn in row["prompt"])
    assert ("look;" in text) == bool(row.get("tools"))
    assert ("arguments" in text) == (len(row["prompt"]) == 3)


def test_a_template_may_write_a_turn_without_the_spaces_around_it(tokenizer, settings):
    tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    row = {"prompt": [user("  Hi \n")]}
    assert taken(tokenizer, settings, row) == ([row["prompt"]], "")


def test_tools_that_are_an_empty_list_in_a_text_are_none(tokenizer, settings, tmp_path):
    """As a csv has them."""
    row = {"messages": [user("Hi")], "tools": "[]"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    rows = read_prompts([str(tmp_path / "p.jsonl")], [], 0, "auto", 0).rows
    assert taken(tokenizer, settings, *rows) == ([[user("Hi")]], "")


@pytest.mark.parametrize(
    ("prompt", "flags"),
    [("Hi", ["--chat-template"]), ([user("Hi")], [])],
)
def test_a_model_without_a_template_is_refused(tokenizer, make_settings, prompt, flags):
    tokenizer.chat_template = None
    with pytest.raises(SettingsError) as error:
        taken(tokenizer, make_settings(*flags), {"prompt": prompt})
    (problem,) = error.value.args
    told = f"CHAT_TEMPLATE is {flags != []}: no prompt can be put into the model's template (1 of a"
    assert problem.startswith(told)
    remedy = "name a model with a chat template that takes these prompts"
    assert problem.endswith(f": {remedy}, or give texts and False")


# -------------------------------------------------------------- the embedding
@pytest.fixture
def beyond(copy_of_demo_model):
    """Return a model whose tokenizer has a token that its embedding lacks, and its length."""
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    model = AutoModelForCausalLM.from_pretrained(copy_of_demo_model)
    length = len(tokenizer)
    model.resize_token_embeddings(length)
    model.save_pretrained(copy_of_demo_model)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.chat_template = "<|new|>" + LAST_ALONE
    tokenizer.save_pretrained(copy_of_demo_model)
    return copy_of_demo_model, length


def told_of(length):
    token = f"its tokenizer has the token '<|new|>' with the id {length}"
    return f"{token}, but its embedding has {length} rows"


@pytest.mark.parametrize(
    ("prompts", "flags"),
    [
        (["Hi", "So <|new|> it is"], []),
        (["Hi"], ["--eval-prompts", "<|new|>"]),
        (["Hi"], ["--chat-template"]),
    ],
)
def test_ids_beyond_the_embedding_are_refused_with_both_numbers_before_anything_is_written(
    beyond, call_main, capsys, tmp_path, prompts, flags
):
    folder, length = beyond
    before = sorted(tmp_path.rglob("*"))
    status = call_main("--model-name", folder, "--device", "cpu", "--prompts", *prompts, *flags)
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("MODEL_NAME is ") and told_of(length) in problem
    assert len(problem) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_a_token_that_no_prompt_has_may_lack_in_the_embedding(beyond, make_settings):
    """Many a model has an added token that it was never given."""
    folder, length = beyond
    settings = make_settings("--model-name", str(folder), "--prompts", "Hi", "--eval-prompts")
    prompts = read_prompts(settings.prompts, [], 0, "auto", 0)
    model, tokenizer, found = load_model(settings, prompts, "cpu", "float32")
    assert found.rows == [{"prompt": "Hi"}] and len(tokenizer) == length + 1
    check_ids(model, tokenizer, [[length - 1], [0]])
    with pytest.raises(ValueError, match=r"'<\|new\|>' with the id \d+, but its embedding has"):
        check_ids(model, tokenizer, [[0], [length, 3]])


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_special_token_beyond_the_embedding_is_refused(beyond, name):
    folder, length = beyond
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    setattr(tokenizer, name, "<|new|>")
    with pytest.raises(ValueError) as error:
        check_ids(model, tokenizer, [])
    assert str(error.value) == told_of(length)


# ------------------------------------------------------------- a whole loading
def test_what_is_left_out_of_prompts_is_told_by_its_reason(
    copy_of_demo_model, make_settings, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    tokenizer.chat_template = NO_SYSTEM + CHATML
    tokenizer.save_pretrained(copy_of_demo_model)
    texts = ["Hi", "Hi", "", "very " * 300]
    rows = [{"messages": [user(text)]} for text in texts]
    rows += [{"messages": [SYSTEM, user(text)], "id": 5} for text in ("Hi", "So")]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = make_settings("--model-name", str(copy_of_demo_model), "--prompts", str(path))
    prompts = read_prompts(settings.prompts, [], 0, "auto", 0)
    _, _, found = load_model(settings, prompts, "cpu", "float32")
    assert [row["prompt"] for row in found.rows] == [[user("Hi")]]
    words = "; left out: 1 empty, 1 given twice, 2 that the chat template refuses (No system here)"
    assert found.tally.in_words() == f"{words}, 1 too long; fields not used: id (2)"
