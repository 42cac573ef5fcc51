"""A sequence classifier as reward: its score is the one that the model itself gives to the text."""

import json
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
)

import train_rlhf

LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
THREE = {0: "sad", 1: "Neutral", 2: "glad"}
ROWS = [{"prompt": "Life is"}, {"prompt": "I feel so"}, {"prompt": "My day was long, and"}]
TEXTS = [" good", "", " sad, but then it was a wonderful day, and I love it."]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def config_of(kind, vocabulary, context=64, **more):
    """Return the configuration of a tiny model, its weights large enough to tell texts apart."""
    more |= {"vocab_size": vocabulary, "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2Config(n_positions=context, n_embd=32, n_layer=2, n_head=2, **more)
    if kind == "bloom":
        return BloomConfig(hidden_size=32, n_layer=2, n_head=2, **more)
    more |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more |= {"intermediate_size": 48, "max_position_embeddings": context}
    return BertConfig(**more) if kind == "bert" else LlamaConfig(**more)


@pytest.fixture(scope="module")
def save_classifier(demo_model, tmp_path_factory):
    """Save a random classifier, with the tokenizer of demo_model if it has none of its kind."""

    def save(kind="llama", id2label=None, context=64, **scale):
        folder = tmp_path_factory.mktemp("classifier")
        if kind == "bert":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, ".", ","]
            words += [f"##{letter}" for letter in LETTERS]
            tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
        else:
            tokenizer = AutoTokenizer.from_pretrained(demo_model)
        tokenizer.padding_side = "left"  # of which a classifier must not depend
        if kind == "bloom":
            tokenizer.model_max_length = int(1e30)  # a tokenizer without one
        if kind in ("gpt2", "bloom"):
            tokenizer.pad_token = None
        labels = id2label or {0: "LABEL_0"}
        config = config_of(kind, len(tokenizer), context, id2label=labels, **scale)
        config.label2id = {text: index for index, text in labels.items()}
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def classifier(save_classifier):
    """Return a Llama with the labels NEGATIVE and POSITIVE."""
    return save_classifier(id2label=LABELS)


@pytest.fixture
def load(make_settings):
    """Return the reward function that a folder stands for, and its scale."""

    def start(folder, *flags, rows=ROWS):
        settings = make_settings("--reward", str(folder), *map(str, flags))
        return train_rlhf.load_reward(settings, rows, torch.device("cpu"))

    return start


@torch.no_grad()
def logits_of(folder, text, length=None):
    """Return what the model itself gives to one text, to the start and the end of a long one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    ids = tokenizer(text)["input_ids"]
    if length:
        assert len(ids) > length
        ids = [ids[0], *ids[1 - length :]]  # the first is the start token
    return model(torch.tensor([ids])).logits[0]


def odds_of(logits, index):
    """Return ln(p / (1 - p)) of the label's probability p."""
    p = torch.softmax(logits.double(), dim=0)[index]
    return torch.log(p / (1 - p)).item()


# ---------------------------------------------------------------------------------------- the score
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bloom"])
def test_the_score_of_one_label_is_its_logit_whatever_the_batch(save_classifier, load, kind):
    """Neither gpt2 nor bloom has a pad token; and for bloom no text is too long."""
    folder = save_classifier(kind)
    texts = [row["prompt"] + text for row, text in zip(ROWS, TEXTS)]
    wanted = [logits_of(folder, text).item() for text in texts]
    assert max(wanted) - min(wanted) > 0.1  # or it would tell little
    for batch_size in (1, 2, 40):
        reward, scale = load(folder, "--eval-batch-size", batch_size)
        assert scale is None
        assert reward(ROWS, TEXTS) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "flags", "index"),
    [
        (LABELS, [], 1),
        (LABELS, ["--reward-label", "negative"], 0),
        (THREE, ["--reward-label", "NEUTRAL"], 1),
    ],
)
def test_the_score_of_several_labels_is_the_log_odds_of_one(
    save_classifier, load, labels, flags, index
):
    folder = save_classifier(id2label=labels)
    reward, _ = load(folder, *flags)
    texts = [row["prompt"] + text for row, text in zip(ROWS, TEXTS)]
    wanted = [odds_of(logits_of(folder, text), index) for text in texts]
    assert max(wanted) - min(wanted) > 0.1
    assert reward(ROWS, TEXTS) == pytest.approx(wanted, abs=1e-4)


