"""Memory grows with MINI_BATCH_SIZE, not with BATCH_SIZE, the length of a run, or the layers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig

import train_rlhf

LENGTH = 8  # of the responses that are looked at in this process
SHORT = ["--eval-samples", "1", "--scale-samples", "0", "--eval-prompts", "--save-every", "0"]
SHORT += ["--device", "cpu", "--output-dir", "out"]
PROMPTS = ["I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling"]


@pytest.fixture(scope="session")
def llama(demo_model, save_random_model, tmp_path_factory):
    """Return the folder of a random Llama of that shape, with the tokenizer of demo_model."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)

    def make(vocabulary, layers, width=32):
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,  # less would leave all tokens alike, whatever is learned
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return save_random_model(config, tokenizer, tmp_path_factory.mktemp("llama"))

    return make


# ----------------------------------------------------------------------- the largest of all tensors
class Largest(TorchDispatchMode):
    """Notes how many distributions over the vocabulary the largest tensor holds that is made."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(each.alias_info for each in function._schema.returns):  # no view of a weight
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                    self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return result


@pytest.fixture(scope="module")
def wide(llama):
    """Return the folder of a model whose vocabulary no other size in it is like."""
    return llama(vocabulary=5000, layers=2)


@pytest.fixture
def largest_rows(wide, build, roll_out, step, make_settings):
    """Return the most distributions in a tensor of the rollout, the step and the measurement."""

    def look(batch_size, mini_batch_size, *more):
        sizes = ["--batch-size", batch_size, "--mini-batch-size", mini_batch_size]
        sizes += ["--eval-batch-size", "4", "--max-new-tokens", LENGTH]
        built = build(make_settings("--model-name", str(wide), *map(str, sizes), *more))
        rows = [built.rows[n % len(built.rows)] for n in range(batch_size)]
        queries = train_rlhf.encode(built.tokenizer, rows, chat_template=False)
        measured = (
            built.trainer,
            built.policy,
            lambda rows, texts: [0.0] * len(rows),
        )
        measured += train_rlhf.AS_IT_IS, rows, built.settings, batch_size, 1
        found = []
        with Largest(5000) as largest:
            responses, _ = roll_out(built, queries)
            found.append(largest.rows)
            largest.rows = 0
            step(built, queries, responses)
            found.append(largest.rows)
            for base in (True, False):
                largest.rows = 0
                train_rlhf.measure(*measured, base=base)
                found.append(largest.rows)
        assert max(map(len, responses)) == LENGTH
        return found

    return look


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])
def test_no_tensor_has_the_vocabulary_for_more_than_a_minibatch(largest_rows, more):
    for batch_size in (8, 16):
        assert largest_rows(batch_size, 2, *more) == [2, 2 * LENGTH, 2 * LENGTH, 2 * LENGTH]


def test_without_minibatches_a_tensor_has_the_vocabulary_for_the_whole_batch(largest_rows):
    assert largest_rows(16, 0) == [16, 16 * LENGTH, 16 * LENGTH, 16 * LENGTH]


# ------------------------------------------------------------------------- the memory of processes
# What is freed goes back to the system at once, so that its peak is that of what is held.
GIVES_BACK_MEMORY = """
import ctypes

ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes


def give_back_memory(prompts, completions, **kwargs):
    return [len(set(text.lower()) & set("aeinorst")) for text in completions]
