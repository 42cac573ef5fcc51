import ast
import re
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

import train_rlhf
from train_rlhf import SettingsError, read_settings

CONSTANTS = train_rlhf.constants()


def flag(name):
    return "--" + name.lower().replace("_", "-")


def complaints(*flags):
    with pytest.raises(SettingsError) as error:
        read_settings([*flags])
    first, *lines = str(error.value).splitlines()
    assert first == "Nothing was started or changed:"
    return lines


# ---------------------------------------------------------------------------------------------------------- flags
def test_without_flags_the_settings_are_the_constants():
    assert vars(read_settings([])) == {name.lower(): getattr(train_rlhf, name) for name in CONSTANTS}


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
    assert vars(read_settings([])) == {name.lower(): getattr(train_rlhf, name) for name in CONSTANTS}


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
        assert f"| `{name}` | {', '.join(default) if isinstance(default, list) else default} | {comment} |" in text
    rows = re.findall(r"^\| *`([A-Z_]+)` *\|", text, re.MULTILINE)
    assert [name for name in rows if name not in CONSTANTS] == []


# ----------------------------------------------------------------------------------------------------- bad values
def one(remedy, *flags):
    return pytest.param(flags, [f"- {remedy}"], id=" ".join(flags)[:40])


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        one("--colour: there is no such flag; --help lists all", "--colour"),
        one("--batch: there is no such flag; --help lists all", "--batch"),  # no abbreviations
        one("BATCH_SIZE is 0: give 1 or more", "--batch-size", "0"),
        one("BATCH_SIZE is -3: give 1 or more", "--batch-size", "-3"),
        one("BATCH_SIZE is 2.5: give one whole number", "--batch-size", "2.5"),
        one("BATCH_SIZE is ten: give one whole number", "--batch-size", "ten"),
        one("2: there is no such flag; --help lists all", "--batch-size", "1", "2"),
        one(
            "MINI_BATCH_SIZE is 2: give 0 or a divisor of BATCH_SIZE, 7",
            *("--batch-size", "7", "--mini-batch-size", "2"),
        ),
        one("LEARNING_RATE is abc: give one number", "--learning-rate", "abc"),
        one("LEARNING_RATE is -1.0: give a number above 0", "--learning-rate", "-1"),
        one("LEARNING_RATE is 0.0: give a number above 0", "--learning-rate", "0"),
        one("LEARNING_RATE is nan: give one number", "--learning-rate", "nan"),
        one("LEARNING_RATE is inf: give one number", "--learning-rate", "inf"),
        one("LEARNING_RATE is 1e999: give one number", "--learning-rate", "1e999"),
        one("PROMPTS is ['']: give one or more texts, none empty", "--prompts", ""),
        one("PROMPTS is ['I', ' ']: give one or more texts, none empty", "--prompts", "I", " "),
        one("PROMPTS is []: give one or more texts, none empty", "--prompts"),
        one("POSITIVE_WORDS is []: give one or more texts, none empty", "--positive-words"),
        one("LORA_TARGETS is []: give one or more texts, none empty", "--lora-targets"),
        one("QUANTIZATION is 2bit: give none, 8bit or 4bit", "--quantization", "2bit"),
        one("DTYPE is int8: give auto, float32, bfloat16 or float16", "--dtype", "int8", "--device", "cpu"),
        one("DTYPE is float16: give float32 or bfloat16 on a CPU", "--dtype", "float16", "--device", "cpu"),
        one("DEVICE is tpu: give auto, cpu or cuda", "--device", "tpu"),
        one("REPORT_TO is wandb: give none or tensorboard", "--report-to", "wandb"),
        one("REWARD is my_reward: give positive_word_reward or FILE.py:FUNCTION", "--reward", "my_reward"),
        one("REWARD is a.py: give positive_word_reward or FILE.py:FUNCTION", "--reward", "a.py"),
        one("GAMMA is 2.0: give a number from 0 to 1", "--gamma", "2"),
        one("LAM is -0.1: give a number from 0 to 1", "--lam", "-0.1"),
        one("TEMPERATURE is 0.0: give a number above 0", "--temperature", "0"),
        one("KL_COEF is -0.1: give 0 or more", "--kl-coef", "-0.1"),
        one("SEED is -1: give a number from 0 to 4294967295", "--seed", "-1"),
        one("EVAL_SAMPLES is 0: give 1 or more", "--eval-samples", "0"),
        one("LORA_RANK is 0: give 1 or more", "--lora-rank", "0"),
        one("CLIP_RANGE is 0.0: give a number above 0", "--clip-range", "0"),
        one("EVAL_PROMPTS is ['Life is']: give prompts that are not in PROMPTS, as ['Life is'] is",
            "--eval-prompts", "Life is"),
        one("SEED is empty: give one whole number", "--seed"),
        one("RESUME is maybe: give true or false", "--resume", "maybe"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_setting_and_the_remedy(flags, lines):
    assert complaints(*flags) == lines


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert complaints("--device", "cuda") == ["- DEVICE is cuda: give cpu, since PyTorch sees no GPU"]


def test_tensorboard_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(train_rlhf.importlib.util, "find_spec", lambda name: None)
    assert complaints("--report-to", "tensorboard") == ["- REPORT_TO is tensorboard: give none, or pip install it"]


@pytest.mark.parametrize("size", ["4294967296", "1" + 30 * "0"])
def test_a_seed_that_is_too_large_for_numpy(size):
    (line,) = complaints("--seed", size)
    assert line.startswith(f"- SEED is {size}")


def test_all_problems_are_reported_at_once():
    lines = complaints("--batch-size", "0", "--learning-rate", "abc", "--colour", "red", "--gamma", "2")
    assert len(lines) == 5  # both words of the unknown flag
    for name in ("BATCH_SIZE is 0", "LEARNING_RATE is abc", "--colour", "GAMMA is 2.0"):
        assert sum(name in line for line in lines) == 1


def test_a_long_value_is_shortened():
    (line,) = complaints("--quantization", "x" * 1000)
    assert len(line) < 150


def test_a_value_of_several_lines_stays_on_one():
    assert len(complaints("--quantization", "a\nb\nc")) == 1


words = strategies.one_of(
    strategies.text(max_size=8).filter(lambda text: "\0" not in text),
    strategies.integers().map(str),
    strategies.floats().map(str),
    strategies.sampled_from(["", " ", "true", "none", "-", "--", "auto", "1e9", "0x10", "a" * 300, "/", ".", "~"]),
)
flags = strategies.sampled_from([*map(flag, CONSTANTS), "--help", "-h", "--no", "-x"])
arguments = strategies.one_of(
    flags, words, strategies.builds("{}={}".format, strategies.sampled_from([*map(flag, CONSTANTS)]), words)
)


@hypothesis_settings(max_examples=200, deadline=None)
@given(strategies.lists(arguments, max_size=6))
def test_no_arguments_end_in_anything_but_settings_or_their_errors(argv):
    try:
        assert isinstance(read_settings(argv), SimpleNamespace)
    except SettingsError as error:
        assert len(str(error).splitlines()) > 1
    except SystemExit as exit:
        assert exit.code == 0
        assert {"-h", "--help"} & set(argv)


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


def test_a_huge_batch_size_is_no_long_calculation():
    start = time.perf_counter()
    complaints("--batch-size", "100000000", "--mini-batch-size", "3")
    assert time.perf_counter() - start < 1
