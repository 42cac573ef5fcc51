"""Training on examples: batches and their order, steps and their records, what is held out."""

import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from test_examples import AS_IT_IS, right_padded, row_of
from test_labels import NO_END, append_an_end, talk
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, OPTConfig

import train_sft
from finetune.batches import make_collator, order_of
from finetune.checkpoint import read_checkpoint
from finetune.errors import RunError, SettingsError
from finetune.fields import Tally
from finetune.held_out import answers, query_of, ratio
from finetune.labels import tokenize
from finetune.output import claim_output
from finetune.settings import read_settings
from finetune.supervised import Stage, fit

STEPS = 6


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return right_padded(demo_model)


@pytest.fixture(scope="module")
def model_64(gpt2):
    """Return a random GPT-2 with 64 positions."""
    return AutoModelForCausalLM.from_pretrained(gpt2).eval()


def examples_of(tokenizer):
    """Return examples of many lengths, with texts without a prompt among them."""
    texts = ["happy.", "I am so glad, and you are so calm.", "good day to you", "no", "봄은"]
    rows = [row_of("Say it now\n" * (n % 2), text) for n, text in enumerate(texts)]
    return tokenize(tokenizer, rows, AS_IT_IS, 64, Tally()).examples


@pytest.fixture(scope="module")
def examples(tokenizer):
    return examples_of(tokenizer)


def nats_alone(model, examples):
    """Return the loss of each example in nats and its tokens, one at a time, by their names."""
    sums, counts = [], []
    for example in examples:
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]])).logits[0].double()
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        pairs = [(n, label) for n, label in enumerate(example["labels"]) if n and label != -100]
        sums.append(-sum(logprobs[n - 1, label].item() for n, label in pairs))
        counts.append(len(pairs))
    return sums, counts


# --------------------------------------------------------------- batches
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packing_has_the_loss_of_padding(kind, demo_model, model_64, tokenizer, examples):
    model = model_64
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype="float32").eval()
    sums, counts = nats_alone(model, examples)
    for packing in (False, True):
        batch = make_collator(model, tokenizer, packing)(examples)
        assert batch["input_ids"].shape[0] == (1 if packing else len(examples))
        with torch.no_grad():
            loss = model(**batch, num_items_in_batch=1, use_cache=False).loss.item()
        assert loss == pytest.approx(sum(sums), rel=1e-5)
        assert (batch["labels"][:, 1:] != -100).sum() == sum(counts)


def test_packing_is_refused_where_an_example_would_see_another(tokenizer):
    config = OPTConfig(
        vocab_size=99,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        init_std=0.3,
    )
    torch.manual_seed(0)
    opt = AutoModelForCausalLM.from_config(config).eval()
    told = r"PACKING is True: .* sees the one before .* give False"
    with pytest.raises(SettingsError, match=told):
        make_collator(opt, tokenizer, True)


def test_the_end_is_learned_where_it_pads_too(demo_model):
    tokenizer = right_padded(demo_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = [row_of("Q\n", "happy."), row_of("Q\n", "happy and glad and calm.")]
    examples, _ = tokenize(tokenizer, rows, AS_IT_IS, 512, Tally())
    labels = make_collator(None, tokenizer, False)(examples)["labels"]
    assert (labels == tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    usual = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    ids = [{"input_ids": example["input_ids"]} for example in examples]
    assert (usual(ids)["labels"] == tokenizer.eos_token_id).sum() == 0


# ------------------------------------------------------------- the order
@pytest.mark.parametrize("grouped", [True, False])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(grouped):
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 500, (203,), generator=drawn).tolist()
    examples = [{"input_ids": [0] * length} for length in lengths]
    settings = SimpleNamespace(batch_size=10, seed=3, group_by_length=grouped)
    order = order_of(examples, 41, settings)
    assert len(order) == 410
    epochs = order[:203], order[203:406]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(203))
    assert epochs[0] != epochs[1] and set(order[406:]) <= set(range(203))
    torch.rand(1)  # on which nothing depends
    assert order_of(examples, 41, settings) == order
    assert order_of(examples, 12, settings) == order[:120]  # as a longer run begins
    settings.seed = 4
    assert order_of(examples, 41, settings) != order
    batches = [order[start : start + 10] for start in range(0, 200, 10)]
    spreads = [statistics.pstdev(lengths[place] for place in batch) for batch in batches]
    assert (statistics.mean(spreads) < statistics.pstdev(lengths) / 3) == grouped


