"""What a run leaves for others: the card that the Hub reads, what is uploaded, and the adapter."""

import copy
import json
import math
import shutil
import warnings
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from huggingface_hub.cli import hf
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
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
from transformers.pipelines import PIPELINE_REGISTRY

import train_reward_model
import train_rlhf
import train_sft

COMMIT = "0123456789abcdef0123456789abcdef01234567"
AWKWARD = """a "Müller's" model: yes | #1 - ---"""  # the name of a folder
TEXTS = [  # what prompts and responses may be
    "---\nlicense: mit\n---",
    "| a | b |\n|---|---|",
    "```yaml\nkey: [1, {",
    "- 'one': \"two\" `three` # four",
]
SHORT = "--device cpu --dtype float32 --batch-size 4 --training-epochs 0.5"
FAST = "--learning-rate 3e-2 --target-approx-kl 0 --max-new-tokens 4 --eval-samples 12"
FAST += " --reward reward.py:with_an_e --scale-samples 20"
REWARD = """
def with_an_e(prompts, completions, **others):
    return [float("e" in each) for each in completions]
"""
ROWS = [{"instruction": f"Say {n}.", "output": f"I am so happy {n}."} for n in range(12)]
PAIRS = [{"chosen": f"very good {n}", "rejected": f"very {n} bad"} for n in range(12)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
RANK = 3
IDS = torch.arange(3, 13)[None]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------- the runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Be in a folder of this file, with a Hub that is not to be asked and a cache of its own."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("WORLD_SIZE", raising=False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for module in (train_rlhf, train_sft, train_reward_model):
            patch.setattr(module, "draw", lambda *parts: parts[-1].touch())
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
    """Do a run of a script to its end; return its folder, its report and its metrics."""

    def run(module, output, *flags):
        given = ["--output-dir", output, "--lora-rank", RANK, *SHORT.split(), *flags]
        assert module.main([*map(str, given)]) == 0
        report = json.loads((place / output / "report.json").read_text(encoding="utf-8"))
        lines = (place / output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        return SimpleNamespace(folder=place / output, report=report, metrics=metrics)

    return run


@pytest.fixture(scope="module")
def ppo(do_run):
    """Fine-tune a model of the Hub with PPO, with texts and a folder that are hard to write down."""
    flags = ["--prompts", *TEXTS, "I am", "--eval-prompts", "--- # a", "b: | c"]
    return do_run(train_rlhf, AWKWARD, "--model-name", "some/model", *FAST.split(), *flags)


@pytest.fixture(scope="module")
def sft(do_run, place, base):
    """Teach a model of a local folder."""
    (place / "rows.json").write_text(json.dumps(ROWS))
    flags = ["--data", "rows.json", "--template", "{instruction}\n", "--max-new-tokens", "2"]
    return do_run(train_sft, "yes", "--model-name", base, "--learning-rate", "3e-2", *flags)


@pytest.fixture(scope="module")
def reward_model(do_run, place):
    (place / "pairs.json").write_text(json.dumps(PAIRS))
    flags = ["--data", "pairs.json", "--learning-rate", "3e-2", "--eval-share", "0.3"]
    return do_run(train_reward_model, "1e3", "--model-name", "some/model", *flags)


# ---------------------------------------------------------------------------------------- the card
def check_like_the_hub(path):
    """Check all that is known of the Hub's own check, which is there alone; return the data.

    A model-index needs a name, and for each result the type of the task, type and name of the
    dataset, and type and value of each metric: https://github.com/huggingface/hub-docs, modelcard.md.
    """
    metadata, data = metadata_load(path), ModelCard.load(path).data
    json.dumps(metadata, allow_nan=False)
    assert data.to_dict() == metadata
    assert yaml.safe_load(data.to_yaml()) == metadata
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert all(isinstance(tag, str) and tag for tag in data.tags)
    assert len(set(data.tags)) == len(data.tags)
    assert None not in metadata.values()
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


def test_the_card_of_ppo_says_what_its_report_says(ppo):
    data = check_like_the_hub(ppo.folder / "README.md")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["trl", "ppo", "lora", "rlhf"]
    assert data.base_model == "some/model"
    assert data.model_name == AWKWARD
    names = ["score", "standard_error", "success_rate", "kl", "distinct", "perplexity_under_base"]
    names += ["win_rate", "kl_minimum"]
    trained = ppo.report["trained"]
    assert list(trained) == ["train_prompts", "eval_prompts"]
    wanted = {
        part: {name: figures[name] for name in names if figures[name] is not None}
        for part, figures in trained.items()
    }
    assert figures_in(data) == wanted
    assert all(len(figures) >= 7 for figures in wanted.values())


@pytest.mark.parametrize(
    ("stage", "task", "tags", "names"),
    [
        ("sft", "text-generation", ["sft", "lora", "rlhf"], "loss standard_error perplexity"),
        (
            "reward_model",
            "text-classification",
            ["reward-model", "lora", "rlhf"],
            "accuracy standard_error guessing loss margin score_mean score_std",
        ),
    ],
)
def test_the_card_of_a_stage_says_what_its_report_says(request, stage, task, tags, names):
    run = request.getfixturevalue(stage)
    data = check_like_the_hub(run.folder / "README.md")
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", task, tags)
    assert data.get("base_model") == {"sft": None, "reward_model": "some/model"}[stage]
    assert data.model_name == run.folder.name in ("yes", "1e3")  # no truth and no number
    trained = run.report["trained"]
    assert figures_in(data) == {"held_out": {name: trained[name] for name in names.split()}}


def save_card(report, folder):
    """Write the card of a report as a run does; return its path."""
    (folder / "checkpoint" / "new").mkdir(parents=True)
    text = train_rlhf.summarize(report, ".")
    parts = lambda new: None, lambda path: path.touch()
    train_rlhf.save_results(report, text, *parts, str(folder))
    return folder / "README.md"


def test_no_text_breaks_the_card(ppo, tmp_path):
    """Neither its head nor its table; what is said stands in lines that Markdown leaves alone."""
    report = copy.deepcopy(ppo.report)
    for model in ("base", "trained"):
        for figures in report[model].values():
            figures["first_sample"] = {text: text[::-1] + text for text in TEXTS}
    card = ModelCard.load(save_card(report, tmp_path))
    assert check_like_the_hub(tmp_path / "README.md").to_dict() == card.data.to_dict()
    assert figures_in(card.data) == figures_in(ModelCard.load(ppo.folder / "README.md").data)
    table, said = card.text.split("The first response to each prompt:\n")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6} and len(rows) == 10
    said, _ = said.split("\nScore: ")
    assert len(said.strip("\n").splitlines()) == 2 * 3 * len(TEXTS)
    assert all(line.startswith("    ") for line in said.strip("\n").splitlines())
    for text in TEXTS:
        assert f"    {' '.join(text.split())}\n" in said


def test_what_is_no_finite_number_is_left_out(ppo, tmp_path):
    report = copy.deepcopy(ppo.report)
    for model in ("base", "trained"):
        report[model]["train_prompts"]["success_rate"] = None  # as of graded rewards
    report["trained"]["train_prompts"] |= {"kl_minimum": math.nan, "win_rate": math.inf}
    wanted = figures_in(ModelCard.load(ppo.folder / "README.md").data)
    for name in ("success_rate", "kl_minimum", "win_rate"):
        wanted["train_prompts"].pop(name, None)
    assert figures_in(check_like_the_hub(save_card(report, tmp_path))) == wanted


# ---------------------------------------------------------------------------------------- the upload
def test_the_upload_takes_the_results_and_no_checkpoint(ppo, tmp_path, monkeypatch):
    """The line of the README is understood by the command, and leaves out what is for going on."""
    folder = tmp_path / "trained_model"
    shutil.copytree(ppo.folder, folder)
    (folder / "wandb" / "run").mkdir(parents=True)
    for name in ("checkpoint/new", "wandb/run", "tensorboard"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "file").touch()
    asked = {}

    def create_repo(api, **options):
        return SimpleNamespace(repo_id=options["repo_id"])

    def upload_folder(api, **options):
        asked.update(options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    line = "upload some/name trained_model . --exclude checkpoint/* --exclude wandb/*"
    result = CliRunner().invoke(hf.app, line.split())
    assert result.exit_code == 0, result.output
    assert (asked["repo_id"], asked["path_in_repo"]) == ("some/name", ".")
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    assert asked["folder_path"] == "trained_model"
    left_out = {"checkpoint/lock", "checkpoint/state.pt", "checkpoint/new/file", "wandb/run/file"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    taken = set(filter_repo_objects(files, **patterns))
    assert files - taken == left_out
    wanted = {"README.md", "model.safetensors", "config.json", "tokenizer.json", "training.png"}
    wanted |= {"report.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert wanted <= taken


# --------------------------------------------------------------------------------------- the adapter
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


def test_the_adapter_of_a_reward_model_scores_alike(reward_model):
    kind = AutoModelForSequenceClassification
    merged = logits_of(kind.from_pretrained(reward_model.folder))
    adapter = reward_model.folder / "adapter"
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1)
    assert torch.allclose(logits_of(model), merged, atol=1e-4)
    assert merged.abs().max() > 1e-3
    lora = adapter_config(adapter)
    assert (lora["base_model_name_or_path"], lora["task_type"]) == ("some/model", "SEQ_CLS")


def test_the_adapter_is_as_small_as_its_rank(ppo):
    """Of each linear layer but the output head it has rank * (inputs + outputs) values."""
    width, inner, layers = SIZES["hidden_size"], SIZES["intermediate_size"], 2
    of_keys = width // 2  # two heads of four have keys and values of their own
    attention = 2 * (width + width) + 2 * (width + of_keys)
    values = RANK * layers * (attention + 3 * (width + inner))
    path = ppo.folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    assert sum(weight.numel() for weight in weights.values()) == values
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert 4 * values < path.stat().st_size < 4 * values + 200 * len(weights)
    names = {path.name for path in path.parent.iterdir()}
    assert names == {"adapter_config.json", path.name, "tokenizer.json", "tokenizer_config.json"}


def test_what_tinyllama_takes_on_disk(shared_model, make_settings):
    """The adapter has 1.1 % of the model's values, 50.5 MB of float32 beside 2.2 or 4.4 GB."""
    config = AutoConfig.from_pretrained(shared_model("tinyllama-shape"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = model.num_parameters()
        adapted = train_rlhf.add_adapter(model, make_settings("--lora-rank", "16"))
    trained, _ = adapted.get_nb_trainable_parameters()
    width, inner, of_keys = config.hidden_size, config.intermediate_size, config.hidden_size // 8
    attention = 2 * (width + width) + 2 * (width + of_keys)
    assert trained == 16 * config.num_hidden_layers * (attention + 3 * (width + inner))
    assert 4 * trained / 1e6 == pytest.approx(50.5, abs=0.05)
    assert 2 * total / 1e9 == pytest.approx(2.2, abs=0.05)


def test_no_adapter_stays_that_is_not_the_models(do_run, base):
    """Neither without SAVE_ADAPTER, nor of the same run before it went on, nor of an earlier one."""
    flags = ["--model-name", base, *FAST.split(), "--save-adapter"]
    run = do_run(train_rlhf, "trained", *flags)
    first = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    more = ["--training-epochs", "1", "--resume"]
    again = do_run(train_rlhf, "trained", *flags, *more)
    assert len(again.metrics) > len(run.metrics)
    later = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert not all(torch.equal(first[name], later[name]) for name in first)
    assert not [*(run.folder / "checkpoint" / "new").glob("*")]

    more = ["--training-epochs", "1.5", "--resume", "--no-save-adapter"]
    do_run(train_rlhf, "trained", *flags, *more)
    assert not (run.folder / "adapter").exists()
    assert (run.folder / "model.safetensors").exists()

    do_run(train_rlhf, "trained", *flags)
    assert (run.folder / "adapter").exists()
    do_run(train_rlhf, "trained", *flags, "--no-save-adapter")
    assert not (run.folder / "adapter").exists()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
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
    train_rlhf.save_model(policy, built.tokenizer, built.settings, tmp_path)
    quantized = train_rlhf.load_base_model(str(base), "cpu", "float32", bits)
    assert not torch.allclose(logits_of(quantized), trained, atol=0.1)
    adapted = PeftModel.from_pretrained(quantized, tmp_path / "adapter")
    assert torch.allclose(logits_of(adapted), trained, atol=1e-4)


# ----------------------------------------------------------------------- an adapter as the base model
NO_STEP = ["--target-approx-kl", "0", "--ppo-epochs", "1", "--max-new-tokens", "4"]
NO_STEP += ["--learning-rate", "1e-20", "--eval-samples", "6"]


@pytest.fixture(scope="module")
def chain(do_run, ppo):
    """Go on from the adapter of a run, with another of its own."""
    adapter = ppo.folder / "adapter"
    return do_run(train_rlhf, "chain", "--model-name", adapter, *FAST.split())


def test_a_run_begins_where_its_adapter_ended(chain, do_run, ppo):
    """It is the same to name the adapter of a run, or its merged model: the reference is that."""
    from_merged = do_run(train_rlhf, "merged", "--model-name", ppo.folder, *FAST.split())
    for run in (chain, from_merged):
        assert abs(run.metrics[0]["kl"]) < 1e-4
        assert run.metrics[0]["samples"] == 4
    for part, figures in chain.report["base"].items():
        wanted = from_merged.report["base"][part]
        assert figures.pop("first_sample") == wanted.pop("first_sample")
        assert figures == pytest.approx(wanted, rel=1e-3)
    weights, wanted = (load_file(run.folder / "model.safetensors") for run in (chain, from_merged))
    assert all(torch.allclose(weights[name], wanted[name], atol=1e-4) for name in wanted)
    assert not huggingface_hub.ModelCard.load(chain.folder / "README.md").data.base_model


@pytest.mark.parametrize("place_of", ["a folder", "the Hub"])
def test_an_adapter_on_an_adapter(chain, into_cache, ppo, place_of):
    """Both are merged in, each upon what it was trained on."""
    name = str(chain.folder / "adapter")
    if place_of == "the Hub":
        into_cache("some/chain", name)
        name = "some/chain"
    path = train_rlhf.find_model("MODEL_NAME", name)
    logits = logits_of(train_rlhf.load_base_model(path, "cpu", "float32", "none"))
    merged = logits_of(AutoModelForCausalLM.from_pretrained(chain.folder))
    assert torch.allclose(logits, merged, atol=1e-4)
    before = logits_of(AutoModelForCausalLM.from_pretrained(ppo.folder))
    assert (before - merged).abs().max() > 0.1
    assert train_rlhf.context_of(path) == SIZES["max_position_embeddings"]


def test_an_adapter_of_the_hub(do_run, into_cache, ppo, capsys):
    """It is named as base_model in the card, and in the new adapter."""
    into_cache("some/adapter", ppo.folder / "adapter")
    run = do_run(train_rlhf, "from_hub", "--model-name", "some/adapter", *NO_STEP)
    assert check_like_the_hub(run.folder / "README.md").base_model == "some/adapter"
    assert adapter_config(run.folder / "adapter")["base_model_name_or_path"] == "some/adapter"
    weights, wanted = (load_file(each.folder / "model.safetensors") for each in (run, ppo))
    assert all(torch.allclose(weights[name], wanted[name], atol=1e-5) for name in wanted)
    assert capsys.readouterr().err == ""


def test_an_adapter_on_a_quantized_base(do_run, ppo, capsys):
    """It is merged into the rounded weights, without a word of the libraries; that is the base."""
    flags = ["--model-name", ppo.folder / "adapter", "--quantization", "4bit", *NO_STEP]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = do_run(train_rlhf, "quantized", *flags)
    assert "\n".join(str(warning.message) for warning in told) == ""
    assert capsys.readouterr().err == ""
    assert abs(run.metrics[0]["kl"]) < 1e-4
    assert run.report["trained"]["train_prompts"]["kl"] < 1e-4


def test_an_adapter_whose_base_is_missing(ppo, place, tmp_path, capsys):
    shutil.copytree(ppo.folder / "adapter", tmp_path / "adapter")
    lora = adapter_config(tmp_path / "adapter") | {"base_model_name_or_path": "nobody/nothing"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    flags = ["--model-name", str(tmp_path / "adapter"), "--output-dir", str(tmp_path / "trained")]
    assert train_rlhf.main([*flags, "--device", "cpu"]) == 2
    output, errors = capsys.readouterr()
    first, line = errors.splitlines()
    assert (output, first) == ("", "Nothing was started or changed:")
    assert line.startswith("- The base of MODEL_NAME is nobody/nothing: there is no such folder, ")
    remedy = "start where that folder is, or correct base_model_name_or_path in adapter_config.json"
    assert line.endswith(f": {remedy}")
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize("spoiled", ["weights", "ring", "finite"])
def test_an_adapter_that_is_broken_is_refused_in_a_line(ppo, spoiled, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    shutil.copytree(ppo.folder / "adapter", adapter)
    weights = adapter / "adapter_model.safetensors"
    problem = "it has no adapter_model.safetensors"
    if spoiled == "weights":
        weights.unlink()
    if spoiled == "ring":
        lora = adapter_config(adapter) | {"base_model_name_or_path": str(adapter)}
        (adapter / "adapter_config.json").write_text(json.dumps(lora))
        problem = "which is built on itself"
    if spoiled == "finite":
        save_file({name: each * math.nan for name, each in load_file(weights).items()}, weights)
        problem = "it has weights that are not finite"
    flags = ["--model-name", str(adapter), "--output-dir", str(tmp_path / "trained")]
    assert train_rlhf.main([*flags, "--device", "cpu"]) == 2
    _, line = capsys.readouterr().err.splitlines()
    assert line.startswith("- MODEL_NAME is ") and problem in line
    assert not (tmp_path / "trained").exists()


def test_the_base_of_an_adapter_is_not_moved_aside(ppo, demo_model, tmp_path, capsys):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(ppo.folder / "adapter", adapter)
    shutil.copytree(demo_model, base)
    (base / "metrics.jsonl").write_text("")  # as in the folder of an earlier run
    lora = adapter_config(adapter) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    assert train_rlhf.main(["--model-name", str(adapter), "--output-dir", str(base)]) == 2
    assert "the current folder or the model is in it" in capsys.readouterr().err
    assert (base / "model.safetensors").exists()
