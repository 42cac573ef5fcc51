"""Memory: logits are held for a piece at a time, not for a batch, nor from step to step."""

import gc
import json
import os
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import train_rlhf
from finetune.errors import SettingsError
from finetune.evaluation import measure
from finetune.logits import OutputHead
from finetune.saving import save_model
from finetune.tokens import encode

FULL = bool(os.environ.get("CI_FULL"))
LENGTH = 8  # of the responses that are looked at in this process


@pytest.fixture(scope="session")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="session")
def llama(tokenizer, save_random_model, tmp_path_factory):
    """Return the folder of a random Llama of that shape."""

    def make(vocabulary, layers, width=32):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,  # less would leave all tokens alike
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return save_random_model(config, tokenizer, tmp_path_factory.mktemp("llama"))

    return make


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


def make_batch(built, queries, responses):
    """Return responses as a batch, each token of which earns 1."""
    token_scores = [torch.ones(len(response)) for response in responses]
    return built.trainer.make_batch(queries, responses, token_scores)


# ------------------------------------------- the largest of all tensors
class Largest(TorchDispatchMode):
    """Notes how many rows over the vocabulary the largest tensor has that is made."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(each.alias_info for each in function._schema.returns)  # as of a weight
        for tensor in [] if is_view else tree_leaves(result):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.mark.parametrize(
    ("mini_batch_size", "more"), [(2, []), (2, ["--gradient-checkpointing"]), (0, [])]
)
@pytest.mark.parametrize("rows_of_piece", [3, 11])
def test_no_tensor_has_the_vocabulary_for_more_than_a_piece_or_a_token_of_each_response(
    llama,
    build,
    roll_out,
    step,
    make_settings,
    make_learner,
    monkeypatch,
    mini_batch_size,
    more,
    rows_of_piece,
):
    """Neither in the rollout, nor in the step, nor in the measurement.

    Of a token of each response all logits are made in sampling, and by the model itself.
    """
    monkeypatch.setattr(train_rlhf, "rows_of_a_piece", lambda states, head: rows_of_piece)
    model = llama(vocabulary=5000, layers=2)  # no other size in it is like that
    flags = ["--model-name", model, "--batch-size", 8, "--mini-batch-size", mini_batch_size]
    flags += ["--eval-batch-size", 4, "--max-new-tokens", LENGTH]
    built = build(make_settings(*map(str, flags), *more))
    learner = make_learner(built, lambda rows, texts: [0.0] * len(rows))
    rows = (built.rows * 2)[:8]
    queries = encode(built.tokenizer, rows, chat_template=False)
    with Largest(5000) as largest:
        responses, _ = roll_out(built, queries)
        of_rollout, largest.rows = largest.rows, 0
        step(built, queries, responses)
        of_step, largest.rows = largest.rows, 0
        of_measurement = []
        for base in (True, False):
            measure(learner, rows, 8, number=1, base=base)
            of_measurement.append(largest.rows)
            largest.rows = 0
    assert max(map(len, responses)) == LENGTH
    size = mini_batch_size or 8
    # EVAL_BATCH_SIZE responses are sampled at once, or a minibatch where that is more.
    assert of_rollout == max(size, 4)
    assert of_step == rows_of_piece
    assert of_measurement == [max(4, rows_of_piece)] * 2


def test_a_piece_has_64_mb_of_logits_or_a_single_row():
    def rows_of(vocabulary):
        layer = torch.nn.Linear(4, vocabulary, bias=False, device="meta")
        return train_rlhf.rows_of_a_piece(torch.zeros(5, 4), OutputHead(layer, 1.0))

    assert rows_of(32768) * 32768 * 4 == 2**26
    assert (rows_of(151936), rows_of(2**30)) == (110, 1)
    logits = torch.zeros(5, 2**13)
    assert train_rlhf.rows_of_a_piece(logits, OutputHead(None, 1.0)) == 2**11


# ---------------------------------------------- the memory of processes
# What is freed goes back to the system at once, so that a peak is that of what is held.
# Pages of files come and go as code is used; RssAnon is the rest, in kB.
REWARD = """
import ctypes
import re
from pathlib import Path

ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes


def letters(prompts, completions, **kwargs):
    status = Path("/proc/self/status").read_text()
    with open("resident", "a") as file:
        print(re.search(r"RssAnon:\\s+(\\d+)", status)[1], file=file)
    return [len(set(text.lower()) & set("aeinorst")) for text in completions]
