"""Fixtures that several test files share. Nothing here or there needs a network or a GPU."""

import os
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: two workers share the cores

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_rlhf
from finetune import models, processes, sampling, tokens
from finetune.prompts import read_prompts
from finetune.settings import read_settings as read_settings_of

SMALL = ["--device", "cpu", "--batch-size", "4", "--max-new-tokens", "8", "--eval-samples", "12"]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no worker is left alone with one at the end."""
    names = "run processes notebook kill trackers stages memory train_reward_model evaluation"
    longest = [f"test_{name}.py" for name in names.split()]
    items.sort(key=lambda item: [*longest, item.path.name].index(item.path.name))


@pytest.fixture(scope="session")
def script():
    return ROOT / "train_rlhf.py"


@pytest.fixture(scope="session")
def demo_model():
    return ROOT / "demo_model"


@pytest.fixture(scope="session")
def shared():
    """Return a path of the material that stands beside the repository, or skip."""

    def find(name):
        path = ROOT.parent / "shared" / name
        if not path.exists():
            pytest.skip(f"there is no ../shared/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def shared_model(shared):
    """Return the folder of a model that stands beside the repository, or skip."""
    return lambda name: shared(f"models/{name}")


@pytest.fixture(scope="session")
def read_settings():
    """Return the settings of the script with these flags, or raise what is wrong with them."""

    def read(*flags):
        constants = vars(train_rlhf)
        return read_settings_of(flags, constants, train_rlhf.Settings, train_rlhf.CHECKS)

    return read


@pytest.fixture
def make_settings(read_settings, demo_model, tmp_path):
    """Return settings of a small run of demo_model, overridden by flags."""
    places = ["--model-name", str(demo_model), "--output-dir", str(tmp_path / "trained_model")]
    return lambda *flags: read_settings(*places, *SMALL, *flags)


@pytest.fixture
def settings(make_settings):
    return make_settings()


@pytest.fixture(scope="session")
def build():
    """Return rows, tokenizer, policy and trainer, made as train_rlhf.run makes them."""

    def make(settings):
        path = settings.model_name
        device, dtype = processes.pick_device(settings.device, settings.dtype)
        device = processes.join_processes(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what TRL says of itself
            tokenizer = tokens.load_tokenizer(path)
            model = models.load_base_model(path, device, dtype, settings.quantization)
            policy = train_rlhf.make_policy(model, tokenizer, settings)
            trainer = train_rlhf.make_trainer(policy, tokenizer, settings, device, dtype)
        prompts = read_prompts(
            settings.prompts,
            settings.eval_prompts,
            settings.eval_share,
            settings.prompt_field,
            settings.seed,
        )
        return SimpleNamespace(
            settings=settings,
            rows=prompts.rows,
            eval_rows=prompts.eval_rows,
            tokenizer=tokenizer,
            policy=policy,
            trainer=trainer,
        )

    return make


class PlainScorer:
    """A scorer that calls a function of rows and texts."""

    meaning = text_before = None
    reads_beginnings = False

    def __init__(self, function):
        self.function = function

    def __call__(self, rows, texts):
        return self.function(rows, texts)


@pytest.fixture(scope="session")
def make_learner():
    """Return a Learner of what build made, with a scorer of one's own from rows and texts."""

    def make(built, scorer=None, scale=None):
        return train_rlhf.Learner(
            built.policy,
            built.trainer,
            built.tokenizer,
            PlainScorer(scorer),
            scale or train_rlhf.Scale(),
            built.settings,
        )

    return make


@pytest.fixture(scope="session")
def roll_out():
    """Return responses to queries, and their texts; another key gives other random numbers."""

    def take(built, queries, key=(0, 0, 0)):
        length = built.settings.max_new_tokens
        return sampling.sample_responses(
            built.policy.pretrained_model,
            built.tokenizer,
            queries,
            processes.random_numbers(key, len(queries), length),
            batch_size=max(built.settings.rows_at_once, built.settings.eval_batch_size),
        )

    return take


@pytest.fixture(scope="session")
def step(roll_out):
    """Return the metrics of one PPO step, on fresh responses if none are given.

    Every other response is a good one.
    """

    def take(built, queries=None, responses=None):
        if queries is None:
            rows = built.rows[: built.settings.batch_size]
            queries = tokens.encode(built.tokenizer, rows, built.settings.chat_template)
            responses, _ = roll_out(built, queries)
        token_scores = [torch.zeros(len(response)) for response in responses]
        for i, scores in enumerate(token_scores):
            scores[-1] = (-1.0) ** i
        metrics, _ = built.trainer.step(queries, responses, token_scores)
        return metrics

    return take


@pytest.fixture
def call_main(monkeypatch, tmp_path):
    """Call main in a fresh folder, with a screen so wide that no sample is cut."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    return lambda *flags: train_rlhf.main([*map(str, flags)])


@pytest.fixture(scope="session")
def start_script(tmp_path_factory):
    """Start a run in a process of its own, a child of one that has imported the script once."""
    if not hasattr(os, "fork"):
        pytest.skip("this system can't fork a process")
    from fork_driver import ForkDriver

    with ForkDriver(tmp_path_factory.mktemp("driver")) as driver:
        yield driver.start


@pytest.fixture(scope="session")
def run_script(start_script):
    """Do a run to its end; return exit status, stdout, stderr, notes and seconds."""
    return lambda *args, **options: start_script(*args, **options).end()


@pytest.fixture
def copy_of_demo_model(demo_model, tmp_path):
    """Return a copy of demo_model that a test may spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in [*demo_model.glob("*.json"), demo_model / "model.safetensors"]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def save_random_model():
    """Save a random model of that shape, and a tokenizer, into a folder."""

    def save(config, tokenizer, folder):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def gpt2(demo_model, save_random_model, tmp_path_factory):
    """Return the folder of a random GPT-2, whose positions are absolute, with the tokenizer of demo_model."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {
        "vocab_size": len(tokenizer),
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
    }
    config = GPT2Config(**sizes, initializer_range=0.3, **ids)
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("gpt2"))
