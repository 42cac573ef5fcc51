"""Bad inputs: whatever a user gives, main ends with status 2, the exact problem on stderr, and nothing changed."""

import contextlib
import hashlib
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, strategies
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train_rlhf

KINDS = {name: kind for kind, _, _, names in train_rlhf.RULES for name in names.split()}
RUN_FILES = ("metrics.jsonl", "report.json", "model.safetensors")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
    }


@pytest.fixture
def refused(call_main, tmp_path, capfd, monkeypatch):
    """Call main beside an earlier run; return its problems, after a look at whether everything is untouched."""
    for kind in (torch.cuda, torch.mps):
        monkeypatch.setattr(kind, "is_available", lambda: False)
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
WHOLE = "give a whole number from 1 to 1000000"
NOT_NEGATIVE = "give a number from 0 to 1e+30"
TEXTS = "give a list of texts, none empty"
TARGET = f"TARGET_APPROX_KL is {train_rlhf.TARGET_APPROX_KL}"
OR_AUTO = "give a number, or auto, from -1000000000000000 to 1000000000000000"


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        row("--colour is no flag, and follows none: --help lists all", "--colour"),
        # kind
        row(f"BATCH_SIZE is 2.5: {WHOLE}", "--batch-size", "2.5"),
        row(f"BATCH_SIZE is ten: {WHOLE}", "--batch-size", "ten"),
        row(f"BATCH_SIZE is empty: {WHOLE}", "--batch-size="),
        row("2 is no flag, and follows none: --help lists all", "--batch-size", "1", "2"),
        row("SEED is None: give a whole number from 0 to 4294967295", "--seed"),
        row(f"SEED is {'1' * 79}…: give a whole number from 0 to 4294967295", "--seed", "1" * 5000),
        row("LEARNING_RATE is abc: give a number from 1e-30 to 1e+30", "--learning-rate", "abc"),
        row("LEARNING_RATE is nan: give a number from 1e-30 to 1e+30", "--learning-rate", "nan"),
        row("LEARNING_RATE is inf: give a number from 1e-30 to 1e+30", "--learning-rate", "inf"),
        row("LEARNING_RATE is 1e300: give a number from 1e-30 to 1e+30", "--learning-rate", "1e300"),
        row("LEARNING_RATE is 1e-999: give a number from 1e-30 to 1e+30", "--learning-rate", "1e-999"),
        row("LEARNING_RATE is 0,1: give a number from 1e-30 to 1e+30", "--learning-rate", "0,1"),
        row("RESUME is maybe: give True or False", "--resume", "maybe"),
        row("RESUME is 1: give True or False", "--resume", "1"),
        row("SCORE_PREFIXES is empty: give True or False", "--score-prefixes="),
        row("MODEL_NAME is None: give a text", "--model-name"),
        row("b is no flag, and follows none: --help lists all", "--model-name", "a", "b"),
        row("OUTPUT_DIR is empty: give a text", "--output-dir", ""),
        row("REWARD is empty: give a text", "--reward="),
        row("REWARD_LABEL is empty: give a text", "--reward-label="),
        row("PROMPT_FIELD is None: give a text", "--prompt-field"),
        row("CHAT_TEMPLATE is chatml: give True or False", "--chat-template", "chatml"),
        row("SAVE_ADAPTER is maybe: give True or False", "--save-adapter", "maybe"),
        row("GRADIENT_CHECKPOINTING is some: give True or False", "--gradient-checkpointing", "some"),
        row(f"SUCCESS_THRESHOLD is high: {OR_AUTO}", "--success-threshold", "high"),
        row(f"SUCCESS_THRESHOLD is nan: {OR_AUTO}", "--success-threshold", "nan"),
        row(f"SUCCESS_THRESHOLD is 1e16: {OR_AUTO}", "--success-threshold", "1e16"),
        # range
        row(f"BATCH_SIZE is 0: {WHOLE}", "--batch-size", "0"),
        row(f"BATCH_SIZE is -3: {WHOLE}", "--batch-size", "-3"),
        row(f"BATCH_SIZE is 1000001: {WHOLE}", "--batch-size", "1000001"),
        row(f"LORA_RANK is 0: {WHOLE}", "--lora-rank", "0"),
        row(f"LORA_ALPHA is 0: {WHOLE}", "--lora-alpha", "0"),
        row("TRAINING_EPOCHS is 0: give a number from 1e-06 to 1000000", "--training-epochs", "0"),
        row("TRAINING_EPOCHS is -0.1: give a number from 1e-06 to 1000000", "--training-epochs", "-0.1"),
        row(f"MAX_NEW_TOKENS is 0: {WHOLE}", "--max-new-tokens", "0"),
        row(f"PPO_EPOCHS is 0: {WHOLE}", "--ppo-epochs", "0"),
        row(f"EVAL_SAMPLES is 0: {WHOLE}", "--eval-samples", "0"),
        row(f"EVAL_BATCH_SIZE is 0: {WHOLE}", "--eval-batch-size", "0"),
        row(f"LOG_EVERY is 0: {WHOLE}", "--log-every", "0"),
        row("SAVE_EVERY is -1: give a whole number from 0 to 1000000", "--save-every", "-1"),
        row("MINI_BATCH_SIZE is -1: give a whole number from 0 to 1000000", "--mini-batch-size", "-1"),
        row("SCALE_SAMPLES is -1: give a whole number from 0 to 1000000", "--scale-samples", "-1"),
        row("SEED is -1: give a whole number from 0 to 4294967295", "--seed", "-1"),
        row("SEED is 4294967296: give a whole number from 0 to 4294967295", "--seed", "4294967296"),
        row("LEARNING_RATE is -1: give a number from 1e-30 to 1e+30", "--learning-rate", "-1"),
        row("LEARNING_RATE is 0: give a number from 1e-30 to 1e+30", "--learning-rate", "0"),
        row("CLIP_RANGE is 0: give a number from 1e-06 to 1000", "--clip-range", "0"),
        row("CLIP_RANGE is 1e300: give a number from 1e-06 to 1000", "--clip-range", "1e300"),
        row("VALUE_CLIP_RANGE is -0.2: give a number from 1e-06 to 1000", "--value-clip-range", "-0.2"),
        row("TEMPERATURE is 0: give a number from 0.01 to 100", "--temperature", "0"),
        row("TEMPERATURE is 101: give a number from 0.01 to 100", "--temperature", "101"),
        row(f"TARGET_APPROX_KL is -1: {NOT_NEGATIVE}", "--target-approx-kl", "-1"),
        row(f"KL_COEF is -0.1: {NOT_NEGATIVE}", "--kl-coef", "-0.1"),
        row(f"VF_COEF is -0.1: {NOT_NEGATIVE}", "--vf-coef", "-0.1"),
        row(f"MAX_GRAD_NORM is -1: {NOT_NEGATIVE}", "--max-grad-norm", "-1"),
        row("GAMMA is 2: give a number from 0 to 1", "--gamma", "2"),
        row("LAM is -0.1: give a number from 0 to 1", "--lam", "-0.1"),
        row(f"PROMPTS is ['I', ' ']: {TEXTS}", "--prompts", "I", " "),
        row(f"PROMPTS is []: {TEXTS}", "--prompts"),
        row(f"EVAL_PROMPTS is ['I', '']: {TEXTS}", "--eval-prompts", "I", ""),
        row(f"POSITIVE_WORDS is []: {TEXTS}", "--positive-words"),
        row(f"LORA_TARGETS is []: {TEXTS}", "--lora-targets"),
        row("QUANTIZATION is 2bit: give none, 8bit or 4bit", "--quantization", "2bit"),
        row("DTYPE is int8: give auto, float32, bfloat16 or float16", "--dtype", "int8"),
        row("DEVICE is tpu: give auto, cpu, cuda or mps", "--device", "tpu"),
        row("REPORT_TO is x: give any of tensorboard, wandb and trackio", "--report-to", "wandb", "x"),
        # combinations
        row("MINI_BATCH_SIZE is 2: give 0 or a divisor of BATCH_SIZE, 7",
            "--batch-size", "7", "--mini-batch-size", "2"),
        row("MINI_BATCH_SIZE is 20: give 0 or a divisor of BATCH_SIZE, 10", "--mini-batch-size", "20"),
        row(f"{TARGET}: give 0, for a single update of a step can't be measured",
            "--ppo-epochs", "1"),
        row(f"{TARGET}: give 0, for a single update of a step can't be measured",
            "--ppo-epochs", "1", "--mini-batch-size", "10"),
        row("DTYPE is float16: give float32 or bfloat16 on a CPU", "--dtype", "float16"),
        row("DTYPE is float16: give float32 or bfloat16 on a CPU", "--dtype", "float16", "--device", "auto"),
        row("DEVICE is cuda: give cpu, since PyTorch sees no such GPU", "--device", "cuda"),
        row("DEVICE is mps: give cpu, since PyTorch sees no such GPU", "--device", "mps"),
        row("DEVICE is mps: give cpu, since PyTorch sees no such GPU", "--device", "mps", "--dtype", "float16"),
        # places
        row("RESUME is True: it can't be used (there is no checkpoint in trained_model): start without it",
            "--resume"),
        row("RESUME is True: it can't be used (there is no checkpoint in new): start without it",
            "--resume", "--output-dir", "new"),
    ],
)  # fmt: skip
def test_a_bad_setting(refused, flags, lines):
    assert refused(*flags) == lines