"""
SHORT = ["--device", "cpu", "--output-dir", "out", "--prompts", "I feel so", "--eval-prompts"]
SHORT += ["--reward", "reward.py:letters", "--no-score-prefixes", "--scale-samples", "0"]
SHORT += ["--ppo-epochs", "1", "--target-approx-kl", "0", "--save-every", "0"]
SHORT += ["--eval-samples", "1", "--eval-batch-size", "1"]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about a process")


@pytest.fixture
def run(run_script, llama, tmp_path):
    """Do a run of a model with such a vocabulary; return its folder."""

    def start(name, vocabulary, *flags):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "reward.py").write_text(REWARD)
        model = llama(vocabulary, layers=1, width=16)
        ended = run_script(folder, "--model-name", model, *flags, *SHORT)
        assert ended.status == 0, ended.stderr
        return folder

    return start


@ON_LINUX
def test_peak_memory_grows_neither_with_the_batch_nor_with_the_minibatch_by_logits(run):
    """Of undivided batches each has more rows than a piece, 524."""
    length, vocabulary, peaks = 48, 32000, []
    for batch_size, mini_batch_size in ((16, 4), (32, 4), (16, 0), (32, 0)):
        flags = ["--batch-size", batch_size, "--training-epochs", batch_size]
        flags += ["--mini-batch-size", mini_batch_size, "--max-new-tokens", length]
        folder = run(f"{batch_size} {mini_batch_size}", vocabulary, *flags)
        report = json.loads((folder / "out" / "report.json").read_text())
        assert report["samples"] == batch_size
        peaks.append(report["peak_memory_mb"])
    half = 16 * length * vocabulary * 4 / 1e6  # MB of a tensor of 16 responses
    small, large, undivided, large_undivided = peaks
    assert large - small < half / 4
    assert large_undivided - undivided < half / 2


@ON_LINUX
def test_memory_does_not_grow_from_step_to_step(run):
    steps = 60
    flags = ["--batch-size", 4, "--mini-batch-size", 2, "--max-new-tokens", 4]
    folder = run("steps", 10000, *flags, "--training-epochs", steps * 4)
    sizes = [int(line) / 1e3 for line in (folder / "resident").read_text().split()]
    assert len(sizes) == 1 + steps + 2  # it is tried, and asked in each step and measurement
    # The least of several: what comes and goes is noise.
    early, late = min(sizes[16:26]), min(sizes[51:61])
    assert late - early < 6  # MB; the logprobs of each batch, kept, would be 0.64 * 35


# ----------------------------------------------- gradient checkpointing
def held_for_backward(built):
    """Return the bytes that a pass of 4 times 128 tokens leaves, less its result."""
    queries, responses = [torch.arange(100, 220)] * 4, [torch.arange(300, 308)] * 4
    batch = make_batch(built, queries, responses)
    gc.collect()  # what other tests left, and is freed in here, would count too
    gc.disable()
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        outputs = built.policy(**batch.inputs)
    gc.enable()
    held = sum(event.self_cpu_memory_usage for event in seen.function_events)
    return held - sum(output.numel() * output.element_size() for output in outputs)


def test_gradient_checkpointing_holds_less_between_forward_and_backward(
    llama, build, make_settings
):
    flags = ["--model-name", str(llama(vocabulary=1536, layers=8))]
    plain = build(make_settings(*flags))
    checkpointed = build(make_settings(*flags, "--gradient-checkpointing"))
    assert 0 < held_for_backward(checkpointed) < held_for_backward(plain) / 4


@pytest.fixture(scope="session")
def forgetful_model(tokenizer, demo_model, save_random_model, tmp_path_factory):
    """Return the folder of demo_model, or of a random model whose config has dropout.

    GPT-2 drops out in modules of its own; OPT's layers do it themselves, by their training flag.
    """
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    gpt2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    gpt2 |= {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    opt = {"max_position_embeddings": 64, "hidden_size": 32, "word_embed_proj_dim": 32}
    opt |= {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        "gpt2": GPT2Config(**gpt2, **ids, initializer_range=0.3),
        "opt": OPTConfig(**opt, **ids, init_std=0.3, dropout=0.5, attention_dropout=0.5),
        "opt without layers": OPTConfig(**opt, **ids, init_std=0.3, dropout=0.0, layerdrop=0.9),
    }
    folders = {"demo_model": demo_model}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp("forgetful")
        folders[name] = save_random_model(config, tokenizer, folder)
    return folders.get


@pytest.fixture
def build_forgetful(build, make_settings, forgetful_model):
    """Build one of those models, with or without checkpointing; its adapter is not zero."""

    def make(name, *flags):
        built = build(make_settings("--model-name", str(forgetful_model(name)), *flags))
        torch.manual_seed(1)
        for weight_name, weight in trained_weights_of(built.policy).items():
            if "lora_B" in weight_name or "v_head" in weight_name:
                torch.nn.init.normal_(weight, std=0.1)
        queries = ask(built.tokenizer, "Life is", "I'm feeling as if I could do it all")
        responses = ask(built.tokenizer, "is good and so am I", "and so")
        built.inputs = make_batch(built, queries, responses).inputs
        built.lengths = []  # of the sequences in each pass through the first layer

        def see(module, args):
            built.lengths.append(args[0].shape[1])

        modules = built.policy.modules()
        layer = next(each for each in modules if isinstance(each, GradientCheckpointingLayer))
        # A hook of the layer itself would see the first call only.
        parts = layer.named_children()
        norm = next(part for name, part in parts if re.search("norm|ln_", name))
        norm.register_forward_pre_hook(see)
        return built

    return make


def trained_weights_of(policy):
    named = policy.named_parameters()
    return {name: weight for name, weight in named if weight.requires_grad}


def go_backward(policy, states, values):
    """Let gradients of both results flow."""
    all_logprobs = policy.head(states).log_softmax(-1)
    (all_logprobs.exp().square().sum() + values.sum()).backward()


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt without layers"])
def test_what_is_forgotten_and_computed_again_changes_no_number(build_forgetful, name):
    found = []
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        built = build_forgetful(name, flag)
        torch.manual_seed(2)
        states, values = built.policy(**built.inputs)
        with torch.no_grad():
            again, _ = built.policy(**built.inputs)
        torch.testing.assert_close(states, again, rtol=0, atol=1e-5)
        torch.manual_seed(3)  # backward computes the same again, whatever was drawn meanwhile
        go_backward(built.policy, states, values)
        weights = trained_weights_of(built.policy)
        found.append((states, values, [weight.grad for weight in weights.values()]))
    (*outputs, plain), (*others, checkpointed) = found
    torch.testing.assert_close(others, outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in plain)


@pytest.mark.parametrize(("flag", "passes"), [("--gradient-checkpointing", 2), ("--seed=0", 1)])
@pytest.mark.parametrize("name", ["demo_model", "gpt2"])
def test_only_what_was_forgotten_is_computed_again(build_forgetful, roll_out, name, flag, passes):
    """And generation keeps its cache: without, a token takes a pass over all before it."""
    built = build_forgetful(name, "--max-new-tokens", "6", flag)
    width = built.inputs["input_ids"].shape[1]
    outputs = built.policy(**built.inputs)
    assert built.lengths == [width]
    go_backward(built.policy, *outputs)
    assert built.lengths == [width] * passes
    with torch.no_grad():  # nothing goes backward here, and nothing is said of it
        built.policy(**built.inputs)
    assert built.lengths == [width] * (passes + 1)

    built.lengths.clear()
    queries = ask(built.tokenizer, "Life is")
    (response,), _ = roll_out(built, queries)
    assert built.lengths == [len(queries[0])] + [1] * (len(response) - 1)
    assert len(response) > 2


def test_gradient_checkpointing_is_refused_where_it_would_do_nothing(
    build, make_settings, monkeypatch
):
    name = "transformers.modeling_layers.GradientCheckpointingLayer"
    monkeypatch.setattr(name, torch.nn.Conv3d)  # of which the model has none
    with pytest.raises(SettingsError, match="GRADIENT_CHECKPOINTING is True: give F"):
        build(make_settings("--gradient-checkpointing"))


def test_a_step_with_gradient_checkpointing_is_the_same_step(build, step, make_settings):
    found = []
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        built = build(make_settings("--mini-batch-size", "2", flag))
        torch.manual_seed(0)
        found.append([step(built), step(built)])
    for plain, checkpointed in zip(*found):
        assert checkpointed == pytest.approx(plain, rel=1e-2, abs=1e-5)
    assert found[0][1]["kl"] > 1e-5


# --------------------------------------------------------- quantisation
@pytest.mark.parametrize(
    ("bits", "width"),
    # Some processors want multiples of 64 for 4 bits.
    [("8bit", 344), ("4bit", 344), *([("4bit", 384)] if FULL else [])],
)
def test_a_quantized_model_learns_from_minibatches_and_is_saved_whole(
    build, step, make_settings, demo_model, tokenizer, save_random_model, tmp_path, bits, width
):
    sizes = {"intermediate_size": width, "initializer_range": 0.1}
    config = LlamaConfig.from_pretrained(demo_model, **sizes)
    folder, saved = tmp_path / "random", tmp_path / "saved"
    save_random_model(config, tokenizer, folder)
    flags = ["--model-name", str(folder), "--quantization", bits]
    built = build(make_settings(*flags, "--learning-rate", "0.003", "--mini-batch-size", "2"))
    policy = built.policy.pretrained_model
    inputs = tokenizer("I feel so", return_tensors="pt")

    def chances(model):
        with torch.no_grad():
            return torch.softmax(model(**inputs).logits[0, -1].float(), dim=-1)

    untrained = chances(policy)
    torch.manual_seed(0)
    for _ in range(3):
        assert step(built)["skipped_updates"] == 0
    trained = chances(policy)
    save_model(policy, built.tokenizer, built.settings, saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert not getattr(model.config, "quantization_config", None)
    # The update is larger than what the rounding may have cost.
    lost = (trained - chances(model)).abs().sum()
    assert lost < 0.1
    assert (trained - untrained).abs().sum() > 2 * lost

    weights, base = (load_file(place / "model.safetensors") for place in (saved, folder))
    assert weights.keys() == base.keys()
    for name, weight in weights.items():
        assert weight.shape == base[name].shape
        assert weight.is_floating_point() and weight.isfinite().all()
