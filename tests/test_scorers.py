"""What scores texts: a function as TRL's GRPOTrainer calls one, or a sequence classifier."""

import asyncio
import contextlib
import functools
import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy
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

from finetune.classifiers import last_message
from finetune.errors import RunError, SettingsError, Stopped, shorten
from finetune.scale import Scale, scale_of, success_rate
from finetune.scorers import Scorer, call_scorer, load_scorer

FORM = "let f(prompts, completions, **kwargs) return a finite number for each completion"
MATCH = re.escape(FORM)
CPU = torch.device("cpu")
HI = [{"role": "user", "content": "Hi"}]


def call(function, rows, texts):
    return call_scorer("REWARD", function, rows, texts)


def score(function, text):
    (value,) = call(function, [{"prompt": "Life is"}], [text])
    return value


def line_of(function, number=0):
    """Return the place that a message names: so many lines below the first of a function."""
    path = __file__.removeprefix(f"{os.getcwd()}/")
    return f"{path}, line {function.__code__.co_firstlineno + number}"


# ---------------------------------------------------------------- the function
def see(seen):
    """Return a reward function that notes what it is given, and gives 1 for the first, 2, 3…"""

    def kindness(prompts, completions, **kwargs):
        seen.append({"prompts": prompts, "completions": completions} | kwargs)
        return range(1, len(completions) + 1)

    return kindness


def test_a_function_gets_prompts_completions_and_all_other_fields_as_lists_by_keyword():
    seen = []
    rows = [{"answer": 7, "prompt": "A", "hint": None}, {"answer": 8, "prompt": "B", "hint": "no"}]
    assert call(see(seen), rows, [" a", " b"]) == [1.0, 2.0]
    fields = {"answer": [7, 8], "hint": [None, "no"]}
    assert seen == [{"prompts": ["A", "B"], "completions": [" a", " b"]} | fields]


def test_rows_of_messages_give_conversations_and_texts_stay_texts():
    seen, rows = [], [{"prompt": HI}, {"prompt": "Life is"}]
    assert call(see(seen), rows, ["Hello", " good"]) == [1.0, 2.0]
    answer = [{"role": "assistant", "content": "Hello"}]
    assert seen == [{"prompts": [HI, "Life is"], "completions": [answer, " good"]}]


def test_what_a_function_does_to_its_arguments_stays_its_own_affair():
    rows = [{"prompt": [dict(HI[0])], "answer": ["a"]}]

    def spoil(prompts, completions, answer):
        prompts[0][-1]["content"] = answer[0][0] = "spoilt"
        return [1.0]

    assert call(spoil, rows, ["Hello"]) == [1.0]
    assert rows == [{"prompt": HI, "answer": ["a"]}]


@pytest.mark.parametrize(
    "numbers",
    [
        [True, 2],
        (number for number in (1, 2)),
        numpy.array([1, 2], dtype=numpy.float16),
        [numpy.float32(1), numpy.int64(2)],
        torch.tensor([1, 2], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2)],
    ],
    ids=["switch", "generator", "float16", "numpy", "bfloat16", "torch"],
)
def test_scores_are_floats_whatever_numbers_the_function_gives(numbers):
    values = call(lambda **_: numbers, [{"prompt": "I"}] * 2, ["a", "b"])
    assert [type(value) for value in values] == [float, float]
    assert values == [1.0, 2.0]


@pytest.mark.parametrize(
    ("chat_template", "texts"),
    [(False, ["Hi\n", "Life is"]), (True, ["Hi\n", "Life is\n"])],
)
def test_what_wants_texts_gets_what_was_said_last_on_a_line_of_its_own(chat_template, texts):
    """A classifier does; the rows stay as they are, and other fields are not for it."""
    seen, rows = [], [{"prompt": HI * 2, "answer": 3}, {"prompt": "Life is", "answer": 4}]
    scorer = Scorer("REWARD", see(seen), chat_template, text_before=last_message)
    assert scorer(rows, ["a", "b"]) == [1.0, 2.0]
    assert seen == [{"prompts": texts, "completions": ["a", "b"]}]
    assert rows[0]["prompt"] == HI * 2


