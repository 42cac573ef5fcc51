"""Files of rows: what is taken for one, each format and its faults, and what is in it."""

import gzip
import json
import re
import socket

import datasets
import pandas
import pytest

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from finetune.comparisons import COMPARISONS
from finetune.data import read_data
from finetune.errors import SettingsError, shorten
from finetune.examples import EXAMPLES
from finetune.files import hash_files, is_file, is_on_hub, read_table
from finetune.prompts import read_prompts
from finetune.seed_tasks import read_seed_tasks

MARK = "\ufeff"  # the byte order mark
ROWS = [
    {"prompt": "I feel so, today", "answer": "happy"},
    {"prompt": 'Say "so"\nLife is ', "answer": "007"},
    {"prompt": "Du bist schön; ja", "answer": "NA"},
]
CSV = """prompt,answer
"I feel so, today",happy
"Say ""so""\nLife is ",007
"Du bist schön; ja",NA
"""
TSV = (
    'prompt\tanswer\nI feel so, today\thappy\n"Say ""so""\nLife is "\t007\nDu bist schön; ja\tNA\n'
)
UNKNOWN = (
    "its ending does not tell what is in it: give it one of .json, .jsonl, .csv, .tsv, .parquet"
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the current folder, packed where its name says so; return its name."""
    monkeypatch.chdir(tmp_path)

    def save(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            pandas.DataFrame(content).to_parquet(path)
            content = path.read_bytes()
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
        return name

    return save


def lines_of(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def as_prompts(path):
    return read_prompts([path], [], 0, "auto", 0)


def as_examples(path):
    return read_data(path, 0.1, 0, EXAMPLES)


def as_comparisons(path):
    return read_data(path, 0.1, 0, COMPARISONS)


READERS = [as_prompts, as_examples, as_comparisons, read_seed_tasks]


def problem_of(path, read=as_prompts):
    """Return the reason in the only line that tells why a file can't be read."""
    with pytest.raises(SettingsError) as error:
        read(path)
    (problem,) = error.value.args
    setting = {as_prompts: "PROMPTS", read_seed_tasks: "SEED_TASKS"}.get(read, "DATA")
    beginning = f"{setting} is {shorten(path)}: it can't be used ("
    assert problem.startswith(beginning)
    reason, _, remedy = problem.removeprefix(beginning).rpartition("): ")
    assert re.match("(give|name) ", remedy)
    return reason


# ----------------------------------------------------------------- the formats
@pytest.mark.parametrize("name", ["p.txt", "p.Txt", "p.txt.gz"])
def test_a_text_file_has_a_prompt_a_line(write, name):
    """A byte order mark, empty lines, spaces at the ends and Windows' line ends belong to none.

    Only what a text editor shows as the end of a line is one.
    """
    write(name, "\ufeffI feel so\r\n\n  Life is \nline\u2028separator\nDu bist schön\n\n")
    assert read_table(name) == ["I feel so", "Life is", "line\u2028separator", "Du bist schön"]


@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", lines_of(*ROWS)),
        ("p.ndjson", lines_of(*ROWS)),
        ("p.jsonlines", lines_of(*ROWS)),
        ("p.ldjson", lines_of(*ROWS)),
        ("p.jl", lines_of(*ROWS)),
        ("empty lines.jsonl", MARK + lines_of(*ROWS).replace("\n", "\n\n") + "\n\n"),
        ("list.JSONL", MARK + json.dumps(ROWS)),
        ("p.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
        ("lines.JSON", lines_of(*ROWS)),
        ("p.csv", CSV),
        ("Windows.Csv", MARK + CSV.replace("\n", "\r\n").replace('so""\r\n', 'so""\n')),
        ("p.tsv", TSV),
        ("p.PARQUET", ROWS),
    ],
)
def test_a_file_of_rows_gives_their_prompts_and_their_other_fields(write, name, content, packed):
    """There a prompt may have line breaks, and spaces at its ends."""
    path = write(name + packed, content)
    assert read_table(path) == ROWS
    assert as_prompts(path).rows == ROWS
    assert as_examples(path).tally.in_words() == ""


def test_an_object_alone_over_several_lines_is_a_row(write):
    assert read_table(write("p.json", json.dumps(ROWS[0], indent=2))) == ROWS[:1]


def test_texts_alone_are_rows(write):
    assert read_table(write("a.jsonl", '"A"\n"B"')) == ["A", "B"]
    assert read_table(write("b.json", '["A", "B"]')) == ["A", "B"]


