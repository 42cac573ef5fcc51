"""Bad inputs: whatever a user gives, main ends with status 2, the exact problem on stderr, and nothing changed."""

import contextlib
import hashlib
import io
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, strategies
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file, save_file

import train_rlhf

CONSTANTS = train_rlhf.constants()
RUN_FILES = ("metrics.jsonl", "report.json", "model.safetensors")


def flag(name):
    return "--" + name.lower().replace("_", "-")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
    }


@pytest.fixture
def refused(call_main, tmp_path, capfd, monkeypatch):
    """Call main beside an earlier run; return its problems, after a look at whether everything is untouched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "trained_model").mkdir()
    for name in RUN_FILES:
        (tmp_path / "trained_model" / name).write_text(name)

    def call(*flags):
        before = contents(tmp_path)
        status = call_main("--device", "cpu", *flags)
        output, message = capfd.readouterr()
        assert (status, output) == (2, "")
        first, *lines = message.splitlines()
        assert first == "Nothing was started or changed:"
        assert message.endswith("\n")
        assert contents(tmp_path) == before
        return lines

    return call


def row(problem, *flags):
    return pytest.param(
        flags, [f"- {problem}"], id=" ".join(flags)[:60].encode("ascii", "replace").decode()
    )


# ------------------------------------------------------------------------------------- settings: nothing is loaded
@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        row("--colour: there is no such flag; --help lists all", "--colour"),
        row("--batch: there is no such flag; --help lists all", "--batch"),  # no abbreviations
        row("-x: there is no such flag; --help lists all", "-x"),
        row("--no-resume: there is no such flag; --help lists all", "--no-resume"),
        row("2: there is no such flag; --help lists all", "--batch-size", "1", "2"),
        # kind
        row("BATCH_SIZE is 2.5: give one whole number", "--batch-size", "2.5"),
        row("BATCH_SIZE is ten: give one whole number", "--batch-size", "ten"),
        row("BATCH_SIZE is 1e3: give one whole number", "--batch-size", "1e3"),
        row("BATCH_SIZE is empty: give one whole number", "--batch-size="),
        row("SEED is empty: give one whole number", "--seed"),
        row(f"SEED is {'1' * 79}…: give one whole number", "--seed", "1" * 5000),
        row("LEARNING_RATE is abc: give one number", "--learning-rate", "abc"),
        row("LEARNING_RATE is nan: give one number", "--learning-rate", "nan"),
        row("LEARNING_RATE is inf: give one number", "--learning-rate", "inf"),
        row("LEARNING_RATE is 1e999: give one number", "--learning-rate", "1e999"),
        row("LEARNING_RATE is 1e+300: give a number below 1e30", "--learning-rate", "1e300"),
        row("POSITIVE_WORDS is ['happy,glad']: give words with spaces between them, no commas",
            "--positive-words", "happy,glad"),
        row("LEARNING_RATE is 0,1: give one number", "--learning-rate", "0,1"),
        row("RESUME is maybe: give true or false", "--resume", "maybe"),
        row("RESUME is 1: give true or false", "--resume", "1"),
        row("SCORE_PREFIXES is yes: give true or false", "--score-prefixes", "yes"),
        row("MODEL_NAME is empty: give one value", "--model-name"),
        row("OUTPUT_DIR is empty: give one value", "--output-dir", ""),
        row("REWARD is empty: give one value", "--reward="),
        # range
        row("BATCH_SIZE is 0: give 1 to 1000000", "--batch-size", "0"),
        row("BATCH_SIZE is -3: give 1 to 1000000", "--batch-size", "-3"),
        row("BATCH_SIZE is 1000001: give 1 to 1000000", "--batch-size", "1000001"),
        row("LORA_RANK is 0: give 1 to 1000000", "--lora-rank", "0"),
        row("LORA_ALPHA is 0: give 1 to 1000000", "--lora-alpha", "0"),
        row("TRAINING_EPOCHS is 0: give 1 to 1000000", "--training-epochs", "0"),
        row("TRAINING_EPOCHS is 99999999999: give 1 to 1000000", "--training-epochs", "99999999999"),
        row("MAX_NEW_TOKENS is 0: give 1 to 1000000", "--max-new-tokens", "0"),
        row("PPO_EPOCHS is 0: give 1 to 1000000", "--ppo-epochs", "0", "--target-approx-kl", "0"),
        row("EVAL_SAMPLES is 0: give 1 to 1000000", "--eval-samples", "0"),
        row("EVAL_BATCH_SIZE is 0: give 1 to 1000000", "--eval-batch-size", "0"),
        row("LOG_EVERY is 0: give 1 to 1000000", "--log-every", "0"),
        row("LEARNING_RATE is -1.0: give a number above 0", "--learning-rate", "-1"),
        row("LEARNING_RATE is 0.0: give a number above 0", "--learning-rate", "0"),
        row("LEARNING_RATE is 0.0: give a number above 0", "--learning-rate", "1e-999"),
        row("CLIP_RANGE is 0.0: give a number above 0, at most 1000", "--clip-range", "0"),
        row("VALUE_CLIP_RANGE is -0.2: give a number above 0, at most 1000", "--value-clip-range", "-0.2"),
        row("TEMPERATURE is 0.0: give a number from 0.01 to 100", "--temperature", "0"),
        row("TEMPERATURE is 101.0: give a number from 0.01 to 100", "--temperature", "101"),
        row("TARGET_APPROX_KL is -1.0: give 0 or more", "--target-approx-kl", "-1"),
        row("KL_COEF is -0.1: give 0 or more", "--kl-coef", "-0.1"),
        row("VF_COEF is -0.1: give 0 or more", "--vf-coef", "-0.1"),
        row("MAX_GRAD_NORM is -1.0: give 0 or more", "--max-grad-norm", "-1"),
        row("SAVE_EVERY is -1: give 0 or more", "--save-every", "-1"),
        row("MINI_BATCH_SIZE is -1: give 0 or more", "--mini-batch-size", "-1", "--target-approx-kl", "0"),
        row("SEED is -1: give a number from 0 to 4294967295", "--seed", "-1"),
        row("SEED is 4294967296: give a number from 0 to 4294967295", "--seed", "4294967296"),  # too large for NumPy
        row("GAMMA is 2.0: give a number from 0 to 1", "--gamma", "2"),
        row("LAM is -0.1: give a number from 0 to 1", "--lam", "-0.1"),
        row("PROMPTS is ['']: give one or more texts, none empty", "--prompts", ""),
        row("PROMPTS is ['I', ' ']: give one or more texts, none empty", "--prompts", "I", " "),
        row("PROMPTS is []: give one or more texts, none empty", "--prompts"),
        row("EVAL_PROMPTS is []: give one or more texts, none empty", "--eval-prompts"),
        row("POSITIVE_WORDS is []: give one or more texts, none empty", "--positive-words"),
        row("LORA_TARGETS is []: give one or more texts, none empty", "--lora-targets"),
        row("POSITIVE_WORDS is [' joy', 'fun']: give words without spaces around them",
            "--positive-words", " joy", "fun"),
        row("QUANTIZATION is 2bit: give none, 8bit or 4bit", "--quantization", "2bit"),
        row("DTYPE is int8: give auto, float32, bfloat16 or float16", "--dtype", "int8"),
        row("DEVICE is tpu: give auto, cpu or cuda", "--device", "tpu"),
        row("REPORT_TO is wandb: give none or tensorboard", "--report-to", "wandb"),
        row("REWARD is my_reward: give positive_word_reward or FILE.py:FUNCTION", "--reward", "my_reward"),
        row("REWARD is a.py: give positive_word_reward or FILE.py:FUNCTION", "--reward", "a.py"),
        row("REWARD is a.py:f(): give positive_word_reward or FILE.py:FUNCTION", "--reward", "a.py:f()"),
        # combinations
        row("MINI_BATCH_SIZE is 2: give 0 or a divisor of BATCH_SIZE, 7",
            "--batch-size", "7", "--mini-batch-size", "2"),
        row("MINI_BATCH_SIZE is 20: give 0 or a divisor of BATCH_SIZE, 10", "--mini-batch-size", "20"),
        row("TARGET_APPROX_KL is 0.0025: give 0, for a single update of a step can't be measured",
            "--ppo-epochs", "1"),
        row("PROMPTS is ['I', 'I']: give each prompt once", "--prompts", "I", "I"),
        row("EVAL_PROMPTS is ['I', 'I']: give each prompt once", "--eval-prompts", "I", "I"),
        row("EVAL_PROMPTS is ['Life is']: give prompts that are not in PROMPTS, as ['Life is'] is",
            "--eval-prompts", "Life is"),
        row("DTYPE is float16: give float32 or bfloat16 on a CPU", "--dtype", "float16"),
        row("DTYPE is float16: give float32 or bfloat16 on a CPU", "--dtype", "float16", "--device", "auto"),
        row("DEVICE is cuda: give cpu, since PyTorch sees no GPU", "--device", "cuda"),
        # places
        row("MODEL_NAME is ./no_such_model: there is no such folder: name one, or a model on the Hub",
            "--model-name", "./no_such_model"),
        row("MODEL_NAME is /no/such/model: there is no such folder: name one, or a model on the Hub",
            "--model-name", "/no/such/model"),
        row("MODEL_NAME is ~/no_such_model: there is no such folder: name one, or a model on the Hub",
            "--model-name", "~/no_such_model"),
        row("MODEL_NAME is trained_model/report.json: there is no such folder: name one, or a model on the Hub",
            "--model-name", "trained_model/report.json"),
        row("RESUME is True: there is no checkpoint in trained_model: start without it", "--resume"),
        row("RESUME is True: there is no checkpoint in new: start without it", "--resume", "--output-dir", "new"),
    ],
)  # fmt: skip
def test_a_bad_setting(refused, flags, lines):
    assert refused(*flags) == lines


def test_every_constant_has_a_bad_value_in_that_table():
    (table,) = (
        mark.args[1] for mark in test_a_bad_setting.pytestmark if mark.name == "parametrize"
    )
    named = {
        line.removeprefix("- ").split(" is ")[0]
        for parameters in table
        for line in parameters.values[1]
    }
    assert set(CONSTANTS) - named == set()


def test_all_problems_are_reported_at_once(refused):
    assert refused(
        "--batch-size", "0", "--learning-rate", "abc", "--colour", "red", "--gamma", "2"
    ) == [
        "- --colour: there is no such flag; --help lists all",
        "- red: there is no such flag; --help lists all",
        "- LEARNING_RATE is abc: give one number",
        "- BATCH_SIZE is 0: give 1 to 1000000",
        "- GAMMA is 2.0: give a number from 0 to 1",
    ]


def test_a_long_value_or_one_of_several_lines_is_shortened(refused):
    assert refused("--quantization", "x" * 1000) == [
        f"- QUANTIZATION is {'x' * 79}…: give none, 8bit or 4bit"
    ]
    assert refused("--quantization", "a\nb\nc") == ["- QUANTIZATION is a…: give none, 8bit or 4bit"]


def test_tensorboard_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(train_rlhf.importlib.util, "find_spec", lambda name: None)
    assert refused("--report-to", "tensorboard") == [
        "- REPORT_TO is tensorboard: give none, or pip install it"
    ]


def test_a_huge_batch_size_is_no_long_calculation(refused):
    start = time.perf_counter()
    refused("--batch-size", "100000000", "--mini-batch-size", "3")
    assert time.perf_counter() - start < 1


# ------------------------------------------------------------------------------------- settings: the model has a say
@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        row("MAX_NEW_TOKENS is 256: give less than the context of 256", "--max-new-tokens", "256"),
        row("MAX_NEW_TOKENS is 1000000: give less than the context of 256", "--max-new-tokens", "1000000"),
        row(f"PROMPTS has '{'very ' * 15}very…' with 301 tokens: "
            "give one of at most 246, or lower MAX_NEW_TOKENS", "--prompts", ("very " * 300).strip()),
        row("EVAL_PROMPTS has 'My day' with 3 tokens: give one of at most 2, or lower MAX_NEW_TOKENS",
            "--max-new-tokens", "254", "--prompts", "I", "--eval-prompts", "My day"),
        row("MAX_NEW_TOKENS is 1: give 6 or more, since each of POSITIVE_WORDS takes 6 tokens or more",
            "--max-new-tokens", "1", "--positive-words", "qqqqq"),
        row("LORA_TARGETS is ['x_proj']: Target modules {'x_proj'} not found in the base model. Please check the "
            "target modules and try again.", "--lora-targets", "x_proj"),
        row("LORA_TARGETS is ['mlp']: Target module LlamaMLP(…", "--lora-targets", "mlp"),
        row("LORA_TARGETS is ['lm_head']: this model's embeddings are tied, so the update can't be merged: leave them "
            "out", "--lora-targets", "lm_head"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_suit_the_model(refused, demo_model, flags, lines):
    assert refused("--model-name", demo_model, *flags) == lines


def edit(name, **entries):
    def spoil(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))

    return spoil


def test_a_word_that_the_tokenizer_cannot_write(refused, copy_of_demo_model):
    normalizer = {"type": "Replace", "pattern": {"String": "é"}, "content": "e"}
    edit("tokenizer.json", normalizer=normalizer)(copy_of_demo_model)
    assert refused("--model-name", "copy", "--positive-words", "élan", "joy") == [
        "- POSITIVE_WORDS has 'élan', which the model's tokenizer can't write: leave it out"
    ]


# ------------------------------------------------------------------------------------------------------- MODEL_NAME
def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def weights_are_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def weights_are_cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors["model.layers.1.mlp.up_proj.weight"], tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


def add_a_token(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    kind = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 1536, "content": "I am really", **kind})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


no_config = "Unrecognized model in copy. Should have a `model_type` key in its config.json"
not_json = "It looks like the config file at 'copy/config.json' is not a valid JSON file"
no_weights = "Error no file named model.safetensors found in directory copy"
broken_json = "Expecting property name enclosed in double quotes: line 1 column 3 (char 2)"
no_context = "Validation error for field 'max_position_embeddings'…"
no_tokenizer = "Couldn't instantiate the backend tokenizer from one of…"
cut_off = "Error while deserializing header: incomplete metadata, file not fully covered"
unknown = (
    "The checkpoint you are trying to load has model type `no_such_kind` but Transformers does not recognize this "
    "architecture. This could be because of an issue with the checkpoint, or because your versi…"
)
no_language_model = (
    "Unrecognized configuration class <class 'transformers.models.{0}.configuration_{0}.{1}Config'> for this kind of "
    "AutoModel: AutoModelForCausalLM…"
)
other_size = "You set `ignore_mismatched_sizes` to `False`, thus raising an error. For details look at the above report!"
code = "The repository copy contains custom code which must be executed to correctly load the model"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(empty, no_config, id="no files"),
        pytest.param(remove("config.json"), no_config, id="no config"),
        pytest.param(write("config.json", ""), not_json, id="empty config"),
        pytest.param(write("config.json", "{ broken"), not_json, id="broken config"),
        pytest.param(write("config.json", "[]"), no_config, id="list as config"),
        pytest.param(write("config.json", '{"model_type": "no_such_kind"}'), unknown, id="unknown"),
        pytest.param(write("config.json", '{"model_type": "vit"}'), no_language_model.format("vit", "ViT"), id="vit"),
        pytest.param(edit("config.json", model_type="t5"), no_language_model.format("t5", "T5"), id="t5"),
        pytest.param(edit("config.json", intermediate_size=100), other_size, id="config of another width"),
        pytest.param(edit("config.json", hidden_size="x"), "Validation error for field 'hidden_size'…", id="size"),
        pytest.param(edit("config.json", max_position_embeddings="x"), no_context, id="context"),
        pytest.param(edit("config.json", rope_parameters={"rope_type": "nope"}), "KeyError('nope')", id="positions"),
        pytest.param(edit("config.json", quantization_config=[]), "'list' object has no attribute 'to_dict'",
                     id="config with odd quantization"),
        pytest.param(write("generation_config.json", "[]"), "'list' object is not a mapping", id="generation config"),
        pytest.param(write("adapter_config.json", "{ x"), broken_json, id="broken adapter"),
        pytest.param(remove("tokenizer.json", "tokenizer_config.json"), no_tokenizer, id="no tokenizer"),
        pytest.param(write("tokenizer.json", "{}"), "KeyError('added_tokens')", id="empty tokenizer"),
        pytest.param(write("tokenizer_config.json", "{ x"), broken_json, id="broken tokenizer config"),
        pytest.param(edit("tokenizer_config.json", eos_token=None), "its tokenizer has no end token", id="no end"),
        pytest.param(add_a_token, "its tokenizer gives the token 1536, but it knows 1536 tokens only", id="token"),
        pytest.param(remove("model.safetensors"), no_weights, id="no weights"),
        pytest.param(weights_are_pickled, no_weights, id="pickled weights"),
        pytest.param(weights_are_cut_off, cut_off, id="weights cut off"),
        pytest.param(change_weights(lambda weight, tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
                     "it lacks weights such as model.layers.1.mlp.up_proj.weight", id="a tensor missing"),
        pytest.param(change_weights(lambda weight, tensors: weight.fill_(torch.nan)),
                     "it has weights that are not finite, such as model.layers.1.mlp.up_proj.weight", id="NaN"),
        pytest.param(change_weights(lambda weight, tensors: weight[0].fill_(-torch.inf)),
                     "it has weights that are not finite, such as model.layers.1.mlp.up_proj.weight", id="infinity"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_loaded(refused, copy_of_demo_model, spoil, reason):
    spoil(copy_of_demo_model)
    remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
    assert refused("--model-name", "copy") == [
        f"- MODEL_NAME is copy: it can't be loaded ({reason}): {remedy}"
    ]


def test_code_in_a_model_folder_is_never_run(refused, copy_of_demo_model, tmp_path, monkeypatch):
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit("config.json", model_type="mine", auto_map=own)(copy_of_demo_model)
    (copy_of_demo_model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers may ask
    (line,) = refused("--model-name", "copy")
    assert line.startswith(f"- MODEL_NAME is copy: it can't be loaded ({code}")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------- REWARD
@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "FileNotFoundError(2, 'No such file or directory')"),
        ("def score(:", "SyntaxError('invalid syntax', ('{name}', 1, 11, 'def score(:', 1, 12))"),
        ("import sys; sys.exit(0)", "SystemExit(0)"),
        ("quit()", "SystemExit(None)"),
        ("import no_such_module", "ModuleNotFoundError(\"No module named 'no_such_module'\")"),
        ("1 / 0", "ZeroDivisionError('division by zero')"),
        (
            "def other(text): return 1.0",
            "AttributeError(\"'types.SimpleNamespace' object has no attribute 'score'\")",
        ),
        ("score = 1.0", "TypeError('score is no function')"),
        ("globals()[1] = 2", "TypeError('keywords must be strings')"),
    ],
)
def test_a_reward_that_cannot_be_loaded(refused, demo_model, tmp_path, request, text, error):
    name = f"reward_{abs(hash(text))}.py"  # Python remembers by name what kind of file it was
    if text is not None:
        (tmp_path / name).write_text(text)
    line = f"- REWARD is {name}:score: it can't be loaded: {error.replace('{name}', name)}"
    assert refused("--model-name", demo_model, "--reward", f"{name}:score") == [line]


# ------------------------------------------------------------------------------------------------------- OUTPUT_DIR
@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("file", "it can't be written (Not a directory)"),
        ("file/below", "it can't be written (Not a directory)"),
        ("/proc/trained_model", "it can't be written (No such file or directory)"),
        ("/proc/1/below/trained_model", "it can't be written (No such file or directory)"),
        ("a" * 300, "it can't be written (File name too long)"),
        ("\0", "it can't be written (embedded null byte)"),
        ("photos", "it holds files that are not a run's"),
        ("earlier", "it is or holds the current folder"),
        (".", "it is or holds the current folder"),
        ("..", "it is or holds the current folder"),
        ("copy", "MODEL_NAME is read from there"),
        ("copy/../copy", "MODEL_NAME is read from there"),
        ("link", "MODEL_NAME is read from there"),
        ("odd", "it can't be written (Is a directory)"),  # its lock is one
        ("dangling", "File exists"),
    ],
)
def test_an_output_that_cannot_be_used(
    refused, copy_of_demo_model, tmp_path, monkeypatch, output, problem
):
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (copy_of_demo_model / "metrics.jsonl").write_text("")  # the model was left by an earlier run
    (tmp_path / "link").symlink_to("copy")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    (tmp_path / "odd" / "checkpoint" / "lock").mkdir(parents=True)
    if output in (".", "..", "earlier"):
        (tmp_path / "metrics.jsonl").write_text("")
        (tmp_path / "earlier" / "below").mkdir(parents=True)
        (tmp_path / "earlier" / "metrics.jsonl").write_text("")
    model = copy_of_demo_model
    if output == "earlier":
        monkeypatch.chdir(tmp_path / "earlier" / "below")
        output = ".."
    elif not output.startswith("."):
        model = "copy"
    problems = refused("--model-name", model, "--output-dir", output)
    shown = train_rlhf.shorten(Path(output))
    assert f"- OUTPUT_DIR is {shown}: {problem}: name another folder" in problems


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_an_output_that_leads_to_itself(refused, tmp_path, flags):
    (tmp_path / "loop").symlink_to("loop")
    assert any(
        line.startswith("- OUTPUT_DIR is loop: ")
        for line in refused("--output-dir", "loop", *flags)
    )


def test_a_name_too_long_for_an_output_to_resume(refused):
    lines = refused("--output-dir", "a" * 300, "--resume")
    problem = "it can't be written (File name too long): name another folder"
    assert f"- OUTPUT_DIR is {'a' * 79}…: {problem}" in lines


@pytest.mark.parametrize("name", ["--prompts", "--positive-words", "--output-dir"])
def test_bytes_that_are_no_text(refused, demo_model, name):
    """Python gives "\\udcff" for a byte on the command line that is not UTF-8."""
    quick = ("--batch-size", 6, "--training-epochs", 1, "--eval-samples", 6)
    (line,) = refused("--model-name", demo_model, *quick, name, "\udcff")
    assert line.startswith(f"- {name.strip('-').upper().replace('-', '_')} ")


def test_an_end_token_that_is_no_number(refused, copy_of_demo_model):
    edit("generation_config.json", eos_token_id="x")(copy_of_demo_model)
    (line,) = refused("--model-name", "copy")
    assert line.startswith("- MODEL_NAME is copy: ")


def test_a_clip_range_that_float32_cannot_hold(refused, demo_model):
    (line,) = refused("--model-name", demo_model, "--clip-range", "1e300")
    assert line.startswith("- CLIP_RANGE is 1e+300: give ")


# ----------------------------------------------------------------------------------------------------------- RESUME
@pytest.fixture
def refused_resume(refused, demo_model, tmp_path, monkeypatch):
    """Call main with --resume beside a checkpoint of 18 steps, its entries changed or its file spoiled."""
    model = ["--model-name", str(demo_model)]
    monkeypatch.chdir(tmp_path)
    given = vars(train_rlhf.read_settings([*model, "--device", "cpu", "--training-epochs", "30"]))

    def call(*flags, tensors=(), data=None, **entries):
        folder = tmp_path / "trained_model" / "checkpoint"
        folder.mkdir()
        (folder / "lock").touch()
        state = {
            "settings": given,
            "model": str(demo_model.resolve()),
            "metrics": [{}] * 18,
        } | entries
        save_file(dict(tensors), folder / "state.safetensors", {"state": json.dumps(state)})
        if data is not None:
            (folder / "state.safetensors").write_bytes(data)
        return refused(*model, "--training-epochs", "30", "--resume", *flags)

    return call


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        row("SEED is 5, but 0 in the checkpoint: give that or start anew", "--seed", "5"),
        row("LORA_RANK is 8, but 16 in the checkpoint: give that or start anew", "--lora-rank", "8"),
        row("BATCH_SIZE is 5, but 10 in the checkpoint: give that or start anew", "--batch-size", "5"),
        row("REWARD is my.py:f, but positive_word_reward in the checkpoint: give that or start anew",
            "--reward", "my.py:f"),
        row("TRAINING_EPOCHS is 1, which takes 1 steps, but the checkpoint has 18: give more",
            "--training-epochs", "1"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_other_settings(refused_resume, flags, lines):
    assert refused_resume(*flags) == lines


def test_what_differs_is_named_before_the_number_of_steps_and_not_beside_other_problems(
    refused_resume,
):
    several = refused_resume("--batch-size", "50", "--seed", "5")
    assert [line.split()[1] for line in several] == ["BATCH_SIZE", "SEED"]


def test_a_prompt_file_that_is_missing_is_the_only_problem_of_a_resume(refused_resume):
    (line,) = refused_resume("--prompts", "none.txt")
    assert line.startswith("- PROMPTS: none.txt can't be read")


@pytest.mark.parametrize(
    ("spoiled", "error"),
    [
        ({"data": b""}, "SafetensorError('Error while deserializing header: header too small')"),
        (
            {"data": b"x" * 1000},
            "SafetensorError('Error while deserializing header: header too large')",
        ),
        ({"settings": []}, "TypeError(\"unsupported operand type(s) for |: 'list' and 'dict'\")"),
        ({"metrics": None}, "TypeError(\"object of type 'NoneType' has no len()\")"),
    ],
)
def test_a_checkpoint_that_is_broken(refused_resume, spoiled, error):
    broken = f"the checkpoint trained_model/checkpoint/state.safetensors is broken ({error})"
    assert refused_resume(**spoiled) == [f"- RESUME is True: {broken}: start without it"]


def test_a_checkpoint_that_lacks_a_weight(refused_resume):
    (line,) = refused_resume()
    start = "- RESUME is True: the checkpoint trained_model/checkpoint/state.safetensors is broken (KeyError('model."
    assert line.startswith(start) and line.endswith(": start without it")


# ------------------------------------------------------------------------------------------------ the whole program
def test_a_refusal_after_loading_everything_is_all_that_the_screen_shows(
    run_script, demo_model, tmp_path
):
    result = run_script(tmp_path, "--model-name", demo_model, "--lora-targets", "x_proj")
    assert (result.status, result.stdout) == (2, "")
    problem = "Target modules {'x_proj'} not found in the base model. Please check the target modules and try again."
    assert (
        result.stderr
        == f"Nothing was started or changed:\n- LORA_TARGETS is ['x_proj']: {problem}\n"
    )
    assert contents(tmp_path) == {}


values = strategies.one_of(
    strategies.text(max_size=8),
    strategies.integers().map(str),
    strategies.floats().map(str),
    strategies.sampled_from(
        ["", " ", "true", "none", "-", "--", "auto", "1e9", "0x10", "a" * 300, "/", ".", "~", "%"]
    ),
    strategies.sampled_from(
        ["\0", "\udcff", "x.txt", "x.jsonl", "a.py:f", "float16", "all-linear", "../x", "1_0"]
    ),
)
flags = strategies.sampled_from([*map(flag, CONSTANTS), "--help", "-h", "--no", "-x"])
arguments = strategies.one_of(
    flags,
    values,
    strategies.builds("{}={}".format, strategies.sampled_from([*map(flag, CONSTANTS)]), values),
)
pairs = strategies.lists(strategies.tuples(flags, values), max_size=4).map(
    lambda found: [*sum(found, ())]
)


@hypothesis_settings(max_examples=400, deadline=None)
@given(strategies.one_of(strategies.lists(arguments, max_size=6), pairs))
@example(["--resume"])
@example(["--output-dir", "a" * 300])
@example(["--model-name", "\0", "--output-dir", "\0", "--reward", "\0.py:f", "--resume"])
def test_no_arguments_end_in_anything_but_a_run_or_a_message(argv):
    ran, output, message = [], io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlhf, "run", lambda settings, stop: ran.append(settings))
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(message):
                status = train_rlhf.main(argv)
        except SystemExit as exit:
            assert exit.code == 0 and {"-h", "--help"} & set(argv)
            return
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    assert output.getvalue() == ""
    if status == 0:
        assert len(ran) == 1 and message.getvalue() == ""
        assert {name: type(value) for name, value in vars(ran[0]).items()} == {
            name.lower(): type(default) for name, (_, default, _) in CONSTANTS.items()
        }
    else:
        assert status == 2 and ran == []
        first, *lines = message.getvalue().split("\n- ")
        assert first == "Nothing was started or changed:" and lines
        assert not any("Traceback" in line or len(line) > 1000 for line in lines)


# -------------------------------------------------------------------------------------------- two runs in one folder
def test_a_second_run_in_the_folder_of_one_that_goes_on(
    start_script, call_main, demo_model, tmp_path, capfd
):
    endless = (
        "--model-name",
        demo_model,
        "--batch-size",
        4,
        "--save-every",
        1,
        "--training-epochs",
        100000,
    )
    short = ("--model-name", demo_model, "--device", "cpu", "--batch-size", 6, "--eval-samples", 6)
    lock, state = (
        tmp_path / "trained_model" / "checkpoint" / name for name in ("lock", "state.safetensors")
    )
    line = "OUTPUT_DIR is trained_model: another run is writing there: name another folder"
    refusal = ("", f"Nothing was started or changed:\n- {line}\n")
    first = start_script(tmp_path, *endless)
    try:
        deadline = time.monotonic() + 60
        while not (lock.exists() and state.exists()):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

        assert call_main(*short) == 2
        assert capfd.readouterr() == refusal
        assert call_main(*endless, "--device", "cpu", "--resume") == 2
        assert capfd.readouterr() == refusal
        settings = train_rlhf.read_settings(["--output-dir", "elsewhere"])
        settings.output_dir = (
            "trained_model"  # as if the first had started while the second one was loading
        )
        for settings.resume in (False, True):
            with pytest.raises(train_rlhf.SettingsError) as error:
                train_rlhf.prepare_output(settings)
            assert f"{error.value}\n" == refusal[1]

        steps = len((tmp_path / "trained_model" / "metrics.jsonl").read_text().splitlines())
        while (
            len((tmp_path / "trained_model" / "metrics.jsonl").read_text().splitlines()) < steps + 3
        ):
            assert first.poll() is None and time.monotonic() < deadline  # it goes on undisturbed
            time.sleep(0.05)
    finally:
        first.kill()
        _, message = first.communicate()
    assert (first.returncode, message) == (-signal.SIGKILL, "")
    assert {path.name for path in tmp_path.iterdir()} <= {"trained_model", "hf_home"}

    assert lock.exists()  # but the operating system has freed it
    assert call_main(*short, "--training-epochs", 1) == 0
    output, message = capfd.readouterr()
    assert (
        "The earlier run in trained_model/ was moved to trained_model-1/" in output
        and message == ""
    )
    assert (tmp_path / "trained_model-1" / "checkpoint" / "state.safetensors").exists()