# ----------------------------------------------- steps and their records
class Watched:
    """A stage of six steps with a tiny model, and its weights before the steps and after each."""

    def __init__(self, model, examples, collate, output, *flags):
        given = ["--output-dir", str(output), "--device", "cpu", "--batch-size", "4"]
        given += ["--training-epochs", "1", "--learning-rate", "1e-2", "--warmup-share", "0"]
        given += ["--save-every", "1", "--eval-every", "1", *flags]
        settings = read_settings(given, vars(train_sft), train_sft.Settings, ())
        self.weights, self.saved, self.forward_passes = [], [], 0
        self.stage = Stage(model, examples, collate, self.measure, settings, {}, "train_sft")

    def measure(self, whole=True):
        """Note the weights, and up to which step they are saved."""
        weights = [weight.detach().clone() for weight in self.stage.model.parameters()]
        self.weights.append(weights)
        state = read_checkpoint(self.stage.settings.output_dir)
        self.saved.append(len(state["metrics"]) if state else 0)
        return {"loss": 1.0}

    def spoil(self, losses=(), gradients=()):
        """Make the loss, or only its gradients, not finite in some steps."""
        model = self.stage.model

        def spoil_output(module, inputs, output):
            self.forward_passes += 1
            return output * math.nan if self.forward_passes in losses else output

        def spoil_gradient(gradient):
            return gradient * math.inf if self.forward_passes in gradients else gradient

        model.get_input_embeddings().register_forward_hook(spoil_output)
        next(model.parameters()).register_hook(spoil_gradient)

    def fit(self):
        """Take the steps; return their metrics."""
        with claim_output(self.stage.settings.output_dir, resume=False):
            metrics, _ = fit(self.stage)
            self.measure()
            return metrics


@pytest.fixture
def watch(gpt2, tokenizer, examples, tmp_path):
    """Return a stage of six steps on a tiny model."""
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    collate = make_collator(None, tokenizer, packing=False)
    rows = (examples * STEPS)[: 4 * STEPS]
    return lambda *flags: Watched(model, rows, collate, tmp_path / "out", *flags)


def test_an_update_that_is_not_finite_is_left_out_counted_and_not_saved(watch):
    watched = watch()
    watched.spoil(losses=[2], gradients=[4])
    metrics = watched.fit()
    assert [record["skipped_updates"] for record in metrics] == [0, 1, 0, 1, 0, 0]
    assert [record["loss"] is None for record in metrics] == [n == 2 for n in range(1, 7)]
    assert [record["grad_norm"] is None for record in metrics] == [n in (2, 4) for n in range(1, 7)]
    for step, (before, after) in enumerate(zip(watched.weights, watched.weights[1:]), start=1):
        same = all(map(torch.equal, before, after))
        assert same == (step in (2, 4))
    assert all(weight.isfinite().all() for weight in watched.weights[-1])
    # Measured before a step is saved: the second and the fourth never are.
    assert watched.saved == [0, 0, 1, 1, 3, 3, 6]


def test_three_bad_updates_in_a_row_stop_the_run(watch):
    watched = watch()
    watched.spoil(losses=[3, 4, 5])
    remedy = "start anew with a lower LEARNING_RATE or DTYPE float32"
    told = f"^three steps in a row had updates that are not finite: {remedy}\n"
    with pytest.raises(RunError, match=told) as stopped:
        watched.fit()
    assert stopped.value.__notes__[0].startswith("what was learned up to step 2 is saved.")
    state = read_checkpoint(watched.stage.settings.output_dir)
    assert all(weight.isfinite().all() for weight in state["weights"].values())


