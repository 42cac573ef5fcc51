"""The card that the Hub reads of a model, and what is uploaded there."""

import copy
import json
import math
import re
import shlex
from types import SimpleNamespace

import huggingface_hub
import pytest
from click.testing import CliRunner
from conftest import ROOT
from huggingface_hub import ModelCard
from huggingface_hub.cli import hf
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers.pipelines import PIPELINE_REGISTRY

import train_reward_model
import train_sft
from finetune.measurement import Measured, make_report
from finetune.output import write_report
from finetune.scale import Scale
from finetune.settings import read_settings as read_settings_of
from finetune.summary import summarize

AWKWARD = """a "Müller's" model: yes | #1 - ---"""  # the name of a folder
TEXTS = [  # what prompts and responses may be
    "---\nlicense: mit\n---",
    "| a | b |\n|---|---|",
    "```yaml\nkey: [1, {",
    "- 'one': \"two\" `three` # four",
]
METRICS = [{"samples": 8, "seconds": 2.0}]


def measure(share):
    """Return what might be measured where that share of the responses is good."""
    count = 2 * len(TEXTS)
    return Measured(
        prompts=TEXTS * 2,
        texts=[text[::-1] + text for text in TEXTS] * 2,
        scores=[1.0 if number < share * count else -1.0 for number in range(count)],
        kls=[share * number for number in range(count)],
        ref_logprobs=[-5.0] * count,
        lengths=[4] * count,
    )


@pytest.fixture(scope="module")
def model(build, read_settings, demo_model):
    """Return a model with an adapter."""
    settings = read_settings("--model-name", str(demo_model), "--device", "cpu")
    return build(settings).policy.pretrained_model


@pytest.fixture(scope="module")
def ppo(model, read_settings):
    """Return the report of a run of PPO whose texts and folder are hard to write down."""
    settings = read_settings("--model-name", "some/model", "--output-dir", AWKWARD)
    base = {"train_prompts": measure(0.25), "eval_prompts": measure(0.5)}
    trained = {"train_prompts": measure(0.75), "eval_prompts": measure(0.9)}
    scale = Scale(threshold=0.0)
    return make_report(
        base, trained, scale, is_chat=False, model=model, settings=settings, metrics=METRICS
    )


def save_card(report, text, folder):
    """Write a report and its card as a run does; return the data in the card.

    They go through all that is known of the Hub's own check, which is there alone. A model-index
    needs a name, and for each result the type of the task, type and name of the dataset, and type
    and value of each metric: https://github.com/huggingface/hub-docs, modelcard.md.
    """
    write_report(report, text, folder)
    path = folder / "README.md"
    metadata, data = metadata_load(path), ModelCard.load(path).data
    json.dumps(metadata, allow_nan=False)
    assert data.to_dict() == metadata and None not in metadata.values()
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert all(isinstance(tag, str) and tag for tag in data.tags)
    if "base_model" in metadata:
        validate_repo_id(data.base_model)
    (index,) = metadata["model-index"]
    assert isinstance(index["name"], str) and index["name"]
    for result in index["results"]:
        assert result["task"]["type"] == data.pipeline_tag
        assert all(isinstance(result["dataset"][name], str) for name in ("type", "name"))
        for metric in result["metrics"]:
            assert isinstance(metric["type"], str)
            assert isinstance(metric["value"], float) and math.isfinite(metric["value"])
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert eval_results_to_model_index(name, results) == metadata["model-index"]
    assert len({(each.dataset_split, each.metric_type) for each in results}) == len(results)
    return data


def figures_in(data):
    """Return {part: {metric: value}} of a card."""
    parts = {}
    for result in data.eval_results:
        parts.setdefault(result.dataset_split, {})[result.metric_type] = result.metric_value
    return parts


# ---------------------------------------------------------------------------------------- the card
def test_the_card_of_ppo_says_what_its_report_says(ppo, tmp_path):
    data = save_card(ppo, summarize(ppo, "."), tmp_path)
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["trl", "ppo", "lora", "rlhf"]
    assert data.base_model == "some/model"
    assert data.model_name == AWKWARD
    names = ["score", "standard_error", "success_rate", "kl", "distinct", "perplexity_under_base"]
    names += ["win_rate", "kl_minimum"]
    assert list(ppo["trained"]) == ["train_prompts", "eval_prompts"]
    parts = ppo["trained"].items()
    wanted = {part: {name: figures[name] for name in names} for part, figures in parts}
    assert figures_in(data) == wanted