# ---------------------------------------------------------------- its failures
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("-inf"), 1e15, 10**400, 1j, "1.0", None, [1.0], [1.0, 2.0]],
    ids=str,
)
def test_a_score_that_is_no_finite_number_stops_the_run_and_shows_the_text(value):
    def kindness(completions, **kwargs):
        return [value if "what" in text else 1.0 for text in completions]

    rows = [{"prompt": "I"}] * 3
    for texts in ([" what it is"], [" so", " what it is", " is"]):
        with pytest.raises(RunError) as error:
            call(kindness, rows, texts)
        assert str(error.value).startswith("REWARD is kindness: ")
        assert str(error.value).endswith(f" for ' what it is' in {line_of(kindness)}: {FORM}")


@pytest.mark.parametrize(
    "returned", [None, 1.0, [], [1.0, 2.0], "1", numpy.array(["1"]), torch.tensor(1.0)], ids=str
)
def test_what_is_no_number_for_each_text_stops_the_run(returned):
    with pytest.raises(RunError, match=f"REWARD is <lambda>: .* for ' so' in .*: {MATCH}"):
        score(lambda **_: returned, " so")


def test_a_number_too_few_is_told_with_what_came():
    """Of one text, or of two, it would be right, so no single text is to blame."""

    def kindness(completions, **kwargs):
        return [1.5] * min(2, len(completions))

    with pytest.raises(RunError) as error:
        call(kindness, [{"prompt": "I"}] * 3, "abc")
    assert "ValueError('it returned [1.5, 1.5] for 3 texts') for 'a' in " in str(error.value)


class Flaky:
    """A reward function that fails in some of its calls, and notes each of them."""

    __name__ = "flaky"

    def __init__(self, *fails):
        self.fails, self.calls = [*fails], []

    def __call__(self, prompts, completions, **kwargs):
        self.calls.append(completions)
        error = self.fails.pop(0) if self.fails else None
        if error:
            raise error
        return [float(len(text)) for text in completions]


ROWS_OF_3 = [{"prompt": "I"}] * 3


def test_a_call_that_fails_is_tried_once_more_as_a_whole():
    flaky = Flaky(TimeoutError("busy"))
    assert call(flaky, ROWS_OF_3, ["a", "ab", "abc"]) == [1.0, 2.0, 3.0]
    assert flaky.calls == [["a", "ab", "abc"]] * 2


def test_what_is_answered_text_by_text_is_not_thrown_away():
    flaky = Flaky(TimeoutError("busy"), TimeoutError("busy"))
    assert call(flaky, ROWS_OF_3, ["a", "ab", "abc"]) == [1.0, 2.0, 3.0]
    assert flaky.calls[2:] == [["a"], ["ab"], ["abc"]]


@pytest.mark.parametrize("error", [TimeoutError("busy"), ConnectionError("refused")], ids=repr)
def test_a_service_that_does_not_answer_is_told_as_such(error):
    with pytest.raises(RunError) as told:
        call(Flaky(*[error] * 9), ROWS_OF_3, "abc")
    told = str(told.value)
    assert told.startswith(f"REWARD is flaky: {error!r} for 'a' in ")
    assert told.endswith("see that what it asks can be reached, then go on with --resume")


def test_a_function_may_be_a_coroutine_that_asks_about_all_texts_at_once():
    asked = []

    async def judge(prompts, completions, **kwargs):
        asked.append(completions)

        async def ask(text):
            await asyncio.sleep(0.01)
            return float(len(text))

        return await asyncio.gather(*[ask(text) for text in completions])

    assert call(judge, ROWS_OF_3, ["a", "ab", "abc"]) == [1.0, 2.0, 3.0]
    assert asked == [["a", "ab", "abc"]]