def test_every_constant_has_a_bad_value_in_that_table():
    (table,) = (
        mark.args[1] for mark in test_a_bad_setting.pytestmark if mark.name == "parametrize"
    )
    named = {parameters.values[1][0].removeprefix("- ").split()[0] for parameters in table}
    assert set(KINDS) - named == set()


def test_all_problems_are_reported_at_once(refused):
    flags = (
        "--batch-size 0 --learning-rate abc --colour red --gamma 2 --device cuda --prompts x.txt"
    )
    assert sorted(line.split(" can't")[0] for line in refused(*flags.split())) == [
        "- --colour is no flag, and follows none: --help lists all",
        f"- BATCH_SIZE is 0: {WHOLE}",
        "- DEVICE is cuda: give cpu, since PyTorch sees no such GPU",
        "- GAMMA is 2: give a number from 0 to 1",
        "- LEARNING_RATE is abc: give a number from 1e-30 to 1e+30",
        "- PROMPTS is x.txt: it",
        "- red is no flag, and follows none: --help lists all",
    ]


def test_a_long_value_or_one_of_several_lines_is_shortened(refused):
    remedy = "give none, 8bit or 4bit"
    assert refused("--quantization", "x" * 1000) == [f"- QUANTIZATION is {'x' * 79}…: {remedy}"]
    assert refused("--quantization", "a\nb\nc") == [f"- QUANTIZATION is a…: {remedy}"]


