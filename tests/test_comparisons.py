"""Comparisons to learn from: what a row means, which are held out, and how bad rows are told."""

import json
import math

import pytest

from finetune.comparisons import COMPARISONS, read_comparison, read_judged
from finetune.data import read_data
from finetune.errors import SettingsError
from finetune.fields import LeftOut, Tally

RANKED = {"completion_0": "a", "completion_1": "b", "completion_2": "c"}
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}
REMEDY = "give rows with chosen and rejected, completion_0 … and ranking, or text and label"


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


TURNS = [user("Hi")]
GOOD, BAD = answer("Hello"), answer("No")
CONVERSATION = {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}


def in_words(dialogue):
    """Return a text as it is, a conversation as its turns, each with the first of its role."""
    if dialogue is None:
        return "nothing"
    if dialogue.form == "text":
        (turn,) = dialogue.turns
        return turn["content"]
    assert dialogue.form == "messages"
    return ", ".join(f"{turn['role'][0]}:{turn['content']}" for turn in dialogue.turns)


def in_pairs(row, tally=None):
    """Return the comparisons of a row in words."""
    pairs = read_comparison(row, tally or Tally())
    return "; ".join(f"{in_words(better)} > {in_words(worse)}" for better, worse in pairs)


def read(data, eval_share=0.1, seed=0):
    return read_data(str(data), eval_share, seed, COMPARISONS)


def pairs_in(rows):
    """Return the set of all comparisons of rows, each as two texts or None."""
    pairs = [pair for row in rows for pair in row]
    return {tuple(each and in_words(each) for each in pair) for pair in pairs}