@pytest.mark.parametrize(
    ("script", "rows", "task", "tag", "names"),
    [
        (train_sft, [[]], "text-generation", "sft", "loss standard_error perplexity"),
        (
            train_reward_model,
            [],
            "text-classification",
            "reward-model",
            "accuracy standard_error guessing loss margin score_mean score_std",
        ),
    ],
    ids=["sft", "reward model"],
)
def test_the_card_of_a_stage_says_what_its_report_says(
    model, demo_model, tmp_path, script, rows, task, tag, names
):
    flags = ["--model-name", str(demo_model), "--output-dir", "1e3"]
    settings = read_settings_of(flags, vars(script), script.Settings, checks=())
    stage = SimpleNamespace(model=model, settings=settings, learning_rate=3e-3)
    figures = {name: place / 8 for place, name in enumerate(names.split(), start=1)}
    others = {"nats": [3, 2], "counts": [2, 3], "comparisons": 4, "first_sample": {"Hi": "Ho"}}
    report = script.make_report(stage, METRICS, figures | others, figures | others, *rows)
    data = save_card(report, "# A model", tmp_path)
    assert (data.library_name, data.pipeline_tag) == ("transformers", task)
    assert data.tags == [tag, "lora", "rlhf"]
    assert data.model_name == "1e3"  # a text, not a number
    assert data.get("base_model") is None  # a folder is nobody else's
    assert figures_in(data) == {"held_out": figures}


def test_no_text_breaks_the_card(ppo, tmp_path):
    """Neither its head nor its table; what is said stands in lines that Markdown leaves alone."""
    data = save_card(ppo, summarize(ppo, "."), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == data.to_dict()
    table, said = card.text.split("The first response to each prompt:\n")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6} and len(rows) == 10
    said, _ = said.split("\nScore: ")
    assert len(said.strip("\n").splitlines()) == 2 * 3 * len(TEXTS)
    assert all(line.startswith("    ") for line in said.strip("\n").splitlines())
    for text in TEXTS:
        assert f"    {' '.join(text.split())}\n" in said


def test_what_is_no_finite_number_is_left_out(ppo, tmp_path):
    report = copy.deepcopy(ppo)
    for part in ("base", "trained"):
        report[part]["train_prompts"]["success_rate"] = None  # as of graded rewards
    report["trained"]["train_prompts"] |= {"kl_minimum": math.nan, "win_rate": math.inf}
    figures = figures_in(save_card(report, summarize(report, "."), tmp_path))
    left_out = {"success_rate", "kl_minimum", "win_rate"}
    assert figures["eval_prompts"].keys() - figures["train_prompts"].keys() == left_out


# -------------------------------------------------------------------------------------- the upload
FILES = """README.md adapter/adapter_config.json adapter/adapter_model.safetensors config.json
metrics.jsonl model.safetensors report.json samples.jsonl tensorboard/file tokenizer.json
training.png checkpoint/lock checkpoint/state.pt checkpoint/new/file wandb/run/file"""


def test_the_upload_takes_the_results_and_no_checkpoint(tmp_path, monkeypatch):
    """The line of docs/models.md is understood by the command, and leaves out what is for going on."""
    asked = {}

    def create_repo(api, **options):
        return SimpleNamespace(repo_id=options["repo_id"])

    def upload_folder(api, **options):
        asked.update(options)

    (tmp_path / "trained_model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (line,) = re.findall("^hf (upload .*)", page, flags=re.MULTILINE)
    result = CliRunner().invoke(hf.app, shlex.split(line))
    assert result.exit_code == 0, result.output
    assert (asked["repo_id"], asked["path_in_repo"]) == ("my-name/my-model", ".")
    assert asked["folder_path"] == "trained_model"
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    taken = set(filter_repo_objects(FILES.split(), **patterns))
    left_out = {"checkpoint/lock", "checkpoint/state.pt", "checkpoint/new/file", "wandb/run/file"}
    assert set(FILES.split()) - taken == left_out