@pytest.mark.parametrize("argument", ["--no-resume=3", "--help=3", "--"])
def test_what_argparse_would_refuse_itself_is_refused_alike(refused, argument):
    (line,) = refused(argument)
    assert line.startswith("- ") and len(line) < 200


def test_a_value_or_a_flag_of_thousands_of_characters_makes_no_long_message(refused):
    long = "x" * 5000
    lines = refused(f"--{long}", long, "--dtype", long, "--prompts", f"{long}.txt")
    assert len(lines) == 4 and all(len(line) < 400 for line in lines)


def test_tensorboard_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr(train_rlhf.importlib.util, "find_spec", lambda name: None)
    assert refused("--report-to", "tensorboard") == [
        "- REPORT_TO is tensorboard: leave it out, or pip install tensorboard"
    ]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--batch-size", "2"], "BATCH_SIZE is 2"),
        (["--batch-size", "2", "--mini-batch-size", "2"], "MINI_BATCH_SIZE is 2"),
        (["--batch-size", "4", "--mini-batch-size", "2"], "MINI_BATCH_SIZE is 2"),
        (["--batch-size", "4"], None),
        (["--batch-size", "3"], None),
        (["--batch-size", "6", "--mini-batch-size", "3"], None),
    ],
)
def test_batches_with_fewer_responses_than_there_are_processes(
    refused, monkeypatch, flags, problem
):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as a launcher sets it
    other = "- GAMMA is 2: give a number from 0 to 1"
    lines = [f"- {problem}: give at least 3, a response for each process"] if problem else []
    assert refused(*flags, "--gamma", "2") == [other, *lines]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert refused(*flags, "--gamma", "2") == [other]


