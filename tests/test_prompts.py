"""Prompts from files."""

import json
import re

import pytest

import train_rlhf
from train_rlhf import SettingsError, read_prompts


@pytest.fixture
def write(tmp_path):
    def save(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return save


def test_a_text_is_itself():
    assert read_prompts("I feel so") == ["I feel so"]
    assert read_prompts(" a .txt of mine ") == [" a .txt of mine "]


def test_a_text_file_has_a_prompt_a_line(write):
    """A byte order mark, empty lines, spaces at the ends and Windows' line ends belong to none."""
    path = write("p.txt", "\ufeffI feel so\r\n\n  Life is \nDu bist schön\n\n")
    assert read_prompts(path) == ["I feel so", "Life is", "Du bist schön"]


def test_a_jsonl_file_has_a_prompt_an_object(write):
    """There a prompt may have line breaks, even such as only Unicode has, and spaces at its ends."""
    prompts = ["I feel so", 'Say "so"\nLife is', "line\u2028separator ", "Du bist schön"]
    lines = [json.dumps({"prompt": text, "x": 1}, ensure_ascii=False) for text in prompts]
    assert read_prompts(write("p.jsonl", "\n\n".join([*lines, ""]))) == prompts


def test_files_and_texts_mix_in_the_order_of_the_setting(write, make_settings):
    path, other = write("p.txt", "One\nTwo\n"), write("p.jsonl", '{"prompt": "Four"}')
    settings = make_settings(
        "--prompts", "Zero", path, "Three", other, "--eval-prompts", path + "x"
    )
    assert settings.prompts == ["Zero", "One", "Two", "Three", "Four"]
    assert settings.eval_prompts == [path + "x"]


def test_a_prompt_that_two_files_have_is_given_twice(write, make_settings):
    with pytest.raises(SettingsError) as error:
        make_settings("--prompts", write("p.txt", "One\nTwo"), write("q.txt", "Two"))
    assert error.value.problems == ("PROMPTS has ['Two'] twice: give each prompt once",)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.txt", "", 1),
        ("p.txt", "\n \n\n", 1),
        ("p.jsonl", "\n \n", 1),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', 3),
        ("p.jsonl", '{"prompt": "a"}\nb\n{"prompt": "c"}', 2),
        ("p.jsonl", '{"query": "a"}', 1),
        ("p.jsonl", '"a"', 1),
        ("p.jsonl", '{"prompt": 3}', 1),
        ("p.jsonl", '{"prompt": " "}', 1),
        ("p.jsonl", '{"prompt": "\\udcff"}', 1),  # half a character
        ("p.txt", b"fine\nno\xff", None),
        ("p.txt", b"I\0", 1),
        ("x" * 300 + ".txt", None, None),
        ("none.txt", None, None),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_names_it_and_the_line(
    write, read_settings, monkeypatch, tmp_path, name, content, line
):
    """Without content there is no such file; without a line all of it is bad."""
    if content is not None:
        write(name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as error:
        read_settings("--eval-prompts", "Good day", name)
    (problem,) = error.value.problems
    assert problem.startswith(f"EVAL_PROMPTS: {train_rlhf.shorten(name)}")
    assert line is None or f", line {line}, can't be read (" in problem
    remedy = 'give one prompt a line in UTF-8, in a .jsonl as {"prompt": "I feel so"}'
    assert problem.endswith(f"): {remedy}")
    assert len(problem) < 300


def test_a_file_of_another_kind_is_no_prompt(write, read_settings):
    path = write("p.csv", "prompt\nLife is\n")
    problem = (
        rf"PROMPTS: {re.escape(train_rlhf.shorten(path))} is a file of another kind: give a .txt"
    )
    with pytest.raises(SettingsError, match=problem):
        read_settings("--prompts", path)


def test_a_folder_is_no_file_of_prompts(read_settings, tmp_path):
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(SettingsError, match=r"PROMPTS: .*p\.txt can't be read \(.*directory"):
        read_settings("--prompts", str(tmp_path / "p.txt"))


def test_of_many_prompts_no_more_are_measured_than_samples_are_asked_for(
    build, make_settings, write
):
    path = write("p.txt", "\n".join(f"Number {i} is" for i in range(50)))
    built = build(make_settings("--prompts", path))
    settings = built.settings
    reward = train_rlhf.positive_word_reward
    measured = train_rlhf.measure(
        built.trainer, built.tokenizer, settings.prompts, reward, settings
    )
    assert list(measured["first_sample"]) == [f"Number {i} is" for i in range(0, 50, 5)]
    assert measured["samples"] == 20  # two of each, at least the 12 that were asked for