def test_a_prompt_that_is_said_stands_on_a_line_of_its_own(classifier, load):
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Life is"}]
    wanted = odds_of(logits_of(classifier, "Life is\nGood"), 1)
    for prompt, flags in ((messages, []), ("Life is", ["--chat-template"])):
        rows = [{"prompt": prompt}]
        reward, _ = load(classifier, *flags, rows=rows)
        assert reward(rows, ["Good"]) == pytest.approx([wanted], abs=1e-4)
    reward, _ = load(classifier)
    assert reward(ROWS[:1], ["Good"]) != pytest.approx([wanted], abs=1e-3)  # "Life isGood"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_text_that_is_too_long_the_end_counts(save_classifier, load, kind):
    folder = save_classifier(kind, context=16)
    reward, _ = load(folder)
    prompt, text = "I feel so sad and tired " * 9, " but today was a good day."
    wanted = logits_of(folder, prompt + text, length=16).item()
    rows = [{"prompt": prompt}, {"prompt": prompt}, ROWS[0]]
    scores = reward(rows, [text, " at last", " good"])
    short = logits_of(folder, "Life is good").item()
    assert [scores[0], scores[2]] == pytest.approx([wanted, short], abs=1e-4)
    assert scores[1] != pytest.approx(wanted, abs=1e-3)


def test_a_classifier_may_bring_its_scale(save_classifier, load):
    """A reward model's own samples say more than a base model's that hardly ever succeeds."""
    folder = save_classifier(score_mean=2.5, score_std=4.0, score_accuracy=0.75)
    reward, scale = load(folder)
    # Chosen and rejected texts are on both sides of 0, so that more than that is a success.
    assert scale == train_rlhf.AS_IT_IS | {"threshold": 0.0, "accuracy": 0.75}
    texts = [row["prompt"] + text for row, text in zip(ROWS, TEXTS)]
    wanted = [(logits_of(folder, text).item() - 2.5) / 4 for text in texts]
    assert reward(ROWS, TEXTS) == pytest.approx(wanted, abs=1e-4)


# ------------------------------------------------------------------------------------ what is refused
@pytest.fixture
def refused(call_main, tmp_path, capsys):
    """Return the one line that tells why main starts nothing."""

    def start(*flags):
        capsys.readouterr()  # what transformers said while the classifier was saved
        assert call_main("--device", "cpu", *flags) == 2
        first, line = capsys.readouterr().err.splitlines()
        assert first == "Nothing was started or changed:"
        assert not (tmp_path / "trained_model").exists()
        return line

    return start


def test_a_label_that_the_classifier_lacks(refused, save_classifier, demo_model):
    folder = save_classifier(id2label=THREE)
    line = refused("--model-name", demo_model, "--reward", folder)
    name = train_rlhf.shorten(folder)
    assert line == f"- REWARD_LABEL is POSITIVE: give a label of {name}: sad or neutral or glad"


def test_a_language_model_as_reward(refused, demo_model):
    line = refused("--model-name", demo_model, "--reward", demo_model)
    assert line.startswith(f"- REWARD is {train_rlhf.shorten(demo_model)}: it can't be used (")
    remedy = "name a sequence classifier, or give positive_word_reward or FILE.py:FUNCTION"
    assert line.endswith(f"(it is a LlamaForCausalLM): {remedy}")


