"""finetune/settings.py: constants and flags become settings, or messages; --help shows all."""

import contextlib
import io
import math
import os
import re
import signal
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from hypothesis import example, given, strategies
from hypothesis import settings as hypothesis_settings
from torch.distributed.run import get_args_parser

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from finetune.errors import SettingsError, shorten
from finetune.settings import fixed_settings, flag_of, read_settings, show_help

FULL = bool(os.environ.get("CI_FULL"))
SCRIPTS = [train_rlhf, train_sft, train_reward_model, make_instructions]
NAMES = list(train_rlhf.Settings.model_fields)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def each(request):
    return request.param


def settings_of(script, *flags, **constants):
    """Return a script's settings with these flags and constants, no check asked."""
    changed = vars(script) | {name.upper(): value for name, value in constants.items()}
    return read_settings(flags, changed, script.Settings, [])


def problems_of(script, *flags, **constants):
    """Return what is wrong with them."""
    with pytest.raises(SettingsError) as error:
        settings_of(script, *flags, **constants)
    return list(error.value.args)


# --------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--batch-size", "7", "--batch-size", "12"], "batch_size", 12),
        (["--batch-size", "1e3"], "batch_size", 1000),
        (["--success-threshold", "-1.5"], "success_threshold", -1.5),
        (["--success-threshold=-1e3"], "success_threshold", -1000.0),
        (["--output-dir", "else_where --x"], "output_dir", "else_where --x"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--positive-words", "calm", "serene"], "positive_words", ["calm", "serene"]),
        (["--prompts", "- one", "-two words"], "prompts", ["- one", "-two words"]),
        (["--eval-prompts"], "eval_prompts", []),
        # switches
        (["--resume"], "resume", True),
        (["--resume=True"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--resume", "--no-resume"], "resume", False),
        (["--no-resume", "--resume"], "resume", True),
        (["--no-score-prefixes"], "score_prefixes", False),
    ],
)
def test_a_flag_overrides_its_constant(flags, name, value):
    settings = settings_of(train_rlhf, *flags).model_dump()
    defaults = settings_of(train_rlhf).model_dump()
    found = settings.pop(name)
    assert (found, type(found)) == (value, type(value))
    defaults.pop(name)
    assert settings == defaults  # nothing else is changed


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epochs", ["--ppo-epochs", "--training-epochs"]),
        ("--model", ["--model-name"]),
        ("--learing-rate", ["--learning-rate"]),
        ("--positive_words", ["--positive-words"]),
        ("--no-resumee", ["--resume"]),
        ("--prompt", ["--prompts"]),
        ("--batch", ["--batch-size"]),  # no abbreviation, be it the only one
        ("--colour", []),
        ("-x", []),
    ],
)
def test_an_unknown_flag_is_told_with_what_may_have_been_meant(flag, meant):
    value = "0.5 is no flag, and follows none: --help lists all"
    for words in ([flag], [flag, "0.5"], [f"{flag}=0.5"]):
        problem, *values = problems_of(train_rlhf, *words, "--seed", "1")
        told, _, hint = problem.partition(": ")
        assert told.replace("=0.5", "") == f"{flag} is no flag, and follows none"
        assert values == [value] * (len(words) - 1)
        assert hint.startswith("did you mean --") if meant else hint == "--help lists all"
        named = re.findall(r"--[a-z-]+", hint) if meant else []
        assert set(meant) <= set(named) <= set(map(flag_of, NAMES))


@pytest.mark.parametrize("flags", ["stray --seed 1", "--no-resume stray", "--seed 1 stray"])
def test_a_value_that_follows_no_flag(flags):
    told = ["stray is no flag, and follows none: --help lists all"]
    assert problems_of(train_rlhf, *flags.split()) == told


@pytest.mark.parametrize("argument", ["--no-resume=3", "--help=3", "--", "--" + "x" * 5000])
def test_what_argparse_would_refuse_itself_is_refused_alike(argument):
    (problem,) = problems_of(train_rlhf, argument)
    assert problem.startswith(argument.partition("=")[0][:70]) and len(problem) < 200


