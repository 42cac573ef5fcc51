"""What the script and the demo model carry with them: requirements, licence, card; and a run of a copy."""

import hashlib
import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
# PEP 723: a block begins and ends with a line of its own, and all between are comments.
BLOCK = r"^# /// script\n((?:#|# .*)\n)+?# ///$"
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of the text, SHA-256
SHORT = ["--training-epochs", "1", "--batch-size", "3", "--eval-samples", "6", "--device", "cpu"]
# Runs the program that it is given as python does, and writes down what Python opens meanwhile.
WATCHER = """
import os, runpy, sys
def note(event, args):
    if event == "open":
        print(args[0], file=opened)
opened = open("../opened.txt", "w", buffering=1)
sys.addaudithook(note)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# ----------------------------------------------------------------------------------- requirements
@pytest.fixture(scope="module")
def metadata(script):
    """Return what the script says of its requirements to uv and others."""
    source = script.read_text(encoding="utf-8")
    (block,) = re.finditer(BLOCK, source, flags=re.M)
    assert source.count("# /// ") == 1  # a second block would be an error, or another one's
    lines = [line.removeprefix("#") for line in block[0].splitlines()[1:-1]]
    return tomllib.loads("\n".join(lines))


def test_the_script_requires_what_requirements_txt_does(metadata):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.partition("#")[0].strip() for line in lines]
    wanted = [Requirement(text) for text in texts if text]
    given = [Requirement(text) for text in metadata["dependencies"]]
    assert set(given) == set(wanted)
    assert len(given) == len(wanted) > 10


def test_the_script_requires_the_python_that_it_was_tried_with(metadata):
    """That of the README, which these tests run on, and no other."""
    versions = SpecifierSet(metadata["requires-python"])
    (told,) = re.findall(r"You need Python (\d+\.\d+)", (ROOT / "README.md").read_text())
    running = "{}.{}.{}".format(*sys.version_info)
    assert running in versions
    assert running.startswith(f"{told}.")
    major, minor = map(int, told.split("."))
    assert f"{major}.{minor - 1}.99" not in versions
    assert f"{major}.{minor + 1}.0" not in versions


# ------------------------------------------------------------------------------------ a copy alone
@pytest.fixture
def copy_alone(script, tmp_path):
    """Return a copy of the script in a folder where nothing else is."""
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.copy(script, folder))


def test_a_copy_alone_shows_its_help(copy_alone):
    command = [sys.executable, copy_alone.name, "--help"]
    done = subprocess.run(command, cwd=copy_alone.parent, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train_rlhf.py [--flag VALUE …]")
    assert "\n--kl-coef = 0.1 " in done.stdout
    assert "# ///" not in done.stdout
    assert [path.name for path in copy_alone.parent.iterdir()] == ["train_rlhf.py"]


def digests(folder):
    """Return the checksum of each file in a folder, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_a_copy_alone_with_a_model_does_a_whole_run(copy_alone, demo_model, run_script, tmp_path):
    folder = copy_alone.parent
    watcher = tmp_path / "watcher.py"
    watcher.write_text(WATCHER)
    shutil.copytree(demo_model, folder / "a_model")
    before = digests(folder)
    flags = ["--model-name", "a_model", *SHORT]
    done = run_script(folder, copy_alone, *flags, script=watcher)
    assert (done.status, done.stderr) == (0, "")

    after = digests(folder)
    assert before.items() <= after.items()
    new = {path.parts[0] for path in after.keys() - before.keys()}
    assert new == {"trained_model"}
    assert {path.name for path in folder.iterdir()} == {"train_rlhf.py", "a_model", "trained_model"}

    opened = (tmp_path / "opened.txt").read_text().splitlines()
    assert any(path.endswith("report.json") for path in opened)
    libraries = (sys.prefix, sys.base_prefix)  # which a user may have in a clone's .venv
    ours = [path for path in opened if path.startswith(f"{ROOT}/")]
    assert [path for path in ours if not path.startswith(libraries)] == []

    report = json.loads((folder / "trained_model" / "report.json").read_text())
    assert report["samples"] == 6
    model = AutoModelForCausalLM.from_pretrained(folder / "trained_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "trained_model")
    inputs = tokenizer("I feel so", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype=model.dtype)
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    assert not all(torch.equal(trained, untrained) for trained, untrained in pairs)


# ------------------------------------------------------------------------------------- the licence
def test_the_licence_is_the_whole_apache_licence():
    first, _, text = (ROOT / "LICENSE").read_text(encoding="utf-8").partition("\n")
    assert first == "Copyright 2026 the train_rlhf.py authors"
    lines = text.strip().splitlines()
    assert [line.strip() for line in lines[:2]] == ["Apache License", "Version 2.0, January 2004"]
    assert lines[-1].strip() == "limitations under the License."
    assert hashlib.sha256(text.encode()).hexdigest() == APACHE


# ------------------------------------------------------------------------- the card of the demo model
@pytest.fixture(scope="module")
def card(demo_model):
    return ModelCard.load(demo_model / "README.md")


def test_the_card_of_the_demo_model_has_what_the_hub_asks_for(card):
    data = card.data
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"llama", "ppo", "rlhf"} <= set(data.tags)


def test_the_card_tells_the_shape_that_the_demo_model_has(card, demo_model):
    config = AutoConfig.from_pretrained(demo_model)
    with safe_open(demo_model / "model.safetensors", "pt") as file:
        parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no dict
        parameters = sum(math.prod(part.get_shape()) for part in parts)
        kinds = {part.get_dtype() for part in parts}
    assert kinds == {"F16"}
    assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters
    assert config.tie_word_embeddings
    heads, shared_heads = config.num_attention_heads, config.num_key_value_heads
    special = len(AutoTokenizer.from_pretrained(demo_model).all_special_ids)
    for told in (
        f"Llama: {config.num_hidden_layers} layers of width {config.hidden_size}, {heads} heads",
        f"({shared_heads} for keys and values), tied embeddings",
        f"| parameters | {parameters:,}, saved as float16 |",
        f"| vocabulary | {config.vocab_size:,} tokens: {special} special ones",
        f"| context | {config.max_position_embeddings} tokens |",
    ):
        assert told in card.text, told


def test_the_card_tells_how_the_demo_model_was_made(card, demo_model):
    maker = runpy.run_path(str(demo_model / "make_demo_model.py"))
    steps, size = maker["STEPS"], maker["BATCH_SIZE"]
    text = " ".join(card.text.split())
    for told in (
        f"trained on {maker['TOKENIZER_TEXTS']:,} of them",
        f"from scratch on {steps * size:,} more ({steps:,} updates of {size}, by AdamW)",
        f"the seed is {maker['SEED']}",
    ):
        assert told in text, told


def test_the_card_tells_what_the_readme_measured_before_training(card):
    told = re.findall(r"\d+\.\d %", card.text)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(told) == 2
    assert f"Of its responses {told[0]} had a positive word before" in readme
    assert f"not trained on {told[1]} before" in readme