# ------------------------------------------------------------- what a row means
@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"chosen": "I am glad", "rejected": "I am sad"}, "I am glad > I am sad"),
        ({"prompt": "I am", "chosen": "ok", "rejected": " so"}, "I am ok > I am so"),
        ({"prompt": "Hi\n", "chosen": "ok", "rejected": "no"}, "Hi\nok > Hi\nno"),
        ({"prompt": "", "chosen": "ok", "rejected": "no"}, "ok > no"),
        ({"prompt": None, "chosen": "ok", "rejected": "no"}, "ok > no"),
        ({"question": "Why?", "chosen": "ok", "rejected": "no"}, "Why? ok > Why? no"),
        ({"instruction": "Add", "chosen": "3", "rejected": "4"}, "Add 3 > Add 4"),
        (
            {"instruction": "Add", "input": "1 2", "chosen": "3", "rejected": "4"},
            "Add\n1 2 3 > Add\n1 2 4",
        ),
        (
            {"instruction": "Add", "input": "", "chosen": "3", "rejected": "4"},
            "Add 3 > Add 4",
        ),
        (
            {"instruction": "Add", "context": "1 2", "chosen": "3", "rejected": "4"},
            "Add\n1 2 3 > Add\n1 2 4",
        ),
        # What is in the fields system and history is said before.
        (
            {"system": "Be kind", "prompt": "Hi", "chosen": "ok", "rejected": "no"},
            "s:Be kind, u:Hi, a:ok > s:Be kind, u:Hi, a:no",
        ),
        (
            {"system": "Be", "question": "Hi", "chosen": "ok", "rejected": "no"},
            "s:Be, u:Hi, a:ok > s:Be, u:Hi, a:no",
        ),
        (
            {"history": [["1", "2"]], "instruction": "3", "chosen": "4", "rejected": "5"},
            "u:1, a:2, u:3, a:4 > u:1, a:2, u:3, a:5",
        ),
        (CONVERSATION | {"system": "Be"}, "s:Be, u:Hi, a:Hello > s:Be, u:Hi, a:No"),
        # A single message, or a list of them, behind what was asked.
        ({"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, "u:Hi, a:Hello > u:Hi, a:No"),
        ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, "u:Hi, a:Hello > u:Hi, a:No"),
        ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, "u:Hi, a:Hello > u:Hi, a:No"),
        ({"prompt": TURNS, "chosen": "Yes", "rejected": "No"}, "u:Hi, a:Yes > u:Hi, a:No"),
        ({"messages": TURNS, "chosen": "Yes", "rejected": "No"}, "u:Hi, a:Yes > u:Hi, a:No"),
        (
            {
                "conversations": [{"from": "System", "value": "Be kind"}, human("Hi")],
                "chosen": {"from": "GPT", "value": "Hello"},
                "rejected": gpt("No"),
            },
            "s:Be kind, u:Hi, a:Hello > s:Be kind, u:Hi, a:No",
        ),
        (
            {
                "conversations": [human("Hi")],
                "system": "Be",
                "chosen": gpt("Yes"),
                "rejected": gpt("No"),
            },
            "s:Be, u:Hi, a:Yes > s:Be, u:Hi, a:No",
        ),
        # A message without a question is a text.
        ({"chosen": GOOD, "rejected": BAD}, "Hello > No"),
        ({"chosen": [GOOD], "rejected": "No"}, "Hello > No"),
        # A whole conversation.
        (CONVERSATION, "u:Hi, a:Hello > u:Hi, a:No"),
        (
            {"chosen": [human("Hi"), gpt("Yes")], "rejected": [human("Hi"), gpt("No")]},
            "u:Hi, a:Yes > u:Hi, a:No",
        ),
    ],
)
def test_a_choice_is_the_better_and_the_worse_behind_all_that_was_asked(row, pairs):
    tally = Tally()
    assert in_pairs(row, tally) == pairs
    assert not tally.unused


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        (RANKED | {"ranking": [2, 0, 1]}, "b > a; c > a; b > c"),
        (RANKED | {"ranking": [1, 1, 0]}, "c > a; c > b"),
        (RANKED | {"completion_2": "b", "ranking": [0, 1, 2]}, "a > b; a > b"),
        # As the text of a list, and ranks as texts: 10 is more than 9.
        (RANKED | {"ranking": "[2, 0, 1]"}, "b > a; c > a; b > c"),
        (RANKED | {"ranking": "['10', '9', '2']"}, "b > a; c > a; c > b"),
        (RANKED | {"ranking": ["10", "9", "2"]}, "b > a; c > a; c > b"),
        (RANKED | {"ranking": [1.5, "10", 9]}, "a > b; a > c; c > b"),
        (RANKED | {"prompt": "x", "ranking": [0, 1, 1]}, "x a > x b; x a > x c"),
        (
            RANKED | {"instruction": "x", "input": "y", "ranking": [0, 0, 1]},
            "x\ny a > x\ny c; x\ny b > x\ny c",
        ),
        (
            RANKED | {"prompt": TURNS, "ranking": [0, 1, 1]},
            "u:Hi, a:a > u:Hi, a:b; u:Hi, a:a > u:Hi, a:c",
        ),
    ],
)
def test_a_ranking_is_each_two_of_different_ranks(row, pairs):
    assert in_pairs(row) == pairs


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"text": "fine", "label": 1}, "fine > nothing"),
        ({"text": "dull", "label": "0"}, "nothing > dull"),
        ({"text": "fine", "label": True}, "fine > nothing"),
        ({"text": "dull", "label": "False"}, "nothing > dull"),
        ({"text": "fine", "label": "1.0"}, "fine > nothing"),
        ("1 a fine film", "a fine film > nothing"),
        ("0\t1 dull film", "nothing > 1 dull film"),
        # With a prompt beside it.
        ({"prompt": "Hi", "completion": "ok", "label": True}, "Hi ok > nothing"),
        ({"prompt": "Hi", "text": "ok", "label": 0}, "nothing > Hi ok"),
        ({"question": "Hi", "answer": "ok", "label": 0}, "nothing > Hi ok"),
        ({"prompt": "Hi", "response": "ok", "label": "True"}, "Hi ok > nothing"),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "label": 1},
            "Add\n1 2 3 > nothing",
        ),
        ({"prompt": TURNS, "completion": [BAD], "label": False}, "nothing > u:Hi, a:No"),
        (
            {"system": "Be", "prompt": "Hi", "completion": "ok", "label": 1},
            "s:Be, u:Hi, a:ok > nothing",
        ),
        # KTO's conversations.
        ({"messages": [*TURNS, GOOD], "label": True}, "u:Hi, a:Hello > nothing"),
        ({"messages": [*TURNS, BAD], "label": "false"}, "nothing > u:Hi, a:No"),
        ({"conversations": [human("Hi"), gpt("No")], "kto_tag": False}, "nothing > u:Hi, a:No"),
        (
            {"messages": [*TURNS, GOOD], "system": "Be", "label": 1},
            "s:Be, u:Hi, a:Hello > nothing",
        ),
    ],
)
def test_a_label_is_for_or_against_an_answer(row, pairs):
    tally = Tally()
    assert in_pairs(row, tally) == pairs
    assert not tally.unused