@pytest.mark.parametrize("name", ["a b.txt", "[x].csv", "what?*.csv", "csv.csv"])
def test_a_file_of_an_odd_name_beside_folders_of_a_format_s_name(write, tmp_path, name):
    for folder in ("csv", "text", "train"):
        (tmp_path / folder).mkdir()
    assert as_prompts(write(name, "prompt\nOne")).rows[-1]["prompt"] == "One"


def test_what_looks_like_a_number_or_a_date_among_others_stays_a_text(write):
    rows = [{"prompt": "A", "answer": "007"}, {"prompt": "2020-01-01", "answer": "1e3"}]
    assert read_table(write("p.jsonl", lines_of(*rows))) == rows
    assert read_table(write("p.parquet", rows)) == rows


def test_to_read_a_file_nothing_is_asked_of_the_network(write, monkeypatch):
    """The library would count the load on a server, and wait for an answer."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    read_table(write("p.csv", "prompt\nA"))
    read_table(write("p.parquet", ROWS))
    assert asked == []


@pytest.mark.parametrize("path", ["folder", "folder/"])
def test_a_folder_that_datasets_saved(write, tmp_path, path):
    """Whose rows are the same to all scripts; and the two that read DATA look at its content."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "folder")
    assert is_file(path)
    assert read_table(path) == as_prompts(path).rows == ROWS
    assert len(as_examples(path).rows) == 2
    before = hash_files([path], by_name=True)
    assert before == hash_files([path]) and before.keys() == {path}
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "other")
    assert hash_files(["other"])["other"] != before[path]


def test_a_saved_dataset_of_a_single_split_is_that(write, tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "one")
    assert read_table("one") == ROWS
    splits = {"train": dataset, "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    told = "it has several splits: give one of them, two/train or two/test"
    assert problem_of("two") == problem_of("two", as_examples) == told
    assert read_table("two/test") == ROWS[:1]


# ------------------------------------------------------------- a csv is text
@pytest.mark.parametrize("answer", ["2", "True", "007", "1e3", "NA", "null", " x ", "2020-01-01"])
@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
@pytest.mark.parametrize("place", [0, 10_000])
def test_in_a_csv_all_is_text_as_it_stands_there(write, name, answer, place):
    """In its first row as in one that is far behind all that a library would look at."""
    answers = [f"word {number}" for number in range(10_002)]
    answers[place] = answer
    mark = "," if name == "p.csv" else "\t"
    lines = [f"{number}{mark}{text}" for number, text in enumerate(answers)]
    path = write(name, "\n".join([f"question{mark}answer", *lines]))
    rows = read_table(path)
    assert rows[place] == {"question": str(place), "answer": answer}
    assert [row["answer"] for row in rows] == answers


def test_an_answer_of_a_csv_that_is_a_number_is_learned_from(write):
    path = write("sums.csv", "instruction,output\n1 + 1,2\n2 > 1,True\n7,007\n")
    found = as_examples(path)
    answers = {row["turns"][-1]["content"] for row in found.rows + found.eval_rows}
    assert answers == {"2", "True", "007"}
    assert as_prompts(write("numbers.csv", "prompt\n4\n5\n")).rows == [
        {"prompt": "4"},
        {"prompt": "5"},
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", "prompt;answer\nI feel so, today;happy, yes\nLife is;007\n"),
        ("tabs.csv", "prompt\tanswer\nI feel so, today\thappy, yes\nLife is\t007\n"),
        ("quotes.csv", '"prompt, or so";"answer"\nI feel so, today;happy, yes\nLife is;007\n'),
        ("crlf.csv", "prompt;answer\r\nI feel so, today;happy, yes\r\nLife is;007\r\n"),
    ],
)
def test_semicolons_and_tabs_of_a_csv_are_recognised(write, name, content):
    rows = [[*row.values()] for row in read_table(write(name, content))]
    assert rows == [["I feel so, today", "happy, yes"], ["Life is", "007"]]


def test_a_line_of_a_csv_may_end_early_or_be_empty(write):
    rows = read_table(write("p.csv", "prompt,answer\nA\n\nB,\nC,c\n"))
    assert rows == [{"prompt": "A"}, {"prompt": "B", "answer": ""}, {"prompt": "C", "answer": "c"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("prompt,answer\nA,a\nI, too,b\n", "line 3 has 3 fields, the first line 2: put a field"),
        ("prompt\nHello, you are\n", "line 2 has 2 fields, the first line 1: put a field"),
        ("prompt,prompt\nA,a\n", "its first line has the name prompt twice"),
        ('prompt\n"never closed\n', "line 2: "),
        ('prompt\n"closed" too early\n', "line 2: "),
    ],
)
@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_a_csv_that_is_broken_is_told_with_its_line(write, name, content, reason):
    if name == "p.tsv":
        content = content.replace(",", "\t")
    assert problem_of(write(name, content)).startswith(reason)


