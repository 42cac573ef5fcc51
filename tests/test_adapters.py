"""Adapters: saved beside the model, loaded as others load them, and fine-tuned further."""

import json
import math
import os
import shutil
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from helpers import read_metrics, refusals
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    pipeline,
)

import train_reward_model
import train_rlhf
from finetune import evaluation
from finetune.heads import load_with_head, save_with_head
from finetune.hub import context_of, find_model
from finetune.models import add_adapter, load_base_model
from finetune.saving import save_model
from finetune.settings import read_settings as read_settings_of

FULL = bool(os.environ.get("CI_FULL"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORT = "--device cpu --dtype float32 --batch-size 4 --training-epochs 0.5 --lora-rank 3"
FAST = "--learning-rate 3e-2 --target-approx-kl 0 --max-new-tokens 4 --eval-samples 12"
FAST += " --reward reward.py:with_an_e --scale-samples 20"
NO_STEP = "--learning-rate 1e-20 --target-approx-kl 0 --ppo-epochs 1 --max-new-tokens 4"
NO_STEP += " --eval-samples 6"
REWARD = """
def with_an_e(prompts, completions, **others):
    return [float("e" in each) for each in completions]
"""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
RANK = 3
IDS = torch.arange(3, 13)[None]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Be in a folder of this file, with a Hub that is not to be asked and a cache of its own."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(evaluation, "draw", lambda *measured: measured[-1].touch())
        yield folder


@pytest.fixture(scope="module")
def into_cache(place):
    """Put a folder into the Hub's cache as a model of that name."""

    def put(name, folder):
        home = place / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)

    return put


@pytest.fixture(scope="module")
def base(place, demo_model, save_random_model, into_cache):
    """Return the folder of a tiny random model, which the cache has as some/model; and a reward."""
    (place / "reward.py").write_text(REWARD)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), initializer_range=0.3)
    folder = save_random_model(config, tokenizer, place / "base")
    into_cache("some/model", folder)
    return folder


@pytest.fixture(scope="module")
def do_run(place, base):
    """Do a run of PPO to its end; return its folder, its report and its metrics."""

    def run(output, model, flags):
        given = f"--output-dir {output} --model-name {model} {SHORT} {flags}"
        assert train_rlhf.main(given.split()) == 0
        report = json.loads((place / output / "report.json").read_text(encoding="utf-8"))
        metrics = read_metrics(place / output)
        return SimpleNamespace(folder=place / output, report=report, metrics=metrics)

    return run


@pytest.fixture(scope="module")
def ppo(do_run):
    """Fine-tune a model of the Hub."""
    return do_run("ppo", "some/model", FAST)


# --------------------------------------------------------------------------- saved, and loaded again
def test_the_adapter_on_its_base_is_the_trained_model(ppo, base):
    merged = logits_of(AutoModelForCausalLM.from_pretrained(ppo.folder))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert (logits_of(plain) - merged).abs().max() > 0.1
    adapter = ppo.folder / "adapter"
    for model in (
        PeftModel.from_pretrained(plain, adapter),
        AutoPeftModelForCausalLM.from_pretrained(adapter),
        pipeline("text-generation", str(adapter)).model,
    ):
        assert torch.allclose(logits_of(model), merged, atol=1e-4)
    lora = adapter_config(adapter)
    assert (lora["base_model_name_or_path"], lora["task_type"]) == ("some/model", "CAUSAL_LM")
    assert (lora["r"], lora["lora_alpha"]) == (RANK, train_rlhf.LORA_ALPHA)


def test_the_adapter_of_a_reward_model_scores_alike(base, tmp_path):
    names = vars(train_reward_model)
    flags = f"--model-name some/model --output-dir reward_model --lora-rank {RANK}".split()
    settings = read_settings_of(flags, names, train_reward_model.Settings, ())
    trained, tokenizer = load_with_head(settings, "cpu", "float32")
    torch.manual_seed(0)
    for weight in trained.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    scores = logits_of(trained)
    assert scores.abs().max() > 0.1
    save_with_head(trained, tokenizer, settings, tmp_path)
    adapter = tmp_path / "adapter"
    for model in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1),
    ):
        assert torch.allclose(logits_of(model), scores, atol=1e-4)
    lora = adapter_config(adapter)
    assert (lora["base_model_name_or_path"], lora["task_type"]) == ("some/model", "SEQ_CLS")