@pytest.mark.parametrize(
    "error",
    [ValueError("no idea"), SystemExit(3), RecursionError(), AssertionError("a\nb")],
    ids=repr,
)
def test_a_function_that_raises_stops_the_run_and_shows_text_and_line(error):
    def helper(text):
        if text == "bad":
            raise error

    def kindness(prompts, completions, **kwargs):
        for text in completions:
            helper(text)
        return [1.0] * len(completions)

    with pytest.raises(RunError) as caught:
        call(kindness, [{"prompt": "I"}] * 3, ["good", "bad", "good"])
    place = line_of(helper, 2)
    assert str(caught.value) == f"REWARD is kindness: {error!r} for 'bad' in {place}: {FORM}"
    assert caught.value.__cause__ is error


def test_a_function_of_one_text_is_told_where_it_stands():
    def kindness(text):
        return 1.0

    with pytest.raises(RunError) as error:
        score(kindness, " so")
    assert str(error.value).startswith("REWARD is kindness: TypeError(")
    assert str(error.value).endswith(f" for ' so' in {line_of(kindness)}: {FORM}")


def test_the_line_of_a_decorated_function_is_one_of_its_file():
    """The decorator stands in another file, and so does what raises."""

    @contextlib.contextmanager
    def quietly():
        yield

    @quietly()
    def kindness(prompts, completions, **kwargs):
        return json.loads("{")

    with pytest.raises(RunError) as error:
        score(kindness, " so")
    assert f" for ' so' in {line_of(kindness.__wrapped__, 2)}: " in str(error.value)


class Unnamed:
    def __call__(self, **kwargs):
        return None


@pytest.mark.parametrize(
    ("function", "name"),
    [(Unnamed(), "Unnamed"), (functools.partial(lambda **kwargs: None), "partial")],
)
def test_a_function_without_a_name_is_told_by_its_type(function, name):
    with pytest.raises(RunError, match=f"REWARD is {name}: .* for ' what it is' in it: {MATCH}"):
        score(function, " what it is")


def test_ctrl_c_is_no_failure_of_the_function():
    def slow(**kwargs):
        raise Stopped(2)

    with pytest.raises(Stopped):
        score(slow, " what it is")


def test_a_function_is_tried_on_a_response_that_is_empty_as_each_begins():
    """What fails there is a bad setting: nothing has been started."""

    def kindness(completions, **kwargs):
        return [len(text) / text.count(" ") for text in completions]

    scorer = Scorer("REWARD", kindness, chat_template=False)
    with pytest.raises(SettingsError) as error:
        scorer.try_out([{"prompt": "I"}])
    (problem,) = error.value.args
    assert problem.startswith("REWARD is kindness: ZeroDivisionError('division by zero')")
    assert problem.endswith(f" for '' in {line_of(kindness, 1)}: {FORM}")


# ------------------------------------------------------------------- the scale
@pytest.mark.parametrize(
    ("scores", "shown", "threshold"),
    [
        ([-1.0] * 9 + [1.0], "-1 or 1", 0.0),
        ([0.0] * 199 + [1.0], "0 or 1", 0.5),
        ([10.0, 4.0] * 20, "4 or 10", 7.0),
        ([-1.0] * 200, "-1", -1.0),  # and what is better is a success
    ],
)
def test_a_rule_with_two_scores_is_left_alone_and_success_is_above_their_middle(
    capsys, scores, shown, threshold
):
    scores = torch.tensor(scores, dtype=torch.float64)
    scale = scale_of(scores)
    assert scale == Scale(threshold=threshold, is_rule=True)
    assert torch.equal(scale.apply(scores), scores)
    line = f"Scale     the base model's samples score {shown}: left as it is\n\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    "scores",
    [
        torch.linspace(0, 1, 60),
        44 + 10 * torch.randn(60, generator=torch.Generator().manual_seed(0)),
        -torch.arange(60).remainder(7),
    ],
    ids=["even", "normal", "lengths"],
)
def test_graded_scores_get_mean_0_and_deviation_1(capsys, scores):
    """Near the mean that is what is trained on, far away its logarithm, and the order is kept."""
    scores = scores.double()
    scale = scale_of(scores)
    mean, deviation = scores.mean().item(), scores.std().item()
    assert scale == Scale(mean=mean, deviation=deviation, graded=True)
    line = f"Scale     the base model's {mean:.3g} ± {deviation:.3g} becomes 0 ± 1\n\n"
    assert capsys.readouterr().out == line
    scaled = (scores - mean) / deviation
    near = scaled.abs() < 0.3
    applied = scale.apply(scores)
    torch.testing.assert_close(applied[near], scaled[near], rtol=0.02, atol=0)
    far = scale.apply(mean + 1000 * deviation * torch.tensor([1, -1], dtype=torch.float64))
    assert far.tolist() == pytest.approx([math.log(2000), -math.log(2000)])
    assert torch.equal(applied.argsort(stable=True), scores.argsort(stable=True))


