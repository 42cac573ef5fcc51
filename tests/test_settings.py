"""The constants and their flags: names, kinds, comments, the help and the README. Bad values: test_inputs.py."""

import ast
import re
from types import SimpleNamespace

import pytest

import train_rlhf
from train_rlhf import SettingsError, read_settings

CONSTANTS = train_rlhf.constants()


def flag(name):
    return "--" + name.lower().replace("_", "-")


# ---------------------------------------------------------------------------------------------------------- flags
def test_without_flags_the_settings_are_the_constants():
    assert vars(read_settings([])) == {
        name.lower(): getattr(train_rlhf, name) for name in CONSTANTS
    }


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--kl-coef", "1"], "kl_coef", 1.0),
        (["--kl-coef", "0"], "kl_coef", 0.0),
        (["--batch-size", "12"], "batch_size", 12),
        (["--batch-size=12"], "batch_size", 12),
        (["--batch-size", "7", "--batch-size", "12"], "batch_size", 12),
        (["--mini-batch-size", "1"], "mini_batch_size", 1),
        (["--gamma", "0"], "gamma", 0.0),
        (["--seed", "0"], "seed", 0),
        (["--save-every", "0"], "save_every", 0),
        (["--output-dir", "else where"], "output_dir", "else where"),
        (["--model-name", "some/model"], "model_name", "some/model"),
        (["--quantization", "4bit"], "quantization", "4bit"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--reward", "my.py:score"], "reward", "my.py:score"),
        (["--report-to", "tensorboard"], "report_to", "tensorboard"),
        (["--positive-words", "calm", "serene"], "positive_words", ["calm", "serene"]),
        (["--prompts", "Only one"], "prompts", ["Only one"]),
        (["--lora-targets", "q_proj", "v_proj"], "lora_targets", ["q_proj", "v_proj"]),
    ],
)
def test_a_flag_overrides_its_constant(flags, name, value):
    found = getattr(read_settings(flags), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("words", "value"), [([], True), (["true"], True), (["false"], False)])
def test_a_switch(words, value, monkeypatch):
    monkeypatch.setattr(train_rlhf, "check_resume", lambda settings: [])
    assert read_settings(["--resume", *words]).resume is value


def test_flags_leave_the_constants_alone():
    read_settings(["--positive-words", "calm", "--seed", "7"])
    assert "calm" not in train_rlhf.POSITIVE_WORDS
    assert vars(read_settings([])) == {
        name.lower(): getattr(train_rlhf, name) for name in CONSTANTS
    }


# ------------------------------------------------------------------------------------------------------ constants
def test_every_name_in_capitals_is_a_literal_with_a_flag_a_section_and_a_comment(script):
    assigned = {}
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper():
            assigned[node.targets[0].id] = ast.literal_eval(node.value)
    assert assigned == {name: default for name, (_, default, _) in CONSTANTS.items()}
    for section, _, comment in CONSTANTS.values():
        assert section
        assert len(comment) > 10


def test_every_constant_is_read_by_the_code(script):
    read = set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "id", getattr(owner, "attr", "")) == "settings":
                read.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            read.add(node.value)  # getattr(settings, name) for name in ("vf_coef", …)
    assert [name for name in CONSTANTS if name.lower() not in read] == []


def test_help_lists_every_constant_in_its_section_with_comment_and_default(capsys):
    with pytest.raises(SystemExit) as exit:
        read_settings(["--help"])
    assert exit.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # without the line breaks
    position, last_section = 0, ""
    for name, (section, default, comment) in CONSTANTS.items():
        shown = " ".join(map(repr, default)) if isinstance(default, list) else default
        parts = [f"{section}:"] if section != last_section else []
        for part in [*parts, flag(name), f"{comment} [{shown}]"]:
            position = text.index("".join(part.split()), position)  # each after the last
        last_section = section


def test_every_constant_stands_in_the_readme(script):
    readme = script.parent / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    text = readme.read_text(encoding="utf-8")
    for name, (_, default, comment) in CONSTANTS.items():
        assert (
            f"| `{name}` | {', '.join(default) if isinstance(default, list) else default} | {comment} |"
            in text
        )
    rows = re.findall(r"^\| *`([A-Z_]+)` *\|", text, re.MULTILINE)
    assert [name for name in rows if name not in CONSTANTS] == []


# ------------------------------------------------------------------------------------------------------ odd values
@pytest.mark.parametrize(
    "argv",
    [
        ["--output-dir", "a" * 300],
        ["--model-name", "a" * 300],
        ["--reward", "a" * 300 + ".py:f"],
        ["--output-dir", "\0"],
        ["--model-name", "\0"],
        ["--output-dir", ""],
        ["--model-name", ""],
    ],
    ids=lambda argv: repr(argv)[:30],
)
def test_odd_arguments_end_alike(argv):
    try:
        assert isinstance(read_settings(argv), SimpleNamespace)
    except SettingsError as error:
        assert len(str(error)) < 300
