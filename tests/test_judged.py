"""What a reward model judges: the same text and the same tokens in its training and in PPO."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from test_comparisons import CONVERSATION, TOOLS, answer, human, system, user
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from finetune.comparisons import read_comparison
from finetune.data import Data
from finetune.errors import SettingsError
from finetune.fields import LeftOut, Tally
from finetune.judged import (
    conversation_form,
    judged_ids,
    judged_text,
    pairs_of,
    prompt_before,
    tokenize,
    tokenize_comparisons,
)
from finetune.prompts import is_turn, read_prompt
from finetune.scorers import load_scorer

CPU = torch.device("cpu")
FORMS = ["lines", "chat_template"]

CHATML = (
    "{% if tools %}{{ 'TOOLS ' + tools[0]['function']['name'] + '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['tool_calls'] %}{{ 'CALL ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# These know nothing of tools, of what the system says, or of anything.
WITHOUT_TOOLS = CHATML.replace("TOOLS ' + tools[0]['function']['name'] + '\n", "")
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No!') }}{% endif %}"
WITHOUT_SYSTEM += CHATML
# Of earlier answers what was thought is left away, and a last one has an empty thought before it.
THINKING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}


@pytest.fixture
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture
def with_template(tokenizer):
    """Return the tokenizer with a chat template."""

    def make(template):
        tokenizer.chat_template = template
        return tokenizer

    return make


def read(row):
    """Return the better dialogue of a row of comparisons."""
    ((better, _),) = read_comparison(row, Tally())
    return better


# ------------------------------------------------- the same in training and in PPO
ASKED = [
    {"prompt": [user("Hi")]},
    {"prompt": [system("Be kind"), user("Hi")]},
    {"prompt": [user("Hi"), answer("Yo"), user("And?")]},
    {"prompt": [user(" Hi\n")]},
    {"messages": [user("Hi")]},
    {"conversations": [human("Hi")], "system": "Be kind"},
    {"prompt": "Hi", "system": "Be kind"},
    {"instruction": "Add", "input": "1 2", "history": [["A", "B"]]},
    {"question": "Why?", "system": "Be kind"},
]


def in_ppo(tokenizer, row, form, chat_template=False):
    """Return what stands before a response in PPO to the prompt of a row."""
    prompt = read_prompt(row, Tally(), "auto")
    return prompt_before(tokenizer, prompt, is_turn(prompt["prompt"], chat_template), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("row", ASKED)
def test_a_conversation_is_the_same_text_in_training_and_in_ppo(with_template, row, form):
    tokenizer = with_template(CHATML)
    learned = judged_text(tokenizer, read(row | {"chosen": "Good!", "rejected": "Bad"}), form)
    assert in_ppo(tokenizer, row, form) + "Good!" == learned
    assert learned.endswith("Good!")


def test_each_form_is_written_as_it_says(with_template):
    tokenizer = with_template(CHATML)
    turns = [system("Be"), user("Hi"), answer("Yo"), user("And?")]
    dialogue = read({"prompt": turns, "chosen": "Good", "rejected": "Bad"})
    assert judged_text(tokenizer, dialogue, "lines") == "Be\nHi\nYo\nAnd?\nGood"
    wanted = "<|system|>Be\n<|user|>Hi\n<|assistant|>Yo</s>\n<|user|>And?\n<|assistant|>Good"
    assert judged_text(tokenizer, dialogue, "chat_template") == wanted


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("I am", " glad"), ("Hi\n", "glad"), ("I am ", "glad"), ("Q: Hi A:", " glad"), ("", "glad")],
)
@pytest.mark.parametrize("form", ["text", *FORMS])
def test_a_text_is_continued_as_it_was_learned(tokenizer, prompt, response, form):
    """Whatever the form of conversations is."""
    row = {"prompt": prompt, "chosen": response.strip(), "rejected": "sad"}
    before = prompt_before(tokenizer, {"prompt": prompt}, False, form)
    assert before + response == judged_text(tokenizer, read(row), form)


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi",
        pytest.param(
            "Hi\n",
        ),
    ],
)
def test_texts_were_learned_and_a_conversation_of_one_turn_is_asked(tokenizer, prompt):
    """The answer to it has no space before it, which texts have between prompt and answer."""
    learned = judged_text(
        tokenizer, read({"prompt": prompt, "chosen": "Good", "rejected": "Bad"}), "text"
    )
    assert in_ppo(tokenizer, {"prompt": [user(prompt)]}, "text") + "Good" == learned
    assert in_ppo(tokenizer, {"prompt": prompt}, "text", chat_template=True) + "Good" == learned


def test_of_texts_alone_a_conversation_is_scored_as_in_ppo(tokenizer):
    """SCORE judges what is said as PPO would."""
    scored = judged_text(
        tokenizer, read({"messages": [user("Hi"), answer("Good")], "label": 1}), "text"
    )
    assert in_ppo(tokenizer, {"prompt": [user("Hi")]}, "text") + "Good" == scored


@pytest.mark.parametrize("form", FORMS)
def test_a_text_that_is_a_turn_is_a_conversation(with_template, form):
    tokenizer = with_template(CHATML)
    row = {"prompt": [user("Hi")], "chosen": "Good", "rejected": "Bad"}
    before = in_ppo(tokenizer, {"prompt": "Hi"}, form, chat_template=True)
    assert before + "Good" == judged_text(tokenizer, read(row), form)


def test_an_answer_in_a_template_that_treats_the_last_differently(with_template):
    """It is judged behind what is put before a response, with the rest as it is in PPO."""
    tokenizer = with_template(THINKING)
    turns = [user("Hi"), answer("Yo"), user("And?")]
    dialogue = read({"prompt": turns, "chosen": "Good", "rejected": "Bad"})
    wanted = "<|user|>Hi\n<|assistant|>Yo\n<|user|>And?\n<|assistant|>Good"
    assert judged_text(tokenizer, dialogue, "chat_template") == wanted
    assert in_ppo(tokenizer, {"prompt": turns}, "chat_template") + "Good" == wanted


# ------------------------------------------------------------------------- the form
@pytest.mark.parametrize(
    ("rows", "template", "form"),
    [
        ([{"prompt": "Hi", "chosen": "a", "rejected": "b"}], CHATML, "text"),
        ([{"text": "fine", "label": 1}], CHATML, "text"),
        ([CONVERSATION], CHATML, "chat_template"),
        ([CONVERSATION], None, "lines"),
        ([{"text": "fine", "label": 1}, {"messages": [user("A"), answer("B")], "label": 0}],
         CHATML, "chat_template"),
        ([{"text": "fine", "label": 1}, {"messages": [user("A"), answer("B")], "label": 0}],
         None, "lines"),
    ],
)  # fmt: skip
def test_the_form_is_the_templates_where_there_is_one(with_template, rows, template, form):
    pairs = [read_comparison(row, Tally()) for row in rows]
    assert conversation_form(with_template(template), pairs) == form


# -------------------------------------------------------- what a template leaves away
@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (CHATML, CONVERSATION, None),
        (CHATML, CONVERSATION | {"tools": TOOLS}, None),
        (WITHOUT_TOOLS, CONVERSATION | {"tools": TOOLS}, "with tools, which the chat template"),
        (None, CONVERSATION | {"tools": TOOLS}, "with tools, for which the model has no chat"),
        (WITHOUT_SYSTEM, CONVERSATION | {"system": "Be"}, r"that the chat template refuses \(No!"),
        (
            CHATML.replace("message['content']", "''"),
            CONVERSATION,
            "with a turn of user, which the chat template leaves away",
        ),
        ("{{ '' }}", CONVERSATION, "of which the chat template renders nothing"),
        (
            CHATML.replace("CALL ", ""),
            {"messages": [user("Hi"), CALL, {"role": "tool", "content": "9"}, answer("9")]}
            | {"label": 1},
            "with tool_calls, which the chat template does not know",
        ),
    ],
)
def test_what_the_template_does_not_take_is_left_out(with_template, template, row, reason):
    tokenizer = with_template(template)
    pairs = [read_comparison(row, Tally())]
    tally, form = Tally(), conversation_form(tokenizer, pairs)
    if reason is None:
        assert len(pairs_of(tokenizer, pairs, form, tally)) == 1
        return
    assert pairs_of(tokenizer, pairs, form, tally) == []
    assert re.match(f"1 {reason}", tally.reasons())
    with pytest.raises(LeftOut, match=reason):
        judged_text(tokenizer, pairs[0][0][0], form)


def test_tools_are_judged_with_the_rest(with_template):
    tokenizer = with_template(CHATML)
    learned = judged_text(tokenizer, read(CONVERSATION | {"tools": TOOLS}), "chat_template")
    assert learned == "TOOLS clock\n<|user|>Hi\n<|assistant|>Hello"
    asked = {"messages": [user("Hi")], "tools": TOOLS}
    assert in_ppo(tokenizer, asked, "chat_template") + "Hello" == learned


def data_of(rows, eval_rows):
    """Return rows of comparisons as what DATA holds."""
    tally = Tally()
    parts = [[read_comparison(row, tally) for row in part] for part in (rows, eval_rows)]
    return Data(*parts, tally)


SETTINGS = SimpleNamespace(data="rows.jsonl")
RANKED = {f"completion_{number}": f"{number}" for number in range(3)} | {"ranking": [0, 1, 2]}


def test_of_a_row_that_is_left_out_no_comparison_is_learned(with_template):
    """And its reason is counted once, though the row has several."""
    rows = [RANKED | {"prompt": [user("Hi")], "tools": TOOLS}]
    rows += [CONVERSATION, RANKED | {"prompt": [user("Hello")]}]
    data = data_of(rows, [CONVERSATION])
    form, examples, held_out = tokenize_comparisons(with_template(WITHOUT_TOOLS), data, SETTINGS)
    assert form == "chat_template"
    pairs = [example["texts"] for example in examples]
    assert len(set(pairs)) == len(pairs) == 4
    assert pairs[0] == held_out[0]["texts"]
    assert {example["row"] for example in examples} == {1, 2}
    told = "1 with tools, which the chat template does not know"
    assert data.tally.in_words() == f"; left out: {told}"


def test_held_out_rows_that_the_template_refuses_do_not_stop_the_run(with_template):
    """Of the rows that are left some can be held out."""
    data = data_of([CONVERSATION] * 9, [CONVERSATION | {"tools": TOOLS}])
    _, examples, held_out = tokenize_comparisons(with_template(WITHOUT_TOOLS), data, SETTINGS)
    assert examples and held_out


def test_data_of_which_the_template_takes_nothing(with_template):
    data = data_of([CONVERSATION | {"system": text} for text in "AB"], [CONVERSATION])
    with pytest.raises(SettingsError) as told:
        tokenize_comparisons(with_template(WITHOUT_SYSTEM), data, SETTINGS)
    (problem,) = told.value.args
    assert problem.startswith(
        "DATA is rows.jsonl: it can't be used (none of its rows can be used: 2"
    )
    assert problem.endswith("): name a model with a chat template that takes them")


# ------------------------------------------------------------------------- the tokens
def test_a_start_token_of_the_template_is_the_only_one(with_template):
    """The ids are those that the template itself makes."""
    tokenizer = with_template("{{ bos_token }}" + CHATML)
    text = judged_text(tokenizer, read(CONVERSATION), "chat_template")
    wanted = tokenizer.apply_chat_template([user("Hi")], add_generation_prompt=True, tokenize=False)
    wanted = tokenizer(wanted + "Hello", add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id
    assert wanted[0] == start not in wanted[1:]
    assert judged_ids(tokenizer, text) == wanted
    (example,) = tokenize(tokenizer, [(0, text, "<s>I am")], Tally())
    assert example["sequences"][0] == wanted
    assert example["sequences"][1] == tokenizer("I am")["input_ids"]
    assert example["sequences"][1].count(start) == 1


def test_of_a_long_conversation_the_end_is_judged(with_template):
    tokenizer = with_template("{{ bos_token }}" + CHATML)
    tokenizer.truncation_side = "left"
    row = {"prompt": [user("Hello there. " * 20)], "chosen": "Good", "rejected": "Bad"}
    text = judged_text(tokenizer, read(row), "chat_template")
    whole, ids = judged_ids(tokenizer, text), judged_ids(tokenizer, text, 12)
    assert len(whole) > 40 and len(ids) == 12
    assert ids == [tokenizer.bos_token_id, *whole[-11:]]


@pytest.fixture
def save_judge(with_template, tmp_path):
    """Save a random classifier whose config tells a form; return its folder."""

    def save(template, form):
        tokenizer = with_template(template)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 48, "vocab_size": len(tokenizer), "initializer_range": 0.3}
        config = LlamaConfig(**sizes, num_labels=1, pad_token_id=tokenizer.pad_token_id)
        if form:
            config.conversation_form = form
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize("form", ["text", *FORMS, None])
def test_a_classifier_gets_the_form_that_its_config_tells(save_judge, form):
    """Without one it is from elsewhere, and gets the last message on a line of its own."""
    folder = save_judge("{{ bos_token }}" + CHATML, form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    turns = [system("Be"), user("Hi")]
    rows = [{"prompt": turns}, {"prompt": [user("Hello")]}, {"prompt": "I am"}]
    before = {
        "text": ["Be\nHi\n", "Hello ", "I am"],
        "lines": ["Be\nHi\n", "Hello\n", "I am"],
        "chat_template": [
            "<s><|system|>Be\n<|user|>Hi\n<|assistant|>",
            "<s><|user|>Hello\n<|assistant|>",
            "I am",
        ],
        None: ["Hi\n", "Hello\n", "I am"],
    }
    texts = ["Good", "Fine", " so glad"]
    with torch.no_grad():
        wanted = []
        for whole in [start + text for start, text in zip(before[form], texts)]:
            ids = tokenizer(whole.removeprefix("<s>"))["input_ids"]
            wanted.append(model(torch.tensor([ids])).logits[0, 0].item())
    assert max(wanted) - min(wanted) > 0.05
    scorer, _ = load_scorer("REWARD", folder, None, "", 40, False, CPU)
    assert scorer(rows, texts) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("form", "template", "row"),
    [
        ("chat_template", WITHOUT_SYSTEM, {"prompt": [system("Be"), user("Hi")]}),
        ("lines", None, {"prompt": [user("Hi")], "tools": TOOLS}),
    ],
)
def test_a_prompt_that_the_reward_model_can_not_take_is_told_in_one_line(
    save_judge, form, template, row
):
    """PPO may ask what the reward model never saw, for which its own template has no place."""
    scorer, _ = load_scorer("REWARD", save_judge(template, form), None, "", 40, False, CPU)
    with pytest.raises(SettingsError) as told:
        scorer.try_out([row, row])
    assert str(told.value).startswith("REWARD is ")


def test_texts_that_are_cut_are_told_and_of_those_that_are_the_same_then_none_is_left(tokenizer):
    """Only the end is judged: where better and worse differ before it, nothing is to be learned."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 8
    tokenizer.truncation_side = "left"
    end = " I am so very glad today that I sing" * 2
    tally = Tally()
    pairs = [(0, "Good." + end, "Bad." + end), (1, "I am glad", "I am sad"), (2, end, None)]
    examples = tokenize(tokenizer, pairs, tally)
    assert [example["row"] for example in examples] == [1, 2]
    assert tally.changed == {"texts cut": 3}
    assert tally.left_out == {"that are the same after they were cut": 1}
