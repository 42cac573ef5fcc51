"""The flags, the help, and what the README names. Constants: test_constants.py, bad values: test_inputs.py."""

import importlib
import io
import re
import resource
import subprocess
import sys
import tokenize

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from train_rlhf import SettingsError

NAMES = [name for _, _, _, names in train_rlhf.RULES for name in names.split()]


# ---------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--kl-coef", "1"], "kl_coef", 1.0),
        (["--kl-coef", "0"], "kl_coef", 0.0),
        (["--batch-size", "12"], "batch_size", 12),
        (["--batch-size=12"], "batch_size", 12),
        (["--batch-size", "7", "--batch-size", "12"], "batch_size", 12),
        (["--batch-size", "1e3"], "batch_size", 1000),
        (["--mini-batch-size", "1"], "mini_batch_size", 1),
        (["--gamma", "0"], "gamma", 0.0),
        (["--seed", "0"], "seed", 0),
        (["--save-every", "0"], "save_every", 0),
        (["--scale-samples", "0"], "scale_samples", 0),
        (["--training-epochs", "0.1"], "training_epochs", 0.1),
        (["--training-epochs", "2"], "training_epochs", 2.0),
        (["--success-threshold", "-1.5"], "success_threshold", -1.5),
        (["--success-threshold=-1e3"], "success_threshold", -1000.0),
        (["--success-threshold", "auto"], "success_threshold", "auto"),
        (["--output-dir", "else_where --x"], "output_dir", "else_where --x"),
        (["--model-name", "some/model_name"], "model_name", "some/model_name"),
        (["--quantization", "4bit"], "quantization", "4bit"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--reward", "my.py:score"], "reward", "my.py:score"),
        (["--reward-label", "joy"], "reward_label", "joy"),
        (["--prompt-field", "query"], "prompt_field", "query"),
        (["--report-to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--positive-words", "calm", "serene"], "positive_words", ["calm", "serene"]),
        (["--prompts", "Only one"], "prompts", ["Only one"]),
        (["--prompts", "- one", "-two words"], "prompts", ["- one", "-two words"]),
        (["--eval-prompts"], "eval_prompts", []),
        (["--lora-targets", "q_proj", "v_proj"], "lora_targets", ["q_proj", "v_proj"]),
        # switches
        (["--resume"], "resume", True),
        (["--resume", "true"], "resume", True),
        (["--resume=True"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--resume", "--no-resume"], "resume", False),
        (["--no-resume", "--resume"], "resume", True),
        (["--no-score-prefixes"], "score_prefixes", False),
        (["--chat-template"], "chat_template", True),
        (["--score-prefixes"], "score_prefixes", True),
    ],
)
def test_a_flag_overrides_its_constant(read_settings, flags, name, value):
    settings, defaults = vars(read_settings(*flags)), vars(read_settings())
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
        ("--batch", ["--batch-size"]),  # no abbreviation, not even where only one begins like that
        ("--colour", []),
        ("-x", []),
    ],
)
def test_an_unknown_flag_is_told_with_what_may_have_been_meant(read_settings, flag, meant):
    for given in ([flag], [flag, "0.5"], [f"{flag}=0.5"]):
        with pytest.raises(SettingsError) as error:
            read_settings(*given, "--seed", "1")
        problem, *values = error.value.args
        assert (
            problem.partition(": ")[0].replace("=0.5", "") == f"{flag} is no flag, and follows none"
        )
        assert values == ["0.5 is no flag, and follows none: --help lists all"] * (len(given) - 1)
        hint = problem.partition(": ")[2]
        assert hint.startswith("did you mean --") if meant else hint == "--help lists all"
        named = re.findall(r"--[a-z-]+", hint) if meant else []
        assert set(meant) <= set(named) <= {train_rlhf.flag_of(name) for name in NAMES}


def test_a_value_that_follows_no_flag(read_settings):
    for given in (["stray", "--seed", "1"], ["--no-resume", "stray"], ["--seed=1", "stray"]):
        with pytest.raises(SettingsError) as error:
            read_settings(*given)
        assert error.value.args == ("stray is no flag, and follows none: --help lists all",)


def test_flags_leave_the_constants_alone(read_settings):
    defaults = vars(read_settings())
    read_settings("--positive-words", "calm", "--seed", "7", "--resume").positive_words.append("x")
    assert "x" not in train_rlhf.POSITIVE_WORDS
    read_settings().prompts.append("x")  # nor do settings share a list with them
    assert "x" not in train_rlhf.PROMPTS
    assert vars(read_settings()) == defaults


# ------------------------------------------------------------------------------------------------------------ help
@pytest.fixture
def read_help(capsys):
    """Return what --help shows of the constants in a script."""

    def read(path):
        constants = vars(train_rlhf) | {"__file__": str(path)}
        with pytest.raises(SystemExit) as exit:
            train_rlhf.read_settings(["--help"], constants, train_rlhf.RULES, train_rlhf.CHECKS)
        assert exit.value.code == 0
        output, message = capsys.readouterr()
        assert message == ""
        usage, _, shown = output.partition("# --- ")
        assert "[--flag VALUE" in usage
        return "# --- " + shown

    return read


def constants_block(source):
    """Return the lines from the first section of constants to the last constant."""
    return source[source.index("# --- Model") : source.index("# ------")].strip()