def test_the_adapter_is_as_small_as_its_rank(ppo, shared_model, make_settings):
    """Of TinyLlama it is 1.1 % of the values, 50.5 MB of float32 beside 2.2 or 4.4 GB."""
    config = AutoConfig.from_pretrained(shared_model("tinyllama-shape"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = model.num_parameters()
        adapted = add_adapter(model, make_settings("--lora-rank", "16"))
    trained, _ = adapted.get_nb_trainable_parameters()

    # Of each linear layer but the output head it has rank * (inputs + outputs) values.
    width, inner, of_keys = config.hidden_size, config.intermediate_size, config.hidden_size // 8
    attention = 2 * (width + width) + 2 * (width + of_keys)
    assert trained == 16 * config.num_hidden_layers * (attention + 3 * (width + inner))
    assert 4 * trained / 1e6 == pytest.approx(50.5, abs=0.05)
    assert 2 * total / 1e9 == pytest.approx(2.2, abs=0.05)

    # Only the names and shapes of the weights are in the file beside their values.
    path = ppo.folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    size = 4 * sum(weight.numel() for weight in weights.values())
    assert size < path.stat().st_size < size + 200 * len(weights)
    names = {path.name for path in path.parent.iterdir()}
    assert names == {"adapter_config.json", path.name, "tokenizer.json", "tokenizer_config.json"}


def test_without_save_adapter_there_is_the_model_alone(build, make_settings, base, tmp_path):
    built = build(make_settings("--model-name", str(base), "--no-save-adapter"))
    model = built.policy.pretrained_model
    save_model(model, built.tokenizer, built.settings, tmp_path / "output")
    assert (tmp_path / "output" / "model.safetensors").exists()
    assert not (tmp_path / "output" / "adapter").exists()


@pytest.mark.parametrize("bits", ["4bit", "8bit"][: 1 + FULL])
def test_the_adapter_of_a_quantized_run_is_for_the_quantized_base(
    build, step, make_settings, base, tmp_path, bits
):
    """That is what it was trained on."""
    flags = ["--model-name", str(base), "--quantization", bits, "--learning-rate", "0.01"]
    built = build(make_settings(*flags, "--dtype", "float32"))
    torch.manual_seed(0)
    for _ in range(2):
        step(built)
    policy = built.policy.pretrained_model
    trained = logits_of(policy)
    save_model(policy, built.tokenizer, built.settings, tmp_path)
    quantized = load_base_model(str(base), "cpu", "float32", bits)
    assert not torch.allclose(logits_of(quantized), trained, atol=0.1)
    adapted = PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    assert torch.allclose(logits_of(adapted), trained, atol=1e-4)


# ----------------------------------------------------------------------- an adapter as the base model
@pytest.fixture(scope="module")
def chain(do_run, ppo):
    """Go on from the adapter of a run, with another of its own."""
    return do_run("chain", ppo.folder / "adapter", FAST)


def test_a_run_begins_where_its_adapter_ended(chain, do_run, ppo):
    """It is the same to name the adapter of a run, or its merged model: the reference is that."""
    from_merged = do_run("merged", ppo.folder, FAST)
    for run in (chain, from_merged):
        assert abs(run.metrics[0]["kl"]) < 1e-4
        assert run.metrics[0]["samples"] == 4
    for part, figures in chain.report["base"].items():
        wanted = from_merged.report["base"][part]
        assert figures.pop("first_sample") == wanted.pop("first_sample")
        assert figures == pytest.approx(wanted, rel=1e-3)
    models = [AutoModelForCausalLM.from_pretrained(run.folder) for run in (chain, from_merged)]
    assert torch.allclose(*map(logits_of, models), atol=1e-3)
    assert not ModelCard.load(chain.folder / "README.md").data.base_model


@pytest.mark.parametrize("name", ["", "some/chain"], ids=["a folder", "the Hub"])
def test_an_adapter_on_an_adapter(chain, into_cache, ppo, name):
    """Both are merged in, each upon what it was trained on."""
    folder = str(chain.folder / "adapter")
    if name:
        into_cache(name, folder)
    path = find_model("MODEL_NAME", name or folder)
    logits = logits_of(load_base_model(path, "cpu", "float32", "none"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(chain.folder))
    assert torch.allclose(logits, merged, atol=1e-4)
    before = logits_of(AutoModelForCausalLM.from_pretrained(ppo.folder))
    assert (before - merged).abs().max() > 0.1
    assert context_of(path) == SIZES["max_position_embeddings"]


def test_an_adapter_of_the_hub_on_a_quantized_base(do_run, into_cache, ppo, capsys):
    """It is merged into the rounded weights, without a word of the libraries; that is the base.

    It is named as base_model in the card, and in the new adapter.
    """
    into_cache("some/adapter", ppo.folder / "adapter")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = do_run("quantized", "some/adapter", f"{NO_STEP} --quantization 4bit")
    assert "\n".join(str(warning.message) for warning in told) == ""
    assert capsys.readouterr().err == ""
    assert abs(run.metrics[0]["kl"]) < 1e-4
    assert run.report["trained"]["train_prompts"]["kl"] < 1e-4
    assert ModelCard.load(run.folder / "README.md").data.base_model == "some/adapter"
    assert adapter_config(run.folder / "adapter")["base_model_name_or_path"] == "some/adapter"


def test_an_adapter_that_is_not_finite_is_refused_in_a_line(ppo, tmp_path, capsys):
    adapter, output = tmp_path / "adapter", tmp_path / "trained"
    shutil.copytree(ppo.folder / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    save_file({name: each * math.nan for name, each in load_file(weights).items()}, weights)
    flags = f"--model-name {adapter} --output-dir {output} --device cpu"
    (line,) = refusals(train_rlhf.main(flags.split()), capsys.readouterr().err)
    assert line.startswith("MODEL_NAME is ") and "it has weights that are not finite" in line
    assert not output.exists()