# ------------------------------------------------------------ files or texts
@pytest.mark.parametrize(
    "text",
    [
        "介绍Python3.10版本",
        "I feel so",
        " a .txt of mine ",
        "...",
        "e.g.",
        "and/or",
        "Is it a .txt?",
        "Yes. No",
        "v1.2.3",
        "3.14",
        "Hello.World",
        "tatsu-lab/alpaca",
        "tatsu-lab/alpaca:train",
        "I like .csv files",
        "/",
        "~",
        "",
        pytest.param("Tell me of all that is. " * 12),
        pytest.param("介绍一下" * 25),
    ],
)
def test_a_text_is_a_text(text):
    """Also where it has a dot in it, or is like a name on the Hub, and what is in it is no data."""
    assert not is_file(text)
    assert hash_files([text]) == {}
    if text:
        assert read_prompts([text], [], 0, "auto", 0).rows == [{"prompt": text}]


@pytest.mark.parametrize(
    "name",
    [
        "p.jsonl",
        "my prompts.csv",
        "p.JSON.gz",
        "x.tsv",
        "a/b.ndjson",
        "prompts.xlsx",
        "data/",
        "hf://datasets/a/b/c.json",
        "p.md",
        "data/file.unknown",
        "p.zip",
        "p.arrow",
    ],
)
def test_a_name_of_a_file_is_one_though_it_is_missing(name):
    assert is_file(name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tatsu-lab/alpaca", True),
        ("tatsu-lab/alpaca:train", True),
        ("openai/gsm8k:train[:10]", True),
        ("a/b.c-d_e", True),
        ("alpaca", False),
        ("a/b/c", False),
        ("a/b.json", False),
        ("a/b.jsonl.gz", False),
        ("ü/b", False),
        ("and / or", False),
        ("here/there", False),  # a folder
    ],
)
def test_a_name_on_the_hub_is_owner_and_name_of_nothing_that_is_here(
    tmp_path, monkeypatch, name, wanted
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    assert is_on_hub(name) is wanted


def test_files_are_told_apart_by_what_is_in_them(tmp_path):
    texts = {"one": "same", "two": "same", "three": "other"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in texts]
    hashes = hash_files([*paths, "I feel so", "", str(tmp_path)])
    assert [*hashes] == paths
    one, two, three = hashes.values()
    assert one == two != three


# ------------------------------------------------------------------- bad files
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["p.md", "p.xlsx", "p", "p.json.bak", "p.yaml.gz", "p.zip"])
def test_a_file_of_an_unknown_ending_is_not_learned_from(write, read, name):
    """Not even by those scripts that once took each of its lines for a text."""
    assert problem_of(write(name, "I feel so.\nLife is good.\n"), read).startswith(UNKNOWN)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["p.txt", "p.TXT.gz"])
def test_a_text_file_whose_lines_are_all_json_objects_is_no_text(write, read, name):
    path = write(name, "\n" + lines_of(*ROWS) + "\n")
    told = "its lines are JSON objects: give its name the ending .jsonl"
    assert problem_of(path, read) == told


@pytest.mark.parametrize("text", ["{not JSON}", "[1, 2]", '{"Life": is'])
def test_a_text_with_braces_later_on_is_a_text(write, text):
    assert read_table(write("p.txt", f"Life is\n{text}")) == ["Life is", text]


def test_lines_of_json_with_commas_at_their_ends_are_told_so(write):
    lines = '{"prompt": "A"},\n{"prompt": "B"},\n'
    assert "give its name the ending .jsonl" in problem_of(write("p.txt", lines))
    assert problem_of(write("p.jsonl", lines)) == "line 1 ends with a comma: take it away"


def test_a_name_that_is_there_twice_is_told_in_json_too(write):
    row = '{"prompt": "A", "prompt": "B"}'
    for content in (row, f"[{row}]", f'{{"prompt": "A"}}\n{row}'):
        assert "it has the field prompt twice" in problem_of(write("p.jsonl", content))


def test_json_in_a_csv_and_a_file_of_excel_are_told_so(write):
    assert "it is JSON" in problem_of(write("p.csv", lines_of(*ROWS)))
    assert "save it as .csv" in problem_of(write("p.csv", b"PK\x03\x04abc"))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_told_as_an_encoding(write, read, name, encoding):
    path = write(name, "prompt,answer\nschön,a\n".encode(encoding))
    assert problem_of(path, read) == "its encoding is UTF-16, it seems: save it as UTF-8"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv"])