@pytest.mark.parametrize(
    ("device", "dtype", "tiles", "expected"),
    [
        ("auto", "auto", True, ("cpu", "bfloat16")),
        ("cpu", "auto", True, ("cpu", "bfloat16")),
        ("cpu", "auto", False, ("cpu", "float32")),
        ("cpu", "float32", True, ("cpu", "float32")),
        ("cpu", "bfloat16", False, ("cpu", "bfloat16")),
        ("mps", "auto", True, ("mps", "float32")),
        ("mps", "bfloat16", False, ("mps", "bfloat16")),
    ],
)
def test_a_processor_with_matrix_units_gets_16_bits(monkeypatch, device, dtype, tiles, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert train_rlhf.pick_device(device, dtype) == expected


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_gets_the_16_bits_that_it_has(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not has)
    for device in ("auto", "cuda"):
        assert train_rlhf.pick_device(device, "auto") == ("cuda", expected)
        assert train_rlhf.pick_device(device, "float32") == ("cuda", "float32")
    assert train_rlhf.pick_device("cpu", "float32") == ("cpu", "float32")


def test_a_huge_batch_size_is_no_long_calculation(refused):
    start = time.perf_counter()
    refused("--batch-size", "1000000", "--mini-batch-size", "3")
    assert time.perf_counter() - start < 1


# ------------------------------------------------------------------------------------- settings: the model has a say
@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        row("MAX_NEW_TOKENS is 256, too many for every prompt, such as 'This makes me', 4 tokens: "
            "give less, or shorter prompts; the model's context is 256",
            "--max-new-tokens", "256", "--prompts", "This makes me"),
        row(f"MAX_NEW_TOKENS is 10, too many for every prompt, such as '{'very ' * 15}very…', 301 tokens: "
            "give less, or shorter prompts; the model's context is 256", "--prompts", ("very " * 300).strip()),
        row("MAX_NEW_TOKENS is 254, too many for every prompt, such as 'My day', 3 tokens: "
            "give less, or shorter prompts; the model's context is 256",
            "--max-new-tokens", "254", "--prompts", "I", "--eval-prompts", "My day"),
    ],
)  # fmt: skip
def test_prompts_none_of_which_leaves_room_in_the_context(refused, demo_model, flags, lines):
    assert refused("--model-name", demo_model, *flags) == lines


@pytest.mark.parametrize("prompts", ["texts", "conversations"])
def test_a_model_without_a_chat_template(refused, demo_model, tmp_path, prompts):
    turns = [{"role": "user", "content": "Hi"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns}))
    flags = ["--chat-template"] if prompts == "texts" else ["--prompts", "p.jsonl"]
    (line,) = refused("--model-name", demo_model, *flags)
    assert line.startswith(f"- CHAT_TEMPLATE is {prompts == 'texts'}: it can't be used (")
    remedy = "name a model with a chat template that takes these prompts, or give texts and False"
    assert line.endswith(f"): {remedy}")


@pytest.mark.parametrize(
    "targets",
    [
        ["x_proj"],
        ["mlp"],
        ["lm_head"],  # which is tied to the embedding
        ["q_proj", "x_proj"],  # PEFT would leave out what it does not know
        ["q_proj", "all-linear"],  # which stands alone
        ["q_proj", "o"],  # a piece of a layer's name
    ],
)
def test_a_layer_that_cannot_be_adapted(refused, demo_model, targets):
    short = ("--training-epochs", "0.001", "--eval-samples", "1")  # were it not refused
    (line,) = refused("--model-name", demo_model, "--lora-targets", *targets, *short)
    assert line.startswith(f"- LORA_TARGETS is {targets}: it can't be used (")
    assert line.endswith("): name linear layers of this model, or all-linear")
    assert len(line) < 400