# ------------------------------------------- what is said before the two of them
def test_conversations_that_part_earlier_keep_their_own_beginnings():
    chosen = [user("Hi"), answer("Yo"), user("And?"), answer("Fine")]
    rejected = [user("Hi"), answer("Ya"), user("So?"), answer("Bad")]
    wanted = "u:Hi, a:Yo, u:And?, a:Fine > u:Hi, a:Ya, u:So?, a:Bad"
    assert in_pairs({"chosen": chosen, "rejected": rejected}) == wanted
    # They may be of different lengths, or texts as those of hh-rlhf.
    shorter = {"chosen": chosen, "rejected": rejected[:2]}
    assert in_pairs(shorter) == "u:Hi, a:Yo, u:And?, a:Fine > u:Hi, a:Ya"
    texts = ["\n\nHuman: Hi\n\nAssistant: Yo", "\n\nHuman: Ho\n\nAssistant: Ya"]
    row = dict(zip(("chosen", "rejected"), texts))
    assert in_pairs(row) == " > ".join(texts)


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"prompt": "Hi", **CONVERSATION}, "u:Hi, a:Hello > u:Hi, a:No"),
        ({"prompt": " Hi\n", **CONVERSATION}, "u:Hi, a:Hello > u:Hi, a:No"),
        ({"prompt": TURNS, **CONVERSATION}, "u:Hi, a:Hello > u:Hi, a:No"),
        (
            {"prompt": "Hi", "system": "Be", **CONVERSATION},
            "s:Be, u:Hi, a:Hello > s:Be, u:Hi, a:No",
        ),
        (
            {
                "prompt": "Hi",
                "system": "Be",
                "chosen": [system("Be"), *TURNS, GOOD],
                "rejected": [system("Be"), *TURNS, BAD],
            },
            "s:Be, u:Hi, a:Hello > s:Be, u:Hi, a:No",
        ),
        (
            {"prompt": "Q: Hi A:", "chosen": "Q: Hi A: Yes", "rejected": "Q: Hi A: No"},
            "Q: Hi A: Yes > Q: Hi A: No",
        ),
        (
            {"instruction": "Add", "input": "1", "chosen": "Add\n1\n2", "rejected": "Add\n1\n3"},
            "Add\n1\n2 > Add\n1\n3",
        ),
        # One of them alone may begin with these words by chance.
        (
            {"prompt": "I am", "chosen": "I am sure", "rejected": "no"},
            "I am I am sure > I am no",
        ),
        pytest.param(
            {"system": "Be", "prompt": "Q: Hi", "chosen": "Q: Hi Yes", "rejected": "Q: Hi No"},
            "s:Be, u:Q: Hi, a:Yes > s:Be, u:Q: Hi, a:No",
        ),
        pytest.param(
            {"prompt": [user("A"), answer("B"), *TURNS], **CONVERSATION},
            "u:A, a:B, u:Hi, a:Hello > u:A, a:B, u:Hi, a:No",
        ),
    ],
)
def test_a_prompt_that_both_begin_with_is_not_put_before_them_again(row, pairs):
    assert in_pairs(row) == pairs


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        (
            {"messages": [*TURNS, GOOD], "chosen": "Hello", "rejected": "No"},
            "u:Hi, a:Hello > u:Hi, a:No",
        ),
        (
            {
                "conversations": [human("Hi"), gpt("Yes")],
                "chosen": gpt("Yes"),
                "rejected": gpt("No"),
            },
            "u:Hi, a:Yes > u:Hi, a:No",
        ),
        ({"messages": [*TURNS, GOOD], **CONVERSATION}, "u:Hi, a:Hello > u:Hi, a:No"),
    ],
)
def test_a_conversation_that_has_its_answer_already_is_not_answered_twice(row, pairs):
    """Such a row may as well be left out."""
    try:
        assert in_pairs(row) == pairs
    except LeftOut as reason:
        assert str(reason)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": BAD},
        {"prompt": "Hi", "chosen": [*TURNS, GOOD], "rejected": "No"},
    ],
)
def test_both_of_a_choice_have_one_form(row):
    """Else the form alone would tell the better one from the worse."""
    assert in_pairs(row) == "u:Hi, a:Hello > u:Hi, a:No"