@pytest.mark.parametrize("best", [1.0, 50.0])
def test_scores_of_which_all_but_a_few_are_alike_are_not_blown_up(best):
    """Their deviation is tiny: divided by that alone, the best would be worth any KL."""
    scores = torch.tensor([0.0] * 198 + [0.5, best], dtype=torch.float64)
    assert (best - scores.mean()) / scores.std() > 12
    applied = scale_of(scores).apply(scores)
    assert 1 < applied[-1] - applied[0] < 4


@pytest.mark.parametrize(("threshold", "rate"), [(None, None), (0.0, 0.5), (-1, 0.75), (2.5, 0.0)])
def test_a_success_is_a_score_above_the_threshold(threshold, rate):
    assert success_rate([-1.0, 0.0, 0.5, 2.5], threshold) == rate


# -------------------------------------------------------------- the classifier
LABELS = {0: "NEGATIVE", 1: "POSITIVE"}
THREE = {0: "sad", 1: "Neutral", 2: "glad"}
ROWS = [{"prompt": "Life is"}, {"prompt": "I feel so"}, {"prompt": "My day was long, and"}]
TEXTS = [" good", "", " sad, but then it was a wonderful day, and I love it."]
WHOLE = [row["prompt"] + text for row, text in zip(ROWS, TEXTS)]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


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


def bert_tokenizer(words):
    return BertTokenizer(vocab={word: place for place, word in enumerate([*MARKS, *words])})


@pytest.fixture(scope="module")
def save_classifier(demo_model, tmp_path_factory):
    """Save a random classifier, with the tokenizer of demo_model if it has none of its kind."""

    def save(kind="llama", id2label=None, context=64, **scale):
        folder = tmp_path_factory.mktemp("classifier")
        tokenizer = AutoTokenizer.from_pretrained(demo_model)
        if kind == "bert":
            tokenizer = bert_tokenizer([*LETTERS, ".", ",", *(f"##{each}" for each in LETTERS)])
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
        return str(folder)

    return save


@pytest.fixture(scope="module")
def classifier(save_classifier):
    """Return a Llama with the labels NEGATIVE and POSITIVE."""
    return save_classifier(id2label=LABELS)


def load(folder, label="POSITIVE", chat_template=False):
    """Return the scorer that a folder stands for, and its scale."""
    return load_scorer("REWARD", folder, None, label, 40, chat_template, CPU)


def refusal(folder, label="POSITIVE"):
    """Return the line that tells why a folder is no classifier."""
    with pytest.raises(SettingsError) as error:
        load(folder, label)
    (problem,) = error.value.args
    return problem


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bloom"])
def test_the_score_of_one_label_is_its_logit_whatever_the_batch(save_classifier, kind):
    """Neither gpt2 nor bloom has a pad token; and for bloom no text is too long."""
    folder = save_classifier(kind)
    texts = [*TEXTS[:-1], TEXTS[-1] * (50 if kind == "bloom" else 1)]
    whole = [row["prompt"] + text for row, text in zip(ROWS, texts)]
    wanted = [logits_of(folder, text).item() for text in whole]
    assert max(wanted) - min(wanted) > 0.1  # or it would tell little
    scorer, scale = load(folder)
    assert scale is None
    for batch_size in (1, 2, 40):
        some = replace(scorer, function=replace(scorer.function, batch_size=batch_size))
        assert some(ROWS, texts) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bloom"])