"""


@pytest.fixture(scope="module")
def peak_memory(run_script, llama, tmp_path_factory):
    """Return the most MB that a run of one step, of 48 tokens over 32,000, ever held."""
    model = llama(vocabulary=32000, layers=1, width=16)

    def measure(batch_size, mini_batch_size):
        folder = tmp_path_factory.mktemp("peak")
        flags = ["--model-name", model, "--batch-size", batch_size, "--prompts", *PROMPTS[:1]]
        flags += ["--mini-batch-size", mini_batch_size, "--training-epochs", batch_size]
        flags += ["--max-new-tokens", 48, "--eval-batch-size", 1, "--no-score-prefixes"]
        flags += ["--ppo-epochs", 1, "--target-approx-kl", 0]
        flags += ["--reward", "reward.py:give_back_memory"]
        (folder / "reward.py").write_text(GIVES_BACK_MEMORY)
        ended = run_script(folder, *flags, *SHORT)
        assert ended.status == 0, ended.stderr
        report = json.loads((folder / "out" / "report.json").read_text())
        assert report["samples"] == batch_size
        return report["peak_memory_mb"]

    return measure


def test_peak_memory_does_not_grow_with_the_batch_but_with_the_minibatch(peak_memory):
    whole = 32 * 48 * 32000 * 4 / 1e6  # MB of a tensor of a batch of 32
    small, large, undivided = peak_memory(8, 4), peak_memory(32, 4), peak_memory(8, 0)
    assert large - small < whole / 8
    assert undivided - small > whole / 4  # of a batch of 8, several times over


# Pages of files come and go as code is used; what is held is the rest, in kB.
RESIDENT = """
import re
from pathlib import Path


def resident(prompts, completions, **kwargs):
    status = Path("/proc/self/status").read_text()
    with open("resident", "a") as file:
        print(re.search(r"RssAnon:\\s+(\\d+)", status)[1], file=file)
    return [len(set(text.lower()) & set("aeinorst")) for text in completions]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_memory_does_not_grow_from_step_to_step(run_script, llama, tmp_path):
    (tmp_path / "reward.py").write_text(RESIDENT)
    model = llama(vocabulary=5000, layers=1)
    flags = ["--model-name", model, "--reward", "reward.py:resident", "--batch-size", "4"]
    flags += ["--ppo-epochs", "1", "--target-approx-kl", "0"]
    flags += ["--training-epochs", 200 * 4 / len(PROMPTS), "--max-new-tokens", "4"]
    flags += ["--mini-batch-size", "2", "--no-score-prefixes", "--prompts", *PROMPTS]
    ended = run_script(tmp_path, *flags, *SHORT)
    assert ended.status == 0, ended.stderr
    sizes = [int(line) / 1e3 for line in (tmp_path / "resident").read_text().split()]
    assert len(sizes) == 1 + 200 + 2  # it is tried, and asked in each step and measurement
    early, late = min(sizes[31:61]), min(sizes[171:201])  # the least: what comes and goes is noise
    assert late - early < 15  # MB; the logprobs of each batch, kept, would be 0.3 * 140


# ------------------------------------------------------------------------- gradient checkpointing
def held_for_backward(built):
    """Return the bytes that a pass of 4 times 128 tokens leaves allocated, less its result."""
    queries, responses = [torch.arange(100, 220)] * 4, [torch.arange(300, 308)] * 4
    device = built.trainer.accelerator.device
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, device)
    inputs["earned"] = torch.zeros_like(mask).float()
    with torch.autograd.profiler.profile(profile_memory=True) as seen:
        outputs = built.policy(**inputs)
    held = sum(event.self_cpu_memory_usage for event in seen.function_events)
    return held - sum(output.numel() * output.element_size() for output in outputs)


def test_gradient_checkpointing_holds_less_between_forward_and_backward(
    llama, build, make_settings
):
    model = str(llama(vocabulary=1536, layers=8))
    plain = held_for_backward(build(make_settings("--model-name", model)))
    flag = "--gradient-checkpointing"
    checkpointed = held_for_backward(build(make_settings("--model-name", model, flag)))
    assert 0 < checkpointed < plain / 4


# ----------------------------------------------------------------------------------- quantisation
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_model_learns_from_minibatches_and_is_saved_whole(
    call_main, demo_model, tmp_path, bits
):
    flags = ["--model-name", demo_model, "--quantization", bits, "--batch-size", "4"]
    flags += ["--mini-batch-size", "2", "--training-epochs", "2", "--max-new-tokens", "4"]
    assert call_main(*flags, *SHORT) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    records = [json.loads(line) for line in lines]
    assert not any(record["skipped_updates"] for record in records)
    assert records[-1]["kl"] > 0
    weights = load_file(Path("out", "model.safetensors"))
    base = load_file(demo_model / "model.safetensors")
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in base.items()
    }
    assert all(
        weight.isfinite().all() and weight.is_floating_point() for weight in weights.values()
    )