def edit(name, **entries):
    def spoil(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))

    return spoil


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


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        # None: the reason is in the words of a library.
        pytest.param(empty, None, id="no files"),
        pytest.param(remove("config.json"), None, id="no config"),
        pytest.param(write("config.json", ""), None, id="empty config"),
        pytest.param(write("config.json", "{ broken"), None, id="broken config"),
        pytest.param(write("config.json", "[]"), None, id="list as config"),
        pytest.param(write("config.json", '{"model_type": "no_such_kind"}'), None, id="unknown"),
        pytest.param(write("config.json", '{"model_type": "vit"}'), None, id="vit"),
        pytest.param(edit("config.json", model_type="t5"), None, id="t5"),
        pytest.param(edit("config.json", intermediate_size=100), None, id="config of another width"),
        pytest.param(edit("config.json", hidden_size="x"), None, id="size"),
        pytest.param(edit("config.json", max_position_embeddings="x"), None, id="context"),
        pytest.param(edit("config.json", rope_parameters={"rope_type": "nope"}), None, id="positions"),
        pytest.param(edit("config.json", quantization_config=[]), None, id="config with odd quantization"),
        pytest.param(write("generation_config.json", "[]"), None, id="generation config"),
        pytest.param(write("adapter_config.json", "{ x"), None, id="broken adapter"),
        pytest.param(remove("tokenizer.json", "tokenizer_config.json"), None, id="no tokenizer"),
        pytest.param(write("tokenizer.json", "{}"), None, id="empty tokenizer"),
        pytest.param(write("tokenizer_config.json", "{ x"), None, id="broken tokenizer config"),
        pytest.param(edit("tokenizer_config.json", eos_token=None), "its tokenizer has no end token", id="no end"),
        pytest.param(remove("model.safetensors"), None, id="no weights"),
        pytest.param(weights_are_pickled, None, id="pickled weights"),
        pytest.param(weights_are_cut_off, None, id="weights cut off"),
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
    remedy = "name a language model with config.json, *.safetensors and a tokenizer"
    (line,) = refused("--model-name", "copy")
    start, end = "- MODEL_NAME is copy: it can't be used (", f"): {remedy}"
    assert line.startswith(start) and line.endswith(end)
    told = line.removeprefix(start).removesuffix(end)
    assert 0 < len(told) <= 200
    assert reason is None or told == reason


def test_code_in_a_model_folder_is_never_run(refused, copy_of_demo_model, tmp_path, monkeypatch):
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit("config.json", model_type="mine", auto_map=own)(copy_of_demo_model)
    (copy_of_demo_model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers may ask
    (line,) = refused("--model-name", "copy")
    assert line.startswith("- MODEL_NAME is copy: it can't be used (")
    assert not (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------------------- REWARD
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "[Errno 2] No such file or directory"),
        ("def score(:", "invalid syntax"),
        ("import sys; sys.exit(0)", "SystemExit(0)"),
        ("quit()", "SystemExit(None)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "division by zero"),
        ("def other(prompts, completions): return 1.0", "it has no function score"),
        ("score = 1.0", "it has no function score"),
        ("globals()[1] = 2", "it has no function score"),
        ("from pathlib import no_such_name as score", "cannot import name 'no_such_name'"),
    ],
)
def test_a_reward_that_cannot_be_loaded(refused, demo_model, tmp_path, text, reason):
    if text is not None:
        (tmp_path / "my.py").write_text(text)
    (line,) = refused("--model-name", demo_model, "--reward", "my.py:score")
    assert line.startswith(f"- REWARD is my.py:score: it can't be used ({reason}")
    assert line.endswith("): give FILE.py:FUNCTION")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("trained_model", "name a sequence classifier, or give positive_word_reward or FILE.py:FUNCTION"),
        ("a.py", "give FILE.py:FUNCTION"),
        ("trained_model.py:score", "give FILE.py:FUNCTION"),
        (f"{'a' * 300}.py:score", "give FILE.py:FUNCTION"),
        ("read_prompts", "let f(prompts, completions, **kwargs) return a finite number for each completion"),
    ],
)  # fmt: skip
def test_a_reward_that_names_neither_a_function_nor_a_classifier(refused, demo_model, name, remedy):
    (line,) = refused("--model-name", demo_model, "--reward", name)
    assert line.startswith(f"- REWARD is {train_rlhf.shorten(name)}: ")
    assert line.endswith(f": {remedy}")


