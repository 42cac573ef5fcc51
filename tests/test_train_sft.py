"""Supervised fine-tuning: what is refused, measured, shown and saved."""

import contextlib
import gc
import io
import json
import math
import os
import statistics
from types import SimpleNamespace

import pytest
import torch
from helpers import read_metrics, read_rows, refusals
from peft import PeftModel
from test_examples import right_padded, turns, write
from test_labels import NO_END
from test_supervised import examples_of, nats_alone
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import train_sft
from finetune.data import read_data
from finetune.errors import RunError
from finetune.examples import EXAMPLES
from finetune.labels import tokenize_data

FULL = bool(os.environ.get("CI_FULL"))
SHORT = "Task: {instruction}\n\nInput: {input}\n\nAnswer:\n"
FLAGS = ["--device", "cpu", "--dtype", "float32", "--eval-every", "0"]
FLAGS += ["--template", SHORT]
NAMES = ["Anna", "Ben", "a friend", "everyone", "the teacher"]
NAMES += ["my old neighbour next door"]
GREETINGS = ["hello", "good day", "thanks a lot"]
GREETINGS += ["good night, sleep well and dream of the sea"]
ROWS = [
    {"instruction": f"Say {said} to {name}.", "output": f"{said} {name}, I am so happy."}
    for said in GREETINGS
    for name in NAMES
]


@pytest.fixture(scope="module")
def teach(tmp_path_factory):
    """Do a run in this process; return its folder, report, metrics and what it printed."""
    gc.freeze()  # Trainer collects garbage, among all that was imported

    def run(model, rows, *flags, picture=False):
        folder = tmp_path_factory.mktemp("run")
        out = folder / "out"
        data = write(folder / "rows.json", rows)
        places = ["--model-name", model, "--data", data, "--output-dir", out]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            if not picture:  # which takes as long as the rest
                patch.setattr(train_sft, "draw", lambda report, metrics, path: None)
            assert train_sft.main([*map(str, [*places, *FLAGS, *flags])]) == 0
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return SimpleNamespace(
            folder=out,
            report=report,
            metrics=read_metrics(out),
            printed=printed.getvalue(),
        )

    yield run
    gc.unfreeze()


@pytest.fixture(scope="module")
def taught(teach, demo_model):
    """Return a run on demo_model."""
    flags = ["--training-epochs", 3, "--batch-size", 8, "--learning-rate", 1e-2]
    flags += ["--eval-share", 0.2, "--max-new-tokens", 12]
    return teach(demo_model, ROWS, *flags, picture=True)