def test_all_beginnings_are_scored_as_if_each_was_asked_alone(save_classifier, kind):
    """A causal model reads them in few passes; where its tokens are not in line, in more."""
    scorer, _ = load(save_classifier(kind))
    assert scorer.function.reads_beginnings == (kind != "bert")
    texts = [text[:end] for text in TEXTS if text for end in range(len(text) + 1)]
    rows = [{"prompt": "Life is"}] * len(texts)
    alone = [scorer([row], [text])[0] for row, text in zip(rows, texts)]
    assert max(alone) - min(alone) > 0.1
    one_by_one = replace(scorer, function=replace(scorer.function, reads_beginnings=False))
    for batch_size in (3, 40):
        for way in (scorer, one_by_one):
            some = replace(way, function=replace(way.function, batch_size=batch_size))
            assert some(rows, texts) == pytest.approx(alone, abs=1e-4)


def test_the_beginnings_of_a_response_take_a_single_pass(save_classifier, monkeypatch):
    scorer, _ = load(save_classifier())
    model, read = scorer.function.model, []
    forward = model.model.forward

    def note(input_ids, **others):
        read.append(tuple(input_ids.shape))
        return forward(input_ids, **others)

    monkeypatch.setattr(model.model, "forward", note)
    words = ["I", "am", "so", "happy", "today", "and", "so", "is", "she"]
    texts = [" ".join(["", *words[:count]]) for count in range(len(words) + 1)]
    scorer([{"prompt": "Life is"}] * len(texts), texts)
    ((rows, _),) = read
    assert rows == 1


@pytest.mark.parametrize(
    ("labels", "label", "index"),
    [(LABELS, "POSITIVE", 1), (LABELS, "negative", 0), (THREE, "NEUTRAL", 1)],
)
def test_the_score_of_several_labels_is_the_log_odds_of_one(save_classifier, labels, label, index):
    folder = save_classifier(id2label=labels)
    scorer, _ = load(folder, label)
    wanted = [odds_of(logits_of(folder, text), index) for text in WHOLE]
    assert max(wanted) - min(wanted) > 0.1
    assert scorer(ROWS, TEXTS) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("problem_type", "meaning"),
    [
        ("single_label_classification", "the log-odds of glad among its labels"),
        ("multi_label_classification", "the log-odds of glad by itself"),
        ("regression", "the output glad"),
    ],
)
def test_what_an_output_means_hangs_on_how_the_classifier_was_trained(
    save_classifier, problem_type, meaning
):
    """Where several labels may be right, or none, the others say nothing of one."""
    folder = save_classifier(id2label=THREE, problem_type=problem_type)
    scorer, _ = load(folder, "GLAD")
    texts = [" fine", " I am so happy"]
    logits = scorer.function.logits_of([f"Life is{text}" for text in texts])
    wanted = logits[:, 2]
    if problem_type == "single_label_classification":
        wanted = torch.log_softmax(logits, 1)[:, 2]
        wanted = wanted - torch.log1p(-wanted.exp())
    scores = scorer([{"prompt": "Life is"}] * 2, texts)
    assert scores == pytest.approx(wanted.tolist(), abs=1e-5)
    assert scorer.meaning == meaning


def test_a_label_may_be_given_by_its_index(save_classifier):
    folder = save_classifier(id2label=THREE)
    assert load(folder, "2")[0].function.output == load(folder, "glad")[0].function.output
    assert "REWARD_LABEL is 3: " in refusal(folder, "3")


def test_a_prompt_that_is_said_stands_on_a_line_of_its_own(classifier):
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Life is"}]
    rows = [{"prompt": messages}, {"prompt": "Life is"}]
    wanted = [odds_of(logits_of(classifier, f"Life is{end}Good"), 1) for end in ("\n", "")]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    scorer, _ = load(classifier)
    assert scorer(rows, ["Good"] * 2) == pytest.approx(wanted, abs=1e-4)
    scorer = replace(scorer, chat_template=True)
    assert scorer(rows, ["Good"] * 2) == pytest.approx(wanted[:1] * 2, abs=1e-4)


