"""Prompts from files."""

import json

import pytest

import train_rlhf
from train_rlhf import read_prompts


@pytest.fixture
def write(tmp_path):
    def save(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return save


def test_a_text_is_itself():
    assert read_prompts("I feel so") == ["I feel so"]


def test_a_text_file_has_a_prompt_a_line(write):
    assert read_prompts(write("p.txt", "I feel so\r\n\nLife is\nDu bist schön\n")) == [
        "I feel so",
        "Life is",
        "Du bist schön",
    ]


def test_a_jsonl_file_has_a_prompt_an_object(write):
    lines = [
        json.dumps({"prompt": text, "source": 1}) for text in ("I feel so", 'Say "so"\nLife is')
    ]
    assert read_prompts(write("p.jsonl", "\n".join([*lines, ""]))) == [
        "I feel so",
        'Say "so"\nLife is',
    ]


def test_files_and_texts_mix_in_the_order_of_the_setting(write, make_settings):
    path = write("p.txt", "One\nTwo\n")
    assert make_settings("--prompts", "Zero", path, "Three").prompts == [
        "Zero",
        "One",
        "Two",
        "Three",
    ]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("p.txt", "", "{path} has no prompts: give one a line"),
        ("p.jsonl", "\n \n", "{path} has no prompts: give one a line"),
        ("p.txt", b"fine\nno\xff", "{path} is not UTF-8 at byte 7: save it as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": ', '{path}, line 3, is {{"prompt":: give {{"prompt": "I feel so"}}'),
        ("p.jsonl", '{"query": "a"}', '{path}, line 1, is {{"query": "a"}}: give {{"prompt": "I feel so"}}'),
        ("p.jsonl", '"a"', '{path}, line 1, is "a": give {{"prompt": "I feel so"}}'),
        ("p.jsonl", '{"prompt": 3}', '{path}, line 1, is {{"prompt": 3}}: give {{"prompt": "I feel so"}}'),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_names_it_and_the_line(
    write, monkeypatch, tmp_path, name, content, problem
):
    write(name, content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(train_rlhf.SettingsError) as error:
        train_rlhf.read_settings(["--eval-prompts", name])
    assert f"- EVAL_PROMPTS: {problem.format(path=name)}" in str(error.value).splitlines()


def test_a_missing_file_is_an_error():
    with pytest.raises(
        train_rlhf.SettingsError,
        match=r"PROMPTS: none\.txt can't be read \(No such file or directory\)",
    ):
        train_rlhf.read_settings(["--prompts", "none.txt"])


def test_of_many_prompts_no_more_are_measured_than_samples_are_asked_for(
    build, make_settings, write
):
    path = write("p.txt", "\n".join(f"Number {i} is" for i in range(50)))
    built = build(make_settings("--prompts", path))
    reward = train_rlhf.load_reward(built.settings)
    measured = train_rlhf.measure(
        built.trainer, built.tokenizer, built.settings.prompts, reward, built.settings, base=True
    )
    assert list(measured["success_by_prompt"]) == [
        f"Number {i} is" for i in range(0, 50, 5)
    ]  # of 12 samples
    assert measured["samples"] == 20