@pytest.mark.parametrize(
    "name", ["./no_such_model", "/no/such/model", "~/no_such_model", "trained_model/report.json"]
)
def test_a_model_that_is_not_there(refused, name):
    (line,) = refused("--model-name", name, "--output-dir", "new")
    assert line.startswith(f"- MODEL_NAME is {name}: there is no such folder, ")
    assert line.endswith("; offline there is demo_model")


@pytest.mark.parametrize("name", ["my_reward", "./my_reward", "trained_model:score"])
def test_a_reward_that_is_not_there(refused, demo_model, name):
    (line,) = refused("--model-name", demo_model, "--reward", name)
    assert line.startswith(f"- REWARD is {name}: there is no such folder, ")
    assert line.endswith("; offline there is demo_model")


@pytest.mark.parametrize(
    ("flag", "name", "found", "remedy"),
    [
        ("--reward", "copy", "LlamaForCausalLM", "name a sequence classifier"),
        ("--model-name", "judge", "LlamaForSequenceClassification", "name a language model"),
    ],
)
def test_a_model_of_the_other_kind(
    refused, copy_of_demo_model, tmp_path, flag, name, found, remedy
):
    """A language model is no reward, and a classifier no policy: its head would be random numbers."""
    judge = AutoModelForSequenceClassification.from_pretrained(copy_of_demo_model, num_labels=1)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(copy_of_demo_model).save_pretrained(tmp_path / "judge")
    setting = {"--reward": "REWARD", "--model-name": "MODEL_NAME"}[flag]
    (line,) = refused("--model-name", "copy", flag, name)
    start = f"- {setting} is {name}: it can't be used (it is a {found}): {remedy}"
    assert line.startswith(start)


@pytest.mark.parametrize(
    ("returned", "problem", "line"),
    [
        ("[text[1000] for text in completions]", "IndexError('string index out of range')", 2),
        ("quit()", "SystemExit(None)", 2),
        # What it returns is at fault, so the line is that of the function.
        ("None", "TypeError(", 1),
        ("1.0", "TypeError(", 1),
        ("[1.0] * 5", "ValueError(", 1),
        ("[None] * len(completions)", "TypeError(", 1),
        ("['good'] * len(completions)", "ValueError(", 1),
        ("['1'] * len(completions)", "ValueError(", 1),
        ("[[1.0, 2.0]] * len(completions)", "TypeError(", 1),
        ("[float('nan')] * len(completions)", "ValueError('[nan] has what is not finite or too large')", 1),
        ("[1e15] * len(completions)", "ValueError('[1000000000000000.0] has what is not finite or too large')", 1),
    ],
)  # fmt: skip
def test_a_reward_that_gives_no_numbers(refused, demo_model, tmp_path, returned, problem, line):
    """It is asked about two texts, before anything else is loaded."""
    (tmp_path / "my.py").write_text(f"def score(prompts, completions, **_):\n    return {returned}")
    (message,) = refused("--model-name", demo_model, "--reward", "my.py:score")
    assert message.startswith(f"- REWARD is score: {problem}")
    remedy = "let f(prompts, completions, **kwargs) return a finite number for each completion"
    assert message.endswith(f" for '' in my.py, line {line}: {remedy}")


def test_a_reward_that_returns_another_count_is_told_so(refused, demo_model, tmp_path):
    """Of one text it would be right, so no single text is to blame."""
    (tmp_path / "my.py").write_text("def score(prompts, completions, **_):\n    return [1.0]")
    (line,) = refused("--model-name", demo_model, "--reward", "my.py:score")
    assert line.startswith("- REWARD is score: ValueError('it returned [1.0] for 2 texts') for ")