def test_the_rate_rises_and_then_falls_along_a_cosine(watch):
    metrics = watch("--warmup-share", "0.5").fit()
    rises = [0, 1e-2 / 3, 2e-2 / 3]
    falls = [1e-2 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    rates = [record["learning_rate"] for record in metrics]
    assert rates == pytest.approx(rises + falls)
    assert [record["samples"] for record in metrics] == [4, 8, 12, 16, 20, 24]


# ----------------------------------------------------------- the figures
def test_a_ratio_is_a_mean_with_its_standard_error():
    mean, error = ratio([1, 2, 3, 6], [1, 1, 1, 1])
    assert (mean, error) == (3, pytest.approx(statistics.pstdev([1, 2, 3, 6]) / 2))
    # By hand: 12 of 5 are 2.4 each; 10 are 0.4 above four of them, 2 are 0.4 below one.
    assert ratio([10, 2], [4, 1]) == pytest.approx((2.4, math.sqrt(0.32) / 5))
    assert ratio([2, 4], [1, 2]) == (2, 0)


def test_the_error_is_how_much_the_mean_varies_between_samples():
    drawn = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (2000, 50), generator=drawn).double()
    sums = counts * 2 + counts.sqrt() * torch.randn(2000, 50, generator=drawn)
    figures = [ratio(*both) for both in zip(sums.tolist(), counts.tolist())]
    means, errors = zip(*figures)
    assert statistics.stdev(means) == pytest.approx(statistics.mean(errors), rel=0.1)


# ----------------------------------------------------------- the answers
def greedy(model, query, count):
    """Return the likeliest tokens after a query, one at a time, by hand."""
    ids = list(query)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[len(query) :]


def test_answers_end_at_the_end_token_and_stay_in_the_context(model_64, tokenizer, monkeypatch):
    rows = [
        row_of("so " * 57 + "it", "is."),
        row_of("I am", " so."),
        row_of("", "I am so glad and") | {"shown": "I am so glad"},
    ]
    examples, rows = tokenize(tokenizer, rows, AS_IT_IS, 64, Tally())
    long = examples[0]["labels"].count(-100)
    assert 55 < long < 63
    said = answers(model_64, tokenizer, rows, examples, max_new_tokens=40)
    assert list(said) == [row["shown"] for row in rows]
    query = examples[0]["input_ids"][:long]
    assert said[rows[0]["shown"]] == tokenizer.decode(greedy(model_64, query, 64 - long))
    query = tokenizer("I am so glad")["input_ids"]
    assert said["I am so glad"] == tokenizer.decode(greedy(model_64, query, 40))

    tokens = greedy(model_64, tokenizer("I am")["input_ids"], 40)
    place = next(n for n in range(1, 40) if tokens[n] not in tokens[:n])
    monkeypatch.setattr(model_64.generation_config, "eos_token_id", [tokens[place]])
    ended = answers(model_64, tokenizer, rows[1:], examples[1:], max_new_tokens=40)["I am"]
    assert ended == tokenizer.decode(tokens[: place + 1])
    assert len(tokenizer(ended)["input_ids"]) < 40


def test_a_question_has_no_end_where_the_tokenizer_adds_one(demo_model, model_64):
    tokenizer = append_an_end(right_padded(demo_model))
    rows = [row_of("Say\n", "happy.")]
    examples, rows = tokenize(tokenizer, rows, AS_IT_IS, 512, Tally())
    told = answers(model_64, tokenizer, rows, examples, max_new_tokens=4)
    query = tokenizer("Say\n")["input_ids"][:-1]
    assert told["Say"] == tokenizer.decode(greedy(model_64, query, 4))


def test_of_a_text_that_was_cut_less_than_all_is_shown(tokenizer):
    row = row_of("", "I am so glad")
    (example,), (row,) = tokenize(tokenizer, [row], AS_IT_IS, 3, Tally())
    assert query_of(tokenizer, row, example) == example["input_ids"][:2]


def test_the_second_answer_of_a_conversation_is_asked_for_with_all_before_it(demo_model):
    tokenizer = right_padded(demo_model)
    tokenizer.chat_template = NO_END
    talks = [talk("Hi", "Ho", "And?", "Two")]
    examples, rows = tokenize(tokenizer, talks, AS_IT_IS, 64, Tally())
    queries = [query_of(tokenizer, *pair) for pair in zip(rows, examples, strict=True)]
    assert [tokenizer.decode(query) for query in queries] == [
        "user:\nHi\nassistant:\n",
        "user:\nHi\nassistant:\nHo\nuser:\nAnd?\nassistant:\n",
    ]
    assert [row["shown"] for row in rows] == ["Hi", "And?"]