def test_cp1252_is_told_as_an_encoding_with_its_line(write, read, name):
    path = write(name, "prompt\nfine\nschön\n".encode("cp1252"))
    told = "line 3 is not in UTF-8, but in another encoding such as cp1252: save it as UTF-8"
    assert problem_of(path, read) == told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.txt", None),  # there is no such file
        ("none.jsonl.gz", None),
        ("data/prompts.parquet", None),
        ("prompts.xlsx", None),  # a name like a file's
        ("data/", None),
        ("my prompts.csv", None),
        pytest.param("x" * 300 + ".txt", None),
        # empty
        ("p.txt", "\ufeff\n \n"),
        ("p.txt.gz", ""),
        ("p.json", ""),
        ("p.json", "[]"),
        ("p.json", "[[]]"),
        ("p.json", "null"),
        ("p.jsonl", '{"prompt": " "}'),
        ("p.csv", ""),
        ("p.csv", "prompt\n"),
        # broken
        ("p.txt", b"fine\nno\xff"),
        ("p.jsonl", '{"prompt": "\\udcff"}'),  # half a character
        ("p.jsonl", 'null\n{"prompt": "A"}'),
        ("p.csv", b"prompt\n\xff\n"),
        ("p.parquet", "prompt\nLife is\n"),
        ("p.parquet.gz", "prompt\nLife is\n"),
    ],
)
def test_a_file_that_gives_no_prompts(write, name, content):
    if content is not None:
        write(name, content)
    problem = problem_of(name)
    assert "Traceback" not in problem and len(problem) < 500


def test_a_packed_file_that_is_torn_is_told_so(write, tmp_path):
    whole = gzip.compress(lines_of(*ROWS).encode())
    (tmp_path / "p.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "end" in problem_of("p.jsonl.gz")


def test_whether_a_file_is_packed_is_seen_from_its_content(write, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(gzip.compress(lines_of(*ROWS).encode()))
    (tmp_path / "q.jsonl.gz").write_bytes(lines_of(*ROWS).encode())
    assert read_table("p.jsonl") == read_table("q.jsonl.gz") == ROWS


def test_a_text_file_that_is_a_list_in_json_is_refused(write):
    for content in ('["A", "B"]', "[\n  1\n]"):
        assert problem_of(write("p.txt", content)) == (
            "it is a list in JSON: give its name the ending .json"
        )
    assert read_table(write("q.txt", "[A] and [B]")) == ["[A] and [B]"]


def test_excel_says_itself_what_separates_the_fields(write):
    path = write("p.csv", "sep=;\r\nprompt;answer\r\na,b,c;d\r\n")
    assert read_table(path) == [{"prompt": "a,b,c", "answer": "d"}]


@pytest.mark.parametrize("read", READERS)
def test_a_folder_that_is_no_dataset_is_told_so(write, tmp_path, read):
    (tmp_path / "p.txt").mkdir()
    (tmp_path / "p.txt" / "inner.txt").write_text("A")
    told = "it is a folder, but none that save_to_disk of datasets has written"
    assert problem_of("p.txt", read) == told


@pytest.mark.parametrize("text", ['{"prompt": ', "b"])
def test_a_line_that_is_no_json_is_named(write, text):
    """Whether there is a row on each, or a list over all of them."""
    lines = ['{"prompt": "A"}', text, '{"prompt": "C"}']
    assert problem_of(write("p.jsonl", "\n".join(lines))).startswith("line 2 is no JSON: ")
    problem = problem_of(write("p.jsonl", "[" + ",\n".join(lines) + "]"))
    assert re.search(r": line [23] column", problem)


@pytest.mark.parametrize("name", ["data", "train", "rows", "examples", "items"])
def test_rows_in_a_field_of_a_single_object_are_told_so(write, name):
    path = write("p.json", json.dumps({"version": 1, name: ROWS}, indent=1))
    told = f"its rows are in the field {name} of a single object: save that list alone"
    assert problem_of(path) == problem_of(path, as_examples) == told


@pytest.mark.parametrize(
    ("script", "flag", "setting"),
    [
        (train_rlhf, "--prompts", "PROMPTS"),
        (train_rlhf, "--eval-prompts", "EVAL_PROMPTS"),
        (train_sft, "--data", "DATA"),
        (train_reward_model, "--data", "DATA"),
        (make_instructions, "--seed-tasks", "SEED_TASKS"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_all_scripts_refuse_a_file_at_once_and_leave_nothing(
    write, tmp_path, capsys, demo_model, script, flag, setting
):
    write("p.csv", "prompt\nschön\n".encode("cp1252"))
    assert script.main(["--model-name", str(demo_model), "--device", "cpu", flag, "p.csv"]) == 2
    errors = capsys.readouterr().err
    told = f"- {setting} is p.csv: it can't be used (line 2 is not in UTF-8, but in another"
    assert told in errors and errors.count("\n- ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]