# ------------------------------------------------------------------------------------------------------- OUTPUT_DIR
@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("file", "[Errno 20] Not a directory: '{folder}/file'"),
        ("file/below", "{folder}/file can't be written"),
        ("/proc/1/below/trained_model", "/proc/1 can't be written"),
        ("a" * 300, "[Errno 36] File name too long: '{folder}/{output}'"),
        ("photos", "it holds files that are not a run's"),
        ("~/run", "~ is no folder here"),
        ("earlier", "the current folder or the model is in it"),
        (".", "the current folder or the model is in it"),
        ("..", "it holds files that are not a run's"),
        ("copy", "the current folder or the model is in it"),
        ("copy/../copy", "the current folder or the model is in it"),
        ("link", "the current folder or the model is in it"),
        ("odd", None),  # its lock is a folder, which is found where it is claimed
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
    told = "Is a directory"
    if problem:
        reason = train_rlhf.shorten(problem.format(folder=tmp_path, output=output), 200)
        told = f"it can't be used ({reason})"
    assert refused("--model-name", model, "--output-dir", output) == [
        f"- OUTPUT_DIR is {train_rlhf.shorten(output)}: {told}: name another folder"
    ]


def test_an_output_that_only_turns_out_to_be_no_place_when_it_is_claimed(refused, demo_model):
    """The superuser may write in /proc, it seems, until he tries."""
    (line,) = refused("--model-name", demo_model, "--output-dir", "/proc/trained_model")
    assert line.startswith("- OUTPUT_DIR is /proc/trained_model: ")
    assert line.endswith(": name another folder")


def test_an_output_that_is_a_link_to_what_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("not/there/yet")
    train_rlhf.check_output("model", "link")
    with train_rlhf.claim_output("link", False):
        assert (tmp_path / "not" / "there" / "yet" / "checkpoint" / "lock").exists()


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_an_output_that_leads_to_itself(refused, tmp_path, flags):
    (tmp_path / "loop").symlink_to("loop")
    assert any(
        line.startswith("- OUTPUT_DIR is loop: ")
        for line in refused("--output-dir", "loop", *flags)
    )


def test_a_name_too_long_for_an_output_to_resume(refused):
    lines = refused("--output-dir", "a" * 300, "--resume")
    problem = "it can't be used ([Errno 36] File name too long: "
    assert any(line.startswith(f"- OUTPUT_DIR is {'a' * 79}…: {problem}") for line in lines)


@pytest.mark.parametrize("name", ["PROMPTS", "POSITIVE_WORDS", "OUTPUT_DIR", "MODEL_NAME", "SEED"])
@pytest.mark.parametrize("text", ["\udcff", "\0"])
def test_bytes_that_are_no_text(refused, name, text):
    """Python gives "\\udcff" for a byte on the command line that is not UTF-8."""
    (line,) = refused(train_rlhf.flag_of(name), text)
    assert line.startswith(f"- {name} is ")


# ----------------------------------------------------------------------------------------------------------- RESUME
@pytest.fixture
def refused_resume(refused, read_settings, demo_model, tmp_path, monkeypatch):
    """Call main with --resume beside a checkpoint of 18 steps, its entries changed or its file spoiled."""
    model = ["--model-name", str(demo_model)]
    monkeypatch.chdir(tmp_path)
    given = vars(read_settings(*model, "--device", "cpu", "--training-epochs", "30"))

    def call(*flags, data=None, **entries):
        folder = tmp_path / "trained_model" / "checkpoint"
        folder.mkdir()
        (folder / "lock").touch()
        state = {
            "settings": given,
            "metrics": [{}] * 18,
            "weights": {},
            "optimizer": {},
            "scaler": None,
            "scale": {"mean": 0.0, "deviation": 1.0, "threshold": 0.0},
            "files": {},
        } | entries
        torch.save(state, folder / "state.pt")
        if data is not None:
            (folder / "state.pt").write_bytes(data)
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
    assert line.startswith("- PROMPTS is none.txt: it can't be used (")