def test_help_shows_each_constant_as_a_flag_with_default_and_comment(script, read_help):
    """Sections and order are those of the file, line for line."""
    wanted = constants_block(script.read_text(encoding="utf-8")).replace("  # fmt: skip", "")
    for name in NAMES:
        wanted, count = re.subn(f"^{name} =", f"{train_rlhf.flag_of(name)} =", wanted, flags=re.M)
        assert count == 1
    shown = read_help(script).strip()
    assert shown == wanted
    sections = ["Model", "Prompts", "Reward", "Rollout", "PPO", "Run"]
    assert re.findall("^# --- (.*)", shown, flags=re.M) == sections
    assert f"--seed = {train_rlhf.SEED}  # the same seed" in shown


def test_help_of_a_file_with_percent_signs_and_braces_in_a_comment(script, read_help, tmp_path):
    comment = "# 50 % of {x}, %(prog)s, %s %%"
    source = script.read_text(encoding="utf-8")
    changed = re.sub("^(KL_COEF = [0-9.]+).*", rf"\1  {comment}", source, flags=re.M)
    (tmp_path / "edited.py").write_text(changed, encoding="utf-8")
    assert f"\n--kl-coef = {train_rlhf.KL_COEF}  {comment}\n" in read_help(tmp_path / "edited.py")


@pytest.mark.parametrize("moved", [False, True], ids=["dropped", "moved above"])
def test_help_of_a_file_whose_comments_are_gone(script, read_help, tmp_path, moved):
    source = script.read_text(encoding="utf-8")
    block = constants_block(source)
    lines = block.split("\n")
    for token in reversed([*tokenize.generate_tokens(io.StringIO(block).readline)]):
        row, column = token.start
        if token.type == tokenize.COMMENT and not token.string.startswith("# --- "):
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if moved:
                lines.insert(row - 1, token.string)
    (tmp_path / "edited.py").write_text(source.replace(block, "\n".join(lines)), encoding="utf-8")
    shown = read_help(tmp_path / "edited.py")
    assert re.findall("^(--[a-z-]+) = ", shown, flags=re.M) == [
        train_rlhf.flag_of(name) for name in re.findall("^([A-Z_]+) = ", block, flags=re.M)
    ]
    assert "  # " not in shown
    assert ("\n# price of one nat" in shown) == moved


# ------------------------------------------------------------------------------------------------------------ speed
LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "numpy", "peft", "torch", "transformers")
LIBRARIES += ("trl",)


@pytest.mark.parametrize(
    ("flags", "status", "start"),
    [
        (["--help"], 0, "usage: train_rlhf.py [--flag VALUE"),
        (["-h", "--colour"], 0, "usage: train_rlhf.py [--flag VALUE"),
        (["--colour"], 2, "Nothing was started or changed:\n- --colour is no flag"),
        (["--gamma", "2", "--batch-size", "x"], 2, "Nothing was started or changed:\n- BATCH_SIZE is x"),
        (["--batch-size", "7", "--mini-batch-size", "2"], 2, "Nothing was started or changed:\n- MINI_BATCH_SIZE is 2"),
        (["--prompts", "none.txt"], 2, "Nothing was started or changed:\n- PROMPTS is none.txt"),
        (["--output-dir", ".."], 2, "Nothing was started or changed:\n- OUTPUT_DIR is ..: "),
    ],
)  # fmt: skip
def test_an_answer_about_settings_does_not_wait_for_libraries(
    script, tmp_path, flags, status, start
):
    """They take seconds to import, and whoever looks up a flag wants none of them."""
    (tmp_path / "other").write_text("")
    folder = tmp_path / "here"
    folder.mkdir()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", str(script), *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = done.stderr.splitlines()
    imports = [line for line in lines if line.startswith("import time:")]
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports}
    told = done.stdout + "\n".join(line for line in lines if line not in imports)
    assert (done.returncode, told[: len(start)]) == (status, start)
    assert "argparse" in modules and not modules & {*LIBRARIES}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1


def test_a_library_is_the_one_of_that_name():
    for name in LIBRARIES:
        library = vars(train_rlhf)[name]
        assert isinstance(library, train_rlhf.Library)
        assert library.__version__ is importlib.import_module(name).__version__
        assert not hasattr(library, "no_such_thing")
        kept = {attribute for attribute in vars(library) if not attribute.startswith("__")}
        assert kept == set()  # so that whoever replaces an attribute of the library is heard


# ---------------------------------------------------------------------------------------------------------- README
def test_every_flag_and_constant_that_the_readme_names_exists(script):
    """A section that names a launcher of several processes may name the launcher's flags too."""
    text = (script.parent / "README.md").read_text(encoding="utf-8")
    scripts = train_rlhf, train_sft, train_reward_model, make_instructions
    rules = [rule for each in scripts for rule in each.RULES]
    constants = {name for *_, names in rules for name in names.split()}
    flags = {"--help", *map(train_rlhf.flag_of, constants)}
    flags |= {
        train_rlhf.flag_of(f"NO_{name}")
        for kind, _, _, names in rules
        if kind == "True or False"
        for name in names.split()
    }
    text = re.sub(r"(pip install|hf upload) [^&\n]*", "", text)  # which have flags of their own
    assert "--" in text, "the README shows no flag"
    launchers = {"accelerate launch": launch_command_parser(), "torchrun": get_args_parser()}
    for section in re.split("^## ", text, flags=re.M):
        given = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", section))
        own = [parser for name, parser in launchers.items() if name in section]
        theirs = {flag for parser in own for flag in parser._option_string_actions}
        assert given <= flags | theirs
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)[ `]", text))
    assert named, "the README names no constant"
    assert named <= {*constants, "README"}
