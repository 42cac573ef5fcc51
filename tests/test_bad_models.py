"""Models that can't be used: one line names setting, folder and reason, and nothing is touched."""

import json

import pytest
import torch
from helpers import digests, refusals
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune.errors import SettingsError, shorten
from finetune.hub import find_model

SHORT = ("--training-epochs", "0.001", "--eval-samples", "1")  # were it not refused
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def refused(call_main, tmp_path, capfd):
    """Call main beside an earlier run; return its one problem, after a look at all files."""
    (tmp_path / "trained_model").mkdir()
    for name in ("metrics.jsonl", "report.json", "model.safetensors"):
        (tmp_path / "trained_model" / name).write_text(name)

    def call(*flags):
        before = digests(tmp_path), sorted(tmp_path.rglob("*"))
        status = call_main("--device", "cpu", *flags)
        output, message = capfd.readouterr()
        (problem,) = refusals(status, message)
        assert output == "" and message.endswith("\n")
        assert (digests(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return problem

    return call


# ------------------------------------------------------------------------------------ its files
def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def edit(name, **entries):
    def spoil(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | entries))

    return spoil


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def weights_are_pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def weights_are_cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def change_weights(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return spoil


SPOILS = {
    "no files": empty,
    "no config": remove("config.json"),
    "empty config": write("config.json", ""),
    "broken config": write("config.json", "{ broken"),
    "list as config": write("config.json", "[]"),
    "unknown": write("config.json", '{"model_type": "no_such_kind"}'),
    "vit": write("config.json", '{"model_type": "vit"}'),
    "t5": edit("config.json", model_type="t5"),
    "another width": edit("config.json", intermediate_size=100),
    "size": edit("config.json", hidden_size="x"),
    "context": edit("config.json", max_position_embeddings="x"),
    "positions": edit("config.json", rope_parameters={"rope_type": "nope"}),
    "odd quantization": edit("config.json", quantization_config=[]),
    "generation config": write("generation_config.json", "[]"),
    "broken adapter": write("adapter_config.json", "{ x"),
    "no tokenizer": remove("tokenizer.json", "tokenizer_config.json"),
    "empty tokenizer": write("tokenizer.json", "{}"),
    "broken tokenizer": write("tokenizer_config.json", "{ x"),
    "no end": edit("tokenizer_config.json", eos_token=None),
    "no weights": remove("model.safetensors"),
    "pickled weights": weights_are_pickled,
    "weights cut off": weights_are_cut_off,
    "a tensor missing": change_weights(lambda tensors: tensors.pop(WEIGHT)),
    "NaN": change_weights(lambda tensors: tensors[WEIGHT].fill_(torch.nan)),
    "infinity": change_weights(lambda tensors: tensors[WEIGHT][0].fill_(-torch.inf)),
}
REASONS = {  # of the others it is in the words of a library
    "no end": "its tokenizer has no end token",
    "a tensor missing": f"it lacks weights such as {WEIGHT}",
    "NaN": f"it has weights that are not finite, such as {WEIGHT}",
    "infinity": f"it has weights that are not finite, such as {WEIGHT}",
}


@pytest.mark.parametrize("fault", SPOILS)
def test_a_model_that_cannot_be_loaded(refused, copy_of_demo_model, fault):
    SPOILS[fault](copy_of_demo_model)
    problem = refused("--model-name", "copy", *SHORT)
    start = "MODEL_NAME is copy: it can't be used ("
    end = "): name a language model with config.json, *.safetensors and a tokenizer"
    assert problem.startswith(start) and problem.endswith(end)
    reason = problem.removeprefix(start).removesuffix(end)
    assert 0 < len(reason) <= 200
    assert reason == REASONS.get(fault, reason)


def test_code_in_a_model_folder_is_never_run(refused, copy_of_demo_model, tmp_path, monkeypatch):
    own = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit("config.json", model_type="mine", auto_map=own)(copy_of_demo_model)
    (copy_of_demo_model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers may ask
    problem = refused("--model-name", "copy")
    assert problem.startswith("MODEL_NAME is copy: it can't be used (")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------- of another kind
def test_a_model_of_the_other_kind(refused, copy_of_demo_model, tmp_path):
    """A language model is no reward, nor a classifier a policy: its head would be random."""
    judge = AutoModelForSequenceClassification.from_pretrained(copy_of_demo_model, num_labels=1)
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(copy_of_demo_model).save_pretrained(tmp_path / "judge")
    reason = "it can't be used (it is a LlamaForSequenceClassification): name a language model"
    problem = refused("--model-name", "judge")
    assert problem.startswith(f"MODEL_NAME is judge: {reason}")
    reason = "it can't be used (it is a LlamaForCausalLM): name a sequence classifier"
    problem = refused("--model-name", "copy", "--reward", "copy")
    assert problem.startswith(f"REWARD is copy: {reason}")


def test_a_folder_that_is_no_classifier(refused, demo_model):
    problem = refused("--model-name", demo_model, "--reward", "trained_model")
    assert problem.startswith("REWARD is trained_model: it can't be used (")
    remedy = "name a sequence classifier, or give positive_word_reward or FILE.py:FUNCTION"
    assert problem.endswith(f": {remedy}")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("MODEL_NAME", "./no_such_model"),
        ("MODEL_NAME", "/no/such/model"),
        ("MODEL_NAME", "~/no_such_model"),
        ("MODEL_NAME", __file__),
        ("REWARD", "trained_model:score"),
    ],
)
def test_a_model_that_is_not_there(setting, name):
    """None of these is a name on the Hub either."""
    with pytest.raises(SettingsError) as error:
        find_model(setting, name)
    (problem,) = error.value.args
    assert problem.startswith(f"{setting} is {shorten(name)}: there is no such folder, ")
    assert problem.endswith("; offline there is demo_model")


# ------------------------------------------------------------------------------------ its layers
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
    problem = refused("--model-name", demo_model, "--lora-targets", *targets, *SHORT)
    assert problem.startswith(f"LORA_TARGETS is {targets}: it can't be used (")
    assert problem.endswith("): name linear layers of this model, or all-linear")
    assert len(problem) < 400