def test_a_classifier_as_the_model(refused, classifier):
    line = refused("--model-name", classifier)
    assert line.startswith(f"- MODEL_NAME is {train_rlhf.shorten(classifier)}: it can't be used")
    remedy = "name a language model with config.json, *.safetensors and a tokenizer"
    assert line.endswith(f"(it is a LlamaForSequenceClassification): {remedy}")


def test_a_classifier_without_its_head(refused, classifier, demo_model, tmp_path):
    """transformers would make one of random numbers."""
    folder = tmp_path / "headless"
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    weights = {name: weight for name, weight in model.state_dict().items() if "score" not in name}
    model.save_pretrained(folder, state_dict=weights)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(folder)
    line = refused("--model-name", demo_model, "--reward", folder)
    assert "(it lacks weights such as score.weight): name a sequence classifier" in line


# -------------------------------------------------------------------------------------------- a run
def test_a_run_on_a_classifier(call_main, classifier, demo_model, tmp_path):
    flags = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--batch-size", "4"]
    flags += ["--max-new-tokens", "5", "--eval-samples", "6", "--training-epochs", "1"]
    flags += ["--scale-samples", "6", "--reward", classifier]
    assert call_main("--model-name", demo_model, *flags) == 0
    folder = tmp_path / "trained_model"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 8
    for sample in samples[::3]:
        logits = logits_of(classifier, sample["prompt"] + sample["response"])
        assert sample["score"] == pytest.approx(odds_of(logits, 1), abs=1e-4)
    assert report["scale"]["threshold"] is None and report["scale"]["deviation"] > 0
    assert report["base"]["train_prompts"]["success_rate"] is None


# ---------------------------------------------------------------------------------- one that is good
@pytest.fixture(scope="module")
def sentences(shared):
    """Return (label, text) pairs of sentences that people have judged, to train on and to test with."""
    folder, parts = shared("data/sentiment"), []
    for name in ("train", "dev"):
        lines = (folder / f"stsa.binary.{name}").read_text(encoding="utf-8").splitlines()
        parts.append([(int(line[0]), line[2:]) for line in lines])
    return parts


@pytest.fixture(scope="module")
def judge_of_sentiment(sentences, tmp_path_factory):
    """Return the folder of a classifier that was trained on such sentences for a few seconds."""
    training, _ = sentences
    counts = Counter(word for _, text in training for word in text.split())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [word for word, _ in counts.most_common(4000)]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 64, "initializer_range": 0.1}
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), id2label=LABELS, **sizes, **no_dropout)
    model = AutoModelForSequenceClassification.from_config(config)
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():  # begin with the mean of all words, from which it learns quickly
        model.bert.embeddings.position_embeddings.weight.zero_()
        model.bert.embeddings.token_type_embeddings.weight.zero_()
        attention.self.query.weight.zero_()
        for layer in (attention.self.value, attention.output.dense, model.bert.pooler.dense):
            torch.nn.init.eye_(layer.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for start in [*range(0, 5000, 50)] * 2:
        batch = training[start : start + 50]
        texts = [text for _, text in batch]
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        labels = torch.tensor([label for label, _ in batch])
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_scores_of_a_trained_classifier_go_the_right_way(judge_of_sentiment, load, sentences):
    _, unseen = sentences
    rows = [{"prompt": "they say that"}] * len(unseen)
    reward, _ = load(judge_of_sentiment)
    scores = torch.tensor(reward(rows, [" " + text for _, text in unseen]))
    positive = torch.tensor([label for label, _ in unseen]).bool()
    middle = scores.median()
    right = ((scores > middle) == positive).float().mean()
    assert right > 0.65
    assert scores[positive].mean() > scores[~positive].mean() + 0.5 * scores.std()
    reward, _ = load(judge_of_sentiment, "--reward-label", "NEGATIVE")
    negative = torch.tensor(reward(rows[:9], [" " + text for _, text in unseen[:9]]))
    assert torch.allclose(negative, -scores[:9], atol=1e-4)