def test_flags_leave_the_constants_alone(read_settings):
    defaults = read_settings().model_dump()
    settings = read_settings("--positive-words", "calm", "--seed", "7", "--resume")
    settings.positive_words.append("x")
    read_settings().prompts.append("x")  # nor do settings share a list with them
    assert "x" not in train_rlhf.POSITIVE_WORDS + train_rlhf.PROMPTS
    assert read_settings().model_dump() == defaults


# ---------------------------------------------------------------------- types and limits
LIMITS = [
    (int, 0, 2**32 - 1, "seed"),
    (int, 0, 10**6, "mini_batch_size save_every eval_every max_prefixes scale_samples"),
    (int, 1, 10**6, "batch_size eval_batch_size log_every eval_samples max_new_tokens"),
    (int, 1, 10**6, "ppo_epochs lora_rank lora_alpha requests examples min_words max_words"),
    (int, 2, 10**6, "max_length"),
    (float, 1e-30, 1e30, "learning_rate"),
    (float, 0, 1e30, "kl_coef vf_coef target_approx_kl max_grad_norm"),
    (float, 1e-6, 10**6, "training_epochs"),
    (float, 1e-6, 1000, "clip_range value_clip_range"),
    (float, 0.01, 100, "temperature"),
    (float, 0.01, 1, "top_p rouge_limit"),
    (float, 0, 1, "gamma lam"),
    (float, 0, 0.9, "lora_dropout warmup_share"),
    (float, 0.001, 0.9, "eval_share"),
    (None, -(10**15), 10**15, "success_threshold"),
]
OTHER_LIMITS = {
    ("train_rlhf", "eval_share"): (float, 0, 0.9),  # 0 = EVAL_PROMPTS are measured
    ("train_sft", "learning_rate"): (None, 1e-30, 1e30),
    ("train_reward_model", "learning_rate"): (None, 1e-30, 1e30),
    ("train_reward_model", "lora_rank"): (int, 0, 10**6),  # 0 = the body is frozen
}
NUMBERS = {int: "a whole number", float: "a number", None: "a number, or auto,"}
OTHERS = {  # what else settings take
    "none, 8bit or 4bit": ["quantization"],
    "auto, cpu, cuda or mps": ["device"],
    "auto, float32, bfloat16 or float16": ["dtype"],
    "True or False": [
        *("resume", "gradient_checkpointing", "save_adapter", "chat_template"),
        *("score_prefixes", "packing", "group_by_length"),
    ],
    "a text": [
        *("model_name", "output_dir", "prompt_field", "reward", "reward_label"),
        *("data", "template", "seed_tasks"),
    ],
    "a list of texts, none empty": [
        *("lora_targets", "prompts", "eval_prompts", "positive_words", "report_to"),
        *("score", "unanswerable"),
    ],
}


def limits_of(script):
    """Return {name: (type, lowest, highest)} of a script's numbers, in the order of fields."""
    limits = {}
    for *row, names in LIMITS:
        limits |= dict.fromkeys(names.split(), tuple(row))
    for (module, name), row in OTHER_LIMITS.items():
        if module == script.__name__:
            limits[name] = row
    return {name: limits[name] for name in script.Settings.model_fields if name in limits}


def remedies_of(script):
    """Return {name: what it takes} of all settings of a script, in the order of fields."""
    remedies = {}
    for remedy, names in OTHERS.items():
        remedies |= dict.fromkeys(names, remedy)
    for name, (kind, low, high) in limits_of(script).items():
        remedies[name] = f"{NUMBERS[kind]} from {low} to {high}"
    return {name: remedies[name] for name in script.Settings.model_fields}


def told(values, remedies):
    """Return the problems that values, by name, are to have, in the order of fields."""
    names = [name for name in remedies if name in values]
    return [f"{name.upper()} is {shorten(values[name])}: give {remedies[name]}" for name in names]