# ------------------------------------------------------- what is refused
def test_bad_rows_and_a_bad_template_are_told_and_nothing_is_made(
    demo_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.json", [*ROWS[:1], {"prompt": "Hi"}])
    flags = ["--model-name", str(demo_model), "--data", "rows.json"]
    status = train_sft.main([*flags, "--template", "Answer"])
    template, data = refusals(status, capsys.readouterr().err)
    assert template.startswith("TEMPLATE is Answer: put {instruction} into it once")
    reason = "row 2: it has nothing that answers its prompt: its fields are prompt"
    wanted = f"DATA is rows.json: it can't be used ({reason}): give rows with instruction"
    assert data.startswith(wanted)

    # Of the tokens nothing is known before the tokenizer is loaded.
    write(tmp_path / "rows.json", ROWS)
    status = train_sft.main([*flags, *FLAGS, "--max-length", "2"])
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("MAX_LENGTH is 2 here: give more or shorter examples")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def called(capsys, *flags):
    """Return the one problem for which a call of main started nothing."""
    status = train_sft.main([*map(str, [*FLAGS, *flags])])
    (problem,) = refusals(status, capsys.readouterr().err)
    return problem


CONVERSATIONS = [{"messages": turns("Hi", f"Ho {n}")} for n in range(4)]


@pytest.mark.parametrize(
    ("template", "rows", "reason"),
    [
        (None, CONVERSATIONS, "it has conversations, and the model has no chat template"),
        (
            "{{ raise_exception('No talk') }}",
            CONVERSATIONS,
            "none of its rows can be used: 3 that the chat template refuses (No talk)",
        ),
        (
            " ",
            CONVERSATIONS,
            "none of its rows can be used: 3 of which the chat template renders nothing",
        ),
        (
            "{{ messages[-1].content }}",
            CONVERSATIONS,
            "none of its rows can be used: 3 with a turn of user, which the chat template leaves",
        ),
    ],
)
def test_what_a_chat_template_lacks_is_told_of_data_and_never_of_the_model(
    copy_of_demo_model, tmp_path, monkeypatch, capsys, template, rows, reason
):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(copy_of_demo_model)
    data = write(tmp_path / "rows.json", rows)
    flags = ["--model-name", copy_of_demo_model, "--data", data, "--eval-share", 0.2]
    problem = called(capsys, *flags)
    assert problem.startswith("DATA is ")
    assert f": it can't be used ({reason}" in problem
    assert "name a model with a chat template that takes them, or give" in problem
    assert not (tmp_path / "sft_model").exists()


def test_a_token_that_the_model_has_no_embedding_for_is_told_before_anything_is_written(
    copy_of_demo_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(copy_of_demo_model)
    data = write(tmp_path / "rows.json", ROWS)
    problem = called(capsys, "--model-name", copy_of_demo_model, "--data", data)
    told = f"its tokenizer has the token 'hello' with the id {size}, but its embedding has {size}"
    assert problem.startswith("MODEL_NAME is ") and told in problem
    assert not (tmp_path / "sft_model").exists()


# ------------------------------------------------------ what is measured
def test_the_held_out_loss_counts_each_token_alike(gpt2, demo_model):
    model = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    tokenizer = right_padded(demo_model)
    examples = examples_of(tokenizer)
    sums, counts = nats_alone(model, examples)
    wanted = sum(sums) / sum(counts)
    # A mean of means would tell something else.
    means = [total / count for total, count in zip(sums, counts)]
    assert abs(statistics.mean(means) - wanted) > 0.05
    for size in (1, 2, 5):
        settings = SimpleNamespace(eval_batch_size=size, max_new_tokens=1)
        held_out = train_sft.HeldOut(model, tokenizer, examples, [], settings)
        assert held_out.measure(whole=False) == {"loss": pytest.approx(wanted, rel=1e-5)}
    figures = held_out.measure()
    assert (figures["tokens"], figures["examples"]) == (sum(counts), len(examples))
    assert figures["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert figures["nats"] == pytest.approx(sums, rel=1e-5)
    assert figures["counts"] == counts


# ------------------------------------------------------------ whole runs
def test_the_saved_model_says_what_the_card_shows(taught):
    model = AutoModelForCausalLM.from_pretrained(taught.folder)
    tokenizer = AutoTokenizer.from_pretrained(taught.folder)
    assert tokenizer.padding_side == "left"
    assert model.config.use_cache is True
    card = (taught.folder / "README.md").read_text(encoding="utf-8")
    said = taught.report["trained"]["first_sample"]
    assert len(said) == 5
    for prompt, answer in said.items():
        asked = [{"role": "user", "content": prompt}]
        query = tokenizer.apply_chat_template(asked, return_tensors="pt")
        length = query["input_ids"].shape[1]
        sequence = model.generate(**query, max_new_tokens=12, do_sample=False)[0]
        response = sequence[length:]
        assert tokenizer.decode(response, skip_special_tokens=True) == answer
        assert f"    {prompt}\n        before  " in card
        assert f"        after   {answer.strip()}\n" in card
        assert f"        after   {answer.strip()}\n" in taught.printed


def test_the_adapter_alone_makes_the_same_model(taught, demo_model):
    adapter = taught.folder / "adapter"
    saved = AutoModelForCausalLM.from_pretrained(taught.folder, dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32")
    ids = torch.tensor([[1, 36, 71, 295, 342]])
    with torch.no_grad():
        untaught = base(ids).logits
        logits = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        assert torch.allclose(logits, saved(ids).logits, atol=1e-4)
    assert not torch.allclose(logits, untaught, atol=0.1)
    lora = json.loads((adapter / "adapter_config.json").read_text())
    assert lora["base_model_name_or_path"] == str(demo_model)
    assert AutoTokenizer.from_pretrained(adapter).chat_template


def test_the_report_tells_what_was_learned(taught):
    assert (taught.folder / "training.png").read_bytes().startswith(b"\x89PNG")
    base, trained = taught.report["base"], taught.report["trained"]
    assert trained["loss"] < base["loss"] - 1 and taught.report["learned"] is True
    for figures in (base, trained):
        assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
        assert figures["examples"] == 5
        assert {"nats", "counts"}.isdisjoint(figures)
    assert base["tokens"] == trained["tokens"]
    assert "19 examples to train on, 5 held out\n" in taught.printed
    # These are ceil(3 * 19 / 8) steps.
    assert taught.report["samples"] == len(taught.metrics) * 8 == 64
    assert "did not learn" not in taught.printed


def test_the_screen_tells_what_is_left_out_and_not_used(teach, gpt2):
    marked = turns("Hi", "Ho")
    rows = [row | {"id": n, "source": "x"} for n, row in enumerate(ROWS[:10])]
    rows += [*ROWS[:2], {"instruction": "Hi", "output": " "}, {"prompt": "a", "completion": "b"}]
    rows += [{"messages": marked, "label": 0}, {"prompt": "Hi", "completion": "so " * 90}]
    flags = ["--training-epochs", 0.1, "--eval-share", 0.2, "--max-length", 64]
    run = teach(gpt2, rows, *SMALL[:4], *flags)
    (line,) = [line for line in run.printed.splitlines() if line.startswith("Data ")]
    assert line.partition(".json: ")[2] == (
        "9 examples to train on, 3 held out, 1 cut; left out: 1 without an answer, "
        "1 whose label says that the answer is a bad one, 2 given twice; fields not used: id (10), source (10)"
    )


SMALL = ["--batch-size", 8, "--max-new-tokens", 2, "--max-length", 64]
UPDATES = [*SMALL, "--training-epochs", 1, "--learning-rate", 1e-2]


def test_what_is_learned_of_examples_can_be_watched_while_the_run_goes_on(
    demo_model, tmp_path, monkeypatch
):
    """The page shows it, and is made of a run that was stopped too."""

    def stop(stage):
        raise RunError("stopped")

    monkeypatch.setattr(train_sft, "fit", stop)
    flags = ["--model-name", demo_model, "--data", write(tmp_path / "rows.json", ROWS)]
    flags += ["--output-dir", tmp_path / "out", *FLAGS]
    assert train_sft.main([*map(str, flags)]) == 1
    rows = read_rows(tmp_path / "out" / "learned.jsonl")
    assert {row["held_out"] for row in rows} == {True, False}


def test_a_run_that_learns_nothing_says_so(teach, gpt2):
    flags = ["--learning-rate", 1e-9, "--training-epochs", 0.1]
    run = teach(gpt2, ROWS, *flags, *SMALL)
    assert run.report["learned"] is False
    assert "Beyond chance this run did not learn: raise TRAINING_EPOCHS" in run.printed


@pytest.fixture(scope="module")
def steady(gpt2, save_random_model, tmp_path_factory):
    """Return the folder of a GPT-2 without dropout of its own."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = AutoConfig.from_pretrained(gpt2, **off)
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("steady"))


@pytest.fixture(scope="module")
def whole_batch(teach, steady):
    return teach(steady, ROWS, *UPDATES)


@pytest.mark.parametrize("flags", [["--mini-batch-size", 2], ["--packing"]])
def test_minibatches_and_packing_change_no_update(flags, teach, steady, whole_batch):
    run = teach(steady, ROWS, *UPDATES, *flags)
    assert len(run.metrics) == 3
    for name in ("loss", "grad_norm"):
        wanted = [record[name] for record in whole_batch.metrics]
        assert [record[name] for record in run.metrics] == pytest.approx(wanted, rel=1e-3)
    wanted = whole_batch.report["trained"]["loss"]
    assert run.report["trained"]["loss"] == pytest.approx(wanted, rel=1e-3)
    assert abs(wanted - whole_batch.report["base"]["loss"]) > 0.05


def test_dropout_is_on_in_training_alone(teach, steady, whole_batch):
    run = teach(steady, ROWS, *UPDATES, "--lora-dropout", 0.5)
    assert run.report["base"]["loss"] == whole_batch.report["base"]["loss"]
    # Dropout is before the matrix that begins as zero: the gradient alone tells at first.
    first, wanted = run.metrics[0], whole_batch.metrics[0]
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert first["grad_norm"] != pytest.approx(wanted["grad_norm"], 0.01)

    settings = run.report["settings"]
    data = read_data(settings["data"], settings["eval_share"], settings["seed"], EXAMPLES)
    tokenizer = right_padded(run.folder)
    _, (examples, _) = tokenize_data(tokenizer, data, settings["template"], 64)
    model = AutoModelForCausalLM.from_pretrained(run.folder).eval()
    sums, counts = nats_alone(model, examples)
    wanted = sum(sums) / sum(counts)
    assert run.report["trained"]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_conversations_are_learned_up_to_the_end_of_the_template(teach, gpt2, tmp_path):
    """Their last prompt is longer than the model's context."""
    template = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(gpt2, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"messages": turns("Hi", f"so {n}", "so " * 70, "no")} for n in range(9)]
    flags = ["--eval-share", 0.8, "--training-epochs", 0.1]
    run = teach(tmp_path / "model", rows, *SMALL, *flags)
    assert list(run.report["trained"]["first_sample"]) == ["Hi"]
    assert AutoTokenizer.from_pretrained(run.folder).chat_template == template
    assert run.report["chat"] is True
    ends = GenerationConfig.from_pretrained(run.folder).eos_token_id
    assert ends == [model.config.eos_token_id, len(tokenizer) - 1]


ENDED = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


@pytest.mark.parametrize("template", [ENDED, NO_END], ids=["one text", "one for each answer"])
def test_conversations_of_several_answers_are_trained_on_and_gone_on_with(
    gpt2, tmp_path, monkeypatch, capsys, template
):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(gpt2, chat_template=template)
    AutoModelForCausalLM.from_pretrained(gpt2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"messages": turns("Hi", f"{n}", "So", "Two")} for n in range(6)]
    data = write(tmp_path / "rows.json", rows)
    flags = ["--model-name", "model", "--data", data, "--eval-share", 0.2, "--batch-size", 2]
    flags += ["--max-new-tokens", 2, "--training-epochs", 1]
    monkeypatch.setattr(train_sft, "draw", lambda report, metrics, path: None)
    assert train_sft.main([*map(str, [*FLAGS, *flags])]) == 0
    count = 1 if template is ENDED else 2
    line = f"{4 * count} examples to train on, {2 * count} held out\n"
    assert line in capsys.readouterr().out
    metrics = read_metrics(tmp_path / "sft_model")
    assert [record["step"] for record in metrics] == [*range(1, 2 * count + 1)]
    report = json.loads((tmp_path / "sft_model" / "report.json").read_text(encoding="utf-8"))
    asked = ["Hi"] if template is ENDED else ["Hi", "So"]
    assert list(report["trained"]["first_sample"]) == asked

    assert train_sft.main([*map(str, [*FLAGS, *flags, "--resume"])]) == 0
    assert read_metrics(tmp_path / "sft_model") == metrics
    flags[-1] = 2
    assert train_sft.main([*map(str, [*FLAGS, *flags, "--resume"])]) == 2
    told = "TRAINING_EPOCHS is 2.0, but 1.0 in the checkpoint"
    assert told in capsys.readouterr().err


# ------------------------------------------- a model nobody here trained
@pytest.mark.parametrize("bits", ["none", "8bit"][: 1 + FULL])
def test_alpaca_teaches_a_small_model(teach, shared, shared_model, bits):
    """It gets the 200 shortest of the first thousand rows."""
    path = shared("data/alpaca_5000.json")
    rows = json.loads(path.read_text(encoding="utf-8"))[:1000]
    rows = sorted(rows, key=lambda row: len("".join(row.values())))[:200]
    flags = ["--learning-rate", 3e-3, "--batch-size", 32, "--max-new-tokens", 2]
    flags += ["--training-epochs", 1, "--quantization", bits]
    report = teach(shared_model("stories260K"), rows, *flags).report
    assert report["trained"]["loss"] < report["base"]["loss"] - 0.3
    assert report["learned"] is True