def test_a_prompt_with_tools_is_one_for_a_classifier_from_elsewhere(classifier):
    """It does not know them: it gets the last message, as of any other conversation."""
    scorer, _ = load(classifier)
    rows = [{"prompt": HI, "tools": [{"name": "clock"}]}, {"prompt": HI, "tools": None}]
    wanted = odds_of(logits_of(classifier, "Hi\nGood"), 1)
    assert scorer(rows, ["Good"] * 2) == pytest.approx([wanted] * 2, abs=1e-4)


def test_a_text_with_a_start_token_of_its_own_gets_no_second_one(classifier):
    scorer, _ = load(classifier)
    rows = [{"prompt": "<s>Life is"}, {"prompt": "Life is"}]
    wanted = odds_of(logits_of(classifier, "Life is good"), 1)
    assert scorer(rows, [" good"] * 2) == pytest.approx([wanted] * 2, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_text_that_is_too_long_the_end_counts(save_classifier, kind):
    folder = save_classifier(kind, context=16)
    scorer, _ = load(folder)
    prompt, text = "I feel so sad and tired " * 9, " but today was a good day."
    wanted = logits_of(folder, prompt + text, length=16).item()
    rows = [{"prompt": prompt}, {"prompt": prompt}, ROWS[0]]
    scores = scorer(rows, [text, " at last", " good"])
    short = logits_of(folder, "Life is good").item()
    assert [scores[0], scores[2]] == pytest.approx([wanted, short], abs=1e-4)
    assert scores[1] != pytest.approx(wanted, abs=1e-3)


def test_a_classifier_may_bring_its_scale(save_classifier):
    """A reward model's own samples say more than a base model's that hardly ever succeeds.

    Chosen and rejected texts are on both sides of 0, so that more than that is a success.
    """
    folder = save_classifier(score_mean=2.5, score_std=4.0, score_accuracy=0.75)
    scorer, scale = load(folder)
    assert scale == Scale(threshold=0.0, accuracy=0.75)
    wanted = [(logits_of(folder, text).item() - 2.5) / 4 for text in WHOLE]
    assert scorer(ROWS, TEXTS) == pytest.approx(wanted, abs=1e-4)


# ------------------------------------------------------------- what is refused
REMEDY = "name a sequence classifier, or give positive_word_reward or FILE.py:FUNCTION"


def test_a_label_that_the_classifier_lacks(save_classifier):
    folder = save_classifier(id2label=THREE)
    remedy = f"give a label of {shorten(folder)}: sad or Neutral or glad, or its index"
    assert refusal(folder) == f"REWARD_LABEL is POSITIVE: {remedy}"


def test_a_language_model_is_no_classifier(demo_model):
    start = f"REWARD is {shorten(demo_model)}: it can't be used"
    assert refusal(str(demo_model)) == f"{start} (it is a LlamaForCausalLM): {REMEDY}"


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(classifier, tmp_path):
    """Both numbers are told, and that it is the classifier's fault."""
    folder = shutil.copytree(classifier, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(4)])
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    tokenizer.save_pretrained(folder)
    problem = refusal(str(folder))
    assert problem.startswith(f"REWARD is {shorten(folder)}: it can't be used (its tokenizer has")
    assert f"'<another pad>' with the id {rows + 4}, but its embedding has {rows} rows" in problem


def test_a_text_with_a_token_that_the_embedding_lacks(classifier, tmp_path):
    """Padding and end token have rows, but what an added token means has none."""
    folder = shutil.copytree(classifier, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["onderfu"])
    tokenizer.save_pretrained(folder)
    scorer, _ = load(str(folder))
    with pytest.raises((SettingsError, RunError), match="its embedding has"):
        scorer([{"prompt": "Life is"}], [" wonderful"])


def test_a_classifier_without_its_head(classifier, tmp_path):
    """transformers would make one of random numbers."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    weights = {name: weight for name, weight in model.state_dict().items() if "score" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    AutoTokenizer.from_pretrained(classifier).save_pretrained(tmp_path)
    problem = refusal(str(tmp_path))
    assert problem.endswith(f"(it lacks weights such as score.weight): {REMEDY}")