class RunsCode:
    """What a pickle can do to whoever loads it: make a folder, here."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param({"data": b""}, id="empty"),
        pytest.param({"data": b"x" * 1000}, id="no checkpoint"),
        pytest.param({"data": b"PK\x03\x04" + b"x" * 1000}, id="broken archive"),
        pytest.param({"settings": []}, id="settings"),
        pytest.param({"metrics": None}, id="metrics"),
        pytest.param({"metrics": RunsCode()}, id="code"),
        pytest.param({"weights": {}}, id="no weights"),  # found when the model is there
    ],
)
def test_a_checkpoint_that_is_broken(refused_resume, spoiled):
    (line,) = refused_resume(**spoiled)
    assert line.startswith("- RESUME is True: it can't be used (")
    assert line.endswith("): start without it")
    assert len(line) < 300


# ------------------------------------------------------------------------------------------------ the whole program
def test_a_refusal_after_loading_everything_is_all_that_the_screen_shows(
    run_script, demo_model, tmp_path
):
    flags = ("--model-name", demo_model, "--lora-targets", "x_proj")
    result = run_script(tmp_path, *flags, COLUMNS="10000")
    assert (result.status, result.stdout) == (2, "")
    first, line = result.stderr.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith("- LORA_TARGETS is ['x_proj']: ")
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
names = [*map(train_rlhf.flag_of, KINDS), "--no-resume", "--no-score-prefixes"]
flags = strategies.sampled_from([*names, "--help", "-h", "--no", "--lr", "-x"])
arguments = strategies.one_of(
    flags,
    values,
    strategies.builds("{}={}".format, strategies.sampled_from(names), values),
)
pairs = strategies.lists(strategies.tuples(flags, values), max_size=4).map(
    lambda found: [*sum(found, ())]
)
TYPES = {kind: (str,) for kind in KINDS.values()} | {
    "a whole number": (int,),
    "a number": (float,),
    "a number, or auto,": (float, str),
    "True or False": (bool,),
    "a list of texts, none empty": (list,),
    "a list of texts, tensorboard, wandb or trackio": (list,),
}


@hypothesis_settings(max_examples=400, deadline=None)
@given(strategies.one_of(strategies.lists(arguments, max_size=6), pairs))
@example(["--resume"])
@example(["--output-dir", "a" * 300])
@example(["--model-name", "\0", "--output-dir", "\0", "--reward", "\0.py:f", "--resume"])
@example(["--no-resume=x", "--lr=", "--"])
def test_no_arguments_end_in_anything_but_a_run_or_a_message(tmp_path_factory, argv):
    ran, output, message = [], io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setenv("COLUMNS", "10000")
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
        assert len(ran) == 1 and message.getvalue() == ""
        assert vars(ran[0]).keys() == {name.lower() for name in KINDS}
        for name, kind in KINDS.items():
            assert type(getattr(ran[0], name.lower())) in TYPES[kind]
        assert all(type(text) is str for text in ran[0].prompts + ran[0].positive_words)
    else:
        assert status == 2 and ran == []
        first, *lines = message.getvalue().split("\n- ")
        assert first == "Nothing was started or changed:" and lines
        assert not any("Traceback" in line or len(line) > 400 for line in lines)


# -------------------------------------------------------------------------------------------- two runs in one folder
def test_a_second_run_in_the_folder_of_one_that_goes_on(
    start_script, call_main, demo_model, tmp_path, capfd
):
    fast = ("--model-name", demo_model, "--ppo-epochs", 1, "--target-approx-kl", 0)
    endless = (*fast, "--batch-size", 4, "--save-every", 1, "--training-epochs", 100000)
    short = (*fast, "--device", "cpu", "--batch-size", 6, "--eval-samples", 6)
    run = tmp_path / "trained_model"
    lock, state = run / "checkpoint" / "lock", run / "checkpoint" / "state.pt"
    line = "OUTPUT_DIR is trained_model: another run is writing there: name another folder"
    refusal = ("", f"Nothing was started or changed:\n- {line}\n")

    def count_steps():
        return len((run / "metrics.jsonl").read_text().splitlines())

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

        steps = count_steps()
        while count_steps() < steps + 3:
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
    assert message == ""
    assert "The earlier run in trained_model/ was moved to trained_model-1/" in output
    assert (tmp_path / "trained_model-1" / "checkpoint" / "state.pt").exists()