def test_tools_stay_with_the_conversations():
    for row in (CONVERSATION, {"prompt": TURNS, "chosen": GOOD, "rejected": BAD}):
        ((better, worse),) = read_comparison(row | {"tools": TOOLS}, Tally())
        assert (better.tools, worse.tools) == (TOOLS, TOOLS)
    ((dialogue, _),) = read_comparison(
        {"messages": [*TURNS, CALL, {"role": "tool", "content": "12:00"}, GOOD], "label": 1},
        Tally(),
    )
    assert [turn.get("tool_calls") for turn in dialogue.turns] == [
        None,
        CALL["tool_calls"],
        None,
        None,
    ]


# ------------------------------------------------------- what is not used, or left out
@pytest.mark.parametrize(
    ("row", "unused"),
    [
        (CONVERSATION | {"source": "web", "score_chosen": 8.0}, ["source", "score_chosen"]),
        (CONVERSATION | {"prompt": "Hi", "messages": [*TURNS, GOOD]}, ["messages"]),
        (CONVERSATION | {"empty": "", "nothing": None, "none": []}, []),
        ({"prompt": "P", "question": "Q", "chosen": "a", "rejected": "b"}, ["question"]),
        (RANKED | {"ranking": [0, 1, 2], "id": 0}, ["id"]),
        ({"text": "fine", "label": 1, "idx": 5}, ["idx"]),
        ({"messages": [*TURNS, GOOD], "label": 1, "id": "a"}, ["id"]),
        (
            {"chosen": [*TURNS, GOOD | {"rating": 3}], "rejected": [*TURNS, BAD | {"rating": 1}]},
            ["chosen.rating", "rejected.rating"],
        ),
    ],
)
def test_fields_that_are_not_used_are_named(row, unused):
    tally = Tally()
    read_comparison(row, tally)
    assert tally.unused == dict.fromkeys(unused, 1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "same", "rejected": "same"}, "where nothing is preferred"),
        (RANKED | {"ranking": [0, 0, 0]}, "where nothing is preferred"),
        (RANKED | {"ranking": ["1", "1.0", 1]}, "where nothing is preferred"),
        ({"prompt": "Hi", "chosen": "ok", "rejected": ""}, "with an empty rejected"),
        ({"prompt": "Hi", "chosen": "ok", "rejected": " \n"}, "with an empty rejected"),
        ({"prompt": "Hi", "chosen": "ok", "rejected": None}, "with an empty rejected"),
        ({"prompt": "Hi", "chosen": "", "rejected": "no"}, "with an empty chosen"),
        ({"chosen": [*TURNS, GOOD], "rejected": []}, "with an empty rejected"),
        ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, answer("")]}, "with an empty rejected"),
        (RANKED | {"completion_1": "", "ranking": [0, 1, 2]}, "with an empty completion_1"),
        ({"text": " ", "label": 1}, "without an answer"),
        ({"text": None, "label": 1}, "without an answer"),
        ({"prompt": "Hi", "completion": "", "label": 1}, "without an answer"),
        ({"messages": [*TURNS, answer("")], "label": 1}, "with an empty last turn"),
        ({"messages": TURNS, "label": 1}, "whose last turn is no answer"),
        (
            {"chosen": [*TURNS, GOOD], "rejected": TURNS},
            "whose rejected does not end with an answer",
        ),
        (
            {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, CALL]},
            "whose rejected has tool_calls",
        ),
        (
            {"chosen": [*TURNS, GOOD], "rejected": [*TURNS, {"role": "Judge", "content": "x"}]},
            "with the unknown role judge",
        ),
        ({"system": "Be", "chosen": "a", "rejected": "b"}, "whose chosen answers nothing"),
        # What changes what is asked is used, or the row is left out.
        ({"input": "x", "chosen": "a", "rejected": "b"}, "with input, but without what"),
        ({"context": "x", **CONVERSATION}, "with context, but without what"),
        ({"history": [["1", "2"]], **CONVERSATION}, "with history, but without what"),
        ({"prompt": TURNS, "context": "x", "chosen": "a", "rejected": "b"}, "with context, which"),
        ({"prompt": "Hi", "tools": TOOLS, "chosen": GOOD, "rejected": BAD}, "with tools, which"),
    ],
)
def test_a_row_that_teaches_nothing_is_left_out_with_the_reason(row, reason):
    with pytest.raises(LeftOut, match=reason):
        read_comparison(row, Tally())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a"}, "it has no rejected: its fields are chosen"),
        ({"prompt": "b", "rejected": "a"}, "it has no chosen: its fields are prompt, rejected"),
        pytest.param(
            {"chosen": "a", "rejected": 5},
            "its rejected is 5, no text",
        ),
        (CONVERSATION | {"rejected": ["No"]}, "its rejected has No, no message"),
        ({"text": "a", "label": 2}, "its label is 2: give 0 or 1, false or true"),
        ({"text": "a", "label": "good"}, "its label is good: give 0 or 1, false or true"),
        ("a fine film", "its label is a: give 0 or 1, false or true"),
        ({"text": "1 is the loneliest"}, "it has no chosen, no ranking and no label"),
        ({"sentence": "a", "label": 1}, "it has nothing that asks: its fields are sentence"),
        ({"sentence": "a"}, "it has no chosen, no ranking and no label: its fields are sentence"),
        (RANKED | {"ranking": [0, 1, 2, 3]}, "it has no completion_3: its fields are "),
        (RANKED | {"ranking": [1, 0]}, "its ranking is [1, 0]: give a rank for each completion"),
        (RANKED | {"ranking": "210"}, "its ranking is 210, no list"),
        (RANKED | {"ranking": ["a", 1, 2]}, "its ranking has a: give a number for each"),
        (RANKED | {"ranking": [0, None, 1]}, "its ranking has None: give a number for each"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    data = write_lines(tmp_path / "r.jsonl", [{"chosen": "a", "rejected": "b"}, row])
    with pytest.raises(SettingsError) as told:
        read(data)
    (problem,) = told.value.args
    assert problem.startswith("DATA is ")
    assert f": it can't be used (row 2: {reason}" in problem
    assert problem.endswith(f"): {REMEDY}")


# ------------------------------------------------------------------- a whole file
def test_all_that_is_left_out_is_counted_by_its_reason(tmp_path):
    rows = [CONVERSATION | {"id": number} for number in range(3)]
    rows += [{"chosen": "a", "rejected": text} for text in ("b", "c", "a", "", None)]
    rows += [{"chosen": "a", "rejected": [{"role": "judge", "content": "x"}]}]
    data = read(write_lines(tmp_path / "r.jsonl", rows), eval_share=0)
    assert len(data.rows) == 3
    told = "; left out: 1 where nothing is preferred, 2 with an empty rejected"
    told += ", 1 with the unknown role judge, 2 given twice; fields not used: id (3)"
    assert data.tally.in_words() == told


def test_data_without_a_preference(tmp_path):
    rows = [{"chosen": "a", "rejected": text} for text in ("b", "a", "", "b")]
    with pytest.raises(SettingsError) as told:
        read(write_lines(tmp_path / "r.jsonl", rows))
    (problem,) = told.value.args
    reasons = "1 where nothing is preferred, 1 with an empty rejected, 1 given twice"
    assert f"1 of 4 rows can be used, where 2 are the least: {reasons}" in problem
    assert "chosen, rejected" in problem


def test_a_table_of_texts_says_the_same(tmp_path):
    """In a .csv all is text: ranks, labels and lists too."""
    ranked = 'completion_0,completion_1,completion_2,ranking\na,b,c,"[10, 9, 2]"\n'
    ranked += "d,e,f,\"['0', '1', '1']\"\n"
    labels = "prompt,completion,label\nHi,7,True\nHi,no,0\n"
    wanted = {
        ranked: {("b", "a"), ("c", "a"), ("c", "b"), ("d", "e"), ("d", "f")},
        labels: {("Hi 7", None), (None, "Hi no")},
    }
    path = tmp_path / "rows.csv"
    for text, pairs in wanted.items():
        path.write_text(text, encoding="utf-8")
        assert pairs_in(read(path, eval_share=0).rows) == pairs


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """A comparison may be there twice, in several forms: of them one is left."""
    rows = []
    for number in range(20):
        better, worse = f"I am {number}", f"I am not {number}"
        rows.append({"chosen": better, "rejected": worse})
        rows.append({"prompt": "I am", "chosen": str(number), "rejected": f"not {number}"})
        rows.append({"completion_0": worse, "completion_1": better, "ranking": [1, 0]})
    data = write_lines(tmp_path / "rows.jsonl", rows)
    held_out_by_seed = []
    for seed in range(3):
        found = read(data, 0.25, seed)
        kept, held_out = pairs_in(found.rows), pairs_in(found.eval_rows)
        assert (len(kept), len(held_out), len(kept & held_out)) == (15, 5, 0)
        assert found.tally.left_out == {"given twice": 40}
        held_out_by_seed.append(held_out)
    assert held_out_by_seed[0] != held_out_by_seed[1]


def test_conversations_that_people_compared(shared):
    path = shared("data/preferences_300.json")
    data = read(path)
    wanted = set()
    for row in json.loads(path.read_text(encoding="utf-8")):
        letters = {"system": "s", "human": "u", "gpt": "a"}
        before = [f"{letters[turn['from']]}:{turn['value']}" for turn in row["conversations"]]
        answers = [f"a:{row[name]['value']}" for name in ("chosen", "rejected")]
        wanted.add(tuple(", ".join([*before, text]) for text in answers))
    assert pairs_in(data.rows + data.eval_rows) == wanted
    assert data.tally.left_out == {"given twice": 300 - len(wanted)}
    assert len(data.eval_rows) == math.ceil(0.1 * len(wanted))


def test_lines_of_a_label_and_a_sentence(shared, tmp_path):
    """The ending of the file's name does not tell what is in it, so it is given another."""
    path = shared("data/sentiment/stsa.binary.train")
    with pytest.raises(
        SettingsError, match="its ending does not tell what is in it: give it one of"
    ):
        read(path)
    text = path.read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    data = read(tmp_path / "train.txt")
    wanted = set()
    for line in text.strip().split("\n"):
        sentence = line[2:].strip()
        wanted.add((sentence, None) if line[0] == "1" else (None, sentence))
    assert pairs_in(data.rows + data.eval_rows) == wanted
    assert len(data.eval_rows) == math.ceil(0.1 * len(wanted))


# ------------------------------------------------------------- what is to be scored
@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("I am glad", "I am glad"),
        ({"text": "I am glad"}, "I am glad"),
        ({"prompt": "I am"}, "I am"),
        ({"prompt": "I am", "completion": "glad"}, "I am glad"),
        ({"question": "Why?", "answer": "So"}, "Why? So"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2 3"),
        ({"prompt": TURNS, "completion": [GOOD]}, "u:Hi, a:Hello"),
        ({"messages": [*TURNS, GOOD]}, "u:Hi, a:Hello"),
        ({"conversations": [human("Hi"), gpt("Yes")], "system": "Be"}, "s:Be, u:Hi, a:Yes"),
        ({"text": "fine", "label": 1}, "fine"),
        pytest.param(
            {"instruction": "Add", "input": "1 2"},
            "Add\n1 2",
        ),
        ({"prompt": TURNS, "system": "Be", "completion": "Hello"}, "s:Be, u:Hi, a:Hello"),
    ],
)
def test_a_row_of_any_kind_can_be_scored(tmp_path, row, said):
    entry = row
    if not isinstance(row, str):
        entry = write_lines(tmp_path / "rows.jsonl", [row])
    (dialogue,) = read_judged(entry, Tally())
    assert in_words(dialogue) == said