def test_a_number_within_its_limits_both_included(each):
    limits = limits_of(each)
    for place in (1, 2):
        numbers = {name: row[place] for name, row in limits.items()}
        settings = settings_of(each, **numbers)
        assert {name: getattr(settings, name) for name in numbers} == numbers
        for name, (kind, *_) in limits.items():
            assert type(getattr(settings, name)) is (kind or float)


def test_a_number_beyond_its_limits_each_told_in_the_order_of_the_fields(each):
    for place, step in (1, -1), (2, 1):
        beyond = {}
        for name, row in limits_of(each).items():
            next_number = math.nextafter(row[place], step * math.inf)
            beyond[name] = row[place] + step if row[0] is int else next_number
        assert problems_of(each, **beyond) == told(beyond, remedies_of(each))


BAD = {  # by what a remedy begins with
    "a whole": [2.5, "2.5", "ten", "", None, True, math.nan, "inf", "1" * 5000, "0,1", [1]],
    "a number from": ["abc", "nan", "inf", "1e300", "0,1", "", None, True, math.nan, (0, 1)],
    "a number, or auto": ["high", "AUTO", "nan", "1e31", None, True, ["auto"]],
    "True or False": ["maybe", "1", 0, None, "", [True]],
    "a text": [None, "", " \n", 5, "\0", "\udcff", os, ["a"], ("a", "b")],
    "a list": [None, "", ["I", " "], ["I", 5], ["\0"], ["I", "\udcff"], {}, str, iter("I")],
    "auto": ["int8", "tpu", "Auto", "", None, 16, ["auto"]],
    "none": ["2bit", "x" * 1000, "a\nb\nc", "", None, 4, ["none"]],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_value_of_another_kind(each, kind):
    remedies = remedies_of(each)
    names = [name for name in remedies if remedies[name].startswith(kind)]
    for value in BAD[kind] if names else []:
        bad = dict.fromkeys(names, value)
        # Of a label the number will do.
        if type(value) is int:
            bad.pop("reward_label", None)
        assert problems_of(each, **bad) == told(bad, remedies)


def test_every_setting_has_bad_values_in_that_table(each):
    for name, remedy in remedies_of(each).items():
        assert sum(remedy.startswith(kind) for kind in BAD) == 1, name


def test_which_lists_may_be_empty(each):
    remedies = remedies_of(each)
    for name in [name for name in remedies if remedies[name].startswith("a list")]:
        if name in ("lora_targets", "prompts", "positive_words"):
            assert problems_of(each, **{name: []}) == told({name: []}, remedies)
        else:
            assert getattr(settings_of(each, **{name: []}), name) == []


def test_a_value_is_shown_by_its_first_line_and_80_characters():
    shown = {"x" * 1000: "x" * 79 + "…", "a\nb\nc": "a…", "": "empty", "8 bit": "8 bit"}
    for value, text in shown.items():
        problem = f"QUANTIZATION is {text}: give none, 8bit or 4bit"
        assert problems_of(train_rlhf, "--quantization", value) == [problem]


def test_a_constant_that_all_scripts_have_has_one_default():
    for name in ("QUANTIZATION", "DEVICE", "DTYPE", "SEED", "RESUME"):
        assert len({getattr(script, name) for script in SCRIPTS}) == 1, name
    for name in ("LORA_RANK", "LORA_ALPHA", "LORA_TARGETS", "REPORT_TO", "SAVE_ADAPTER"):
        assert len({str(getattr(script, name)) for script in SCRIPTS[:3]}) == 1, name


# ------------------------------------------------------------------ all problems at once
def test_all_problems_are_told_at_once(each, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--seed x --colour red --batch-size 0 --device tpu --model-name= --output-dir /"
    with pytest.raises(SettingsError) as error:
        read_settings(flags.split(), vars(each), each.Settings, each.CHECKS)
    first, second, *others = [problem.partition(":")[0] for problem in error.value.args]
    assert [first, second] == [
        f"{word} is no flag, and follows none" for word in ("--colour", "red")
    ]
    assert others[:4] == ["MODEL_NAME is empty", "DEVICE is tpu", "SEED is x", "BATCH_SIZE is 0"]
    # The check of that one wants a MODEL_NAME too.
    assert not any("OUTPUT_DIR" in problem for problem in others)


def test_a_check_is_asked_where_its_own_settings_are_right():
    asked = []

    def check_seed(seed, batch_size):
        asked.append((seed, batch_size))
        raise SettingsError("SEED is a bad one", "and so is BATCH_SIZE")

    def check_gamma(seed, gamma):
        asked.append("GAMMA")

    flags = ["--gamma", "2", "--seed", "3", "--batch-size", "5"]
    with pytest.raises(SettingsError) as error:
        checks = [check_gamma, check_seed]
        read_settings(flags, vars(train_rlhf), train_rlhf.Settings, checks)
    assert asked == [(3, 5)]
    gamma = "GAMMA is 2: give a number from 0 to 1"
    assert error.value.args == (gamma, "SEED is a bad one", "and so is BATCH_SIZE")


# -------------------------------------------------------------- what --resume may change
CHANGEABLE = {"output_dir", "device", "resume", "log_every"}
OF_TRAINING = {"mini_batch_size", "gradient_checkpointing", "max_grad_norm", "eval_batch_size"}
OF_TRAINING |= {"save_every", "save_adapter", "report_to"}
OF_PPO = {"training_epochs", "success_threshold", "target_approx_kl", "eval_samples"}
CHANGEABLE_TOO = {
    "train_rlhf": OF_TRAINING | OF_PPO,
    "train_sft": OF_TRAINING | {"eval_every", "max_new_tokens"},
    "train_reward_model": OF_TRAINING | {"eval_every", "score"},
    "make_instructions": {"seed_tasks", "requests", "batch_size"},
}


def test_all_but_these_have_to_stay_the_same_when_a_run_goes_on(each):
    fixed = fixed_settings(settings_of(each, seed=5))
    changeable = CHANGEABLE | CHANGEABLE_TOO[each.__name__]
    assert not changeable & fixed.keys()
    assert changeable | fixed.keys() == each.Settings.model_fields.keys()
    assert fixed["seed"] == 5


# ---------------------------------------------------------------------------------- help
def test_help_shows_each_constant_as_a_flag_with_default_and_comment(each, capsys):
    """Sections and order are those of the file, line for line."""
    source = Path(each.__file__).read_text(encoding="utf-8")
    wanted = source[source.index("# --- Model") : source.index("# ------")].strip()
    wanted = wanted.replace("  # fmt: skip", "")
    for name in map(str.upper, each.Settings.model_fields):
        wanted, count = re.subn(f"^{name} =", f"{flag_of(name)} =", wanted, flags=re.M)
        assert count == 1
    with pytest.raises(SystemExit) as exit:
        read_settings(["--seed", "x", "--help"], vars(each), each.Settings, [])
    output, message = capsys.readouterr()
    usage, _, shown = output.partition("# --- ")
    assert (exit.value.code, message) == (0, "") and "[--flag VALUE" in usage
    assert "# --- " + shown.strip() == wanted
    assert f"--seed = {each.SEED}  # the same seed" in shown


EDITED = """SEED = 7
# --- Model
# Which one, by name.
MODEL_NAME = "x"
KL_COEF = 0.5  # 50 % of {x}, %(prog)s, %s %%

# --- Prompts
PROMPTS = [
    "I feel so",
]{}


# ------------------ below
GAMMA = 1.0
"""


def test_help_of_a_file_whose_comments_are_other_ones(capsys):
    show_help(EDITED.format("  # fmt: skip", x="{x}"))
    _, _, shown = capsys.readouterr().out.partition("\n\n")
    wanted = EDITED.format("", x="{x}").partition("\n")[2].partition("\n# ----")[0]
    for name in ("MODEL_NAME", "KL_COEF", "PROMPTS"):
        wanted = wanted.replace(f"\n{name}", f"\n{flag_of(name)}")
    assert shown.strip() == wanted.strip()


LAUNCHERS = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}


def test_every_flag_and_constant_that_the_documents_name_exists(script):
    """A section that names a launcher of several processes may name the launcher's flags."""
    constants, flags = {"README"}, {"--help"}
    for name, remedy in [pair for module in SCRIPTS for pair in remedies_of(module).items()]:
        constants.add(name.upper())
        flags.add(flag_of(name))
        if remedy == "True or False":
            flags.add(flag_of(f"no_{name}"))

    readme = script.parent / "README.md"
    guides = [script.parent / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")]
    for path in [readme, *script.parent.glob("docs/*.md"), *guides]:
        # These have flags of their own.
        others = r"(pip install|hf upload|tensorboard|ruff format|benchmarks/\w+\.py) [^&\n]*"
        text = re.sub(others, "", path.read_text(encoding="utf-8"))
        for section in re.split("^## ", text, flags=re.M):
            theirs = set()
            for name, parser in LAUNCHERS.items():
                theirs |= {*parser._option_string_actions} if name in section else set()
            shown = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", section))
            assert shown <= flags | theirs, path.name
        named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)[ `]", text))
        assert named <= constants, path.name
        assert path != readme or ("--" in text and named), "it shows no flag or no constant"


# ------------------------------------------------------------------------- any arguments
values = strategies.one_of(
    strategies.text(max_size=8),
    strategies.integers().map(str),
    strategies.floats().map(str),
    strategies.sampled_from(["", " ", "true", "none", "-", "--", "auto", "1e9", "0x10"]),
    strategies.sampled_from(["1_0", "/", ".", "~", "%", "\0", "\udcff", "a" * 300]),
    strategies.sampled_from(["x.txt", "x.jsonl", "a.py:f", "float16", "all-linear", "../x"]),
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
names = [*map(flag_of, NAMES), "--no-resume", "--no-score-prefixes"]
flags = strategies.sampled_from([*names, "--help", "-h", "--no", "--lr", "-x"])
joined = strategies.builds("{}={}".format, strategies.sampled_from(names), values)
arguments = strategies.one_of(flags, values, joined)
pairs = strategies.lists(strategies.tuples(flags, values), max_size=4)
lists = strategies.lists(arguments, max_size=6)


@hypothesis_settings(max_examples=400 if FULL else 100, deadline=None)
@given(strategies.one_of(lists, pairs.map(lambda found: [*sum(found, ())])))
@example(["--resume"])
@example(["--output-dir", "a" * 300])
@example(["--model-name", "\0", "--output-dir", "\0", "--reward", "\0.py:f", "--resume"])
@example(["--no-resume=x", "--lr=", "--"])
def test_no_arguments_end_in_anything_but_a_run_or_a_message(tmp_path_factory, argv):
    ran, output, message = [], io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setattr(train_rlhf, "run", ran.append)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(message):
                status = train_rlhf.main(argv)
        except SystemExit as exit:
            assert exit.code == 0 and {"-h", "--help"} & set(argv)
            return
    assert {number: signal.getsignal(number) for number in before} == before
    assert output.getvalue() == ""
    if status == 0:
        (settings,) = ran
        assert message.getvalue() == "" and list(settings.model_dump()) == NAMES
        for name, default in settings_of(train_rlhf):
            kinds = (str, float) if name == "success_threshold" else (type(default),)
            assert type(getattr(settings, name)) in kinds
        texts = settings.prompts + settings.positive_words
        assert all(type(text) is str for text in texts)
    else:
        assert status == 2 and ran == []
        first, *lines = message.getvalue().split("\n- ")
        assert first == "Nothing was started or changed:" and lines
        assert not any("Traceback" in line or len(line) > 400 for line in lines)
