"""The reward: the default rule, a function of the user as TRL's GRPOTrainer calls one, its failures."""

import functools
import hashlib
import json
import math
import re

import numpy
import pytest
import torch

import train_rlhf
from train_rlhf import RunError, positive_word_reward

REMEDY = "let f(prompts, completions, **kwargs) return a finite number for each completion"
CPU = torch.device("cpu")
MATCH = re.escape(REMEDY)
FAST = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--batch-size", "4"]
FAST += ["--max-new-tokens", "5", "--eval-samples", "6"]


def positive(text, *words, prompt="Say:"):
    (value,) = positive_word_reward(
        prompts=[prompt], completions=[text], positive_words=words or None
    )
    return value


def score(reward, text, prompt="Life is"):
    (value,) = train_rlhf.call_reward(reward, [{"prompt": prompt}], [text])
    return value


# --------------------------------------------------------------------------------- positive words
@pytest.mark.parametrize(
    "text",
    [
        "happy",
        " happy and proud",
        "I am so HAPPY",
        "GlAd of it",
        "It was good.",
        '"good"',
        "so\ngood\nindeed",
        "a feel-good film",  # a hyphen parts words
        "love's labour",  # and so does an apostrophe
        "l'amour is love",
        "¡good!",
        "unhappy, but glad",
        "很 good 很",
    ],
)
def test_a_positive_word_scores_one(text):
    assert positive(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "unhappy",
        "goodbye",
        "killjoy",
        "good_",
        "good2",
        "h a p p y",
        "hap-py",
        "goodé",
        "égood",
        "나는 행복해요",
        "очень хорошо",
    ],
)
def test_without_a_positive_word_the_score_is_minus_one(text):
    assert positive(text) == -1.0


def test_every_default_word_counts():
    for word in train_rlhf.POSITIVE_WORDS:
        assert positive(f"so {word}!") == 1.0
        assert positive(f"so {word.upper()}!") == 1.0
        assert positive(f"un{word}") == positive(f"{word}x") == -1.0


@pytest.mark.parametrize(
    ("words", "text", "score"),
    [
        (["calm"], "happy", -1.0),
        (["calm", "serene"], "so serene", 1.0),
        (["Calm"], "so cALM", 1.0),
        (["over the moon"], "I am over the moon!", 1.0),
        (["over the moon"], "over the moonlight", -1.0),
        (["c++"], "I like C++.", 1.0),
        (["c++"], "I like ccc", -1.0),
        (["g.od"], "good", -1.0),
        (["(yay)"], "well (yay)", 1.0),
        (["(yay)"], "well yay", -1.0),
        (["[a-z]"], "x", -1.0),
        (["a|b"], "b", -1.0),
        ([":)"], "fine :)", 1.0),
        (["행복"], "정말 행복 !", 1.0),
        (["행복"], "정말 행복해요", -1.0),
        (["schön"], "Wie SCHÖN!", 1.0),
        (["schon"], "schön", -1.0),
        (["self-made"], "a self-made man", 1.0),
        (["don't"], "I don't", 1.0),
    ],
)
def test_words_of_the_user(words, text, score):
    assert positive(text, *words) == score


def test_the_default_reward_takes_the_words_of_the_settings(make_settings):
    settings = make_settings("--positive-words", "calm", "serene")
    rows = [{"prompt": "Life is"}] * 2
    reward, scale = train_rlhf.load_reward(settings, rows, CPU)
    assert reward(rows, [" so serene", " so happy"]) == [1.0, -1.0]
    assert scale == train_rlhf.AS_IT_IS | {"threshold": 0.0}
    assert (scale["mean"], scale["deviation"], scale["graded"]) == (0.0, 1.0, False)


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Life is", " good", 1.0),
        ("Life is", "good", -1.0),  # "Life isgood"
        ("I feel un", "happy", -1.0),
        ("I feel un", "happy and glad", 1.0),
        ("I feel like a kill", "joy", -1.0),
        ("Life is ", "good", 1.0),
        ("Life is:", "good", 1.0),
        ("Life is", "-good", 1.0),
        ("Life is", "", -1.0),
        ("나는", "good", -1.0),
        ("나는", "행복 good", 1.0),
    ],
)
def test_letters_that_prolong_the_last_word_of_the_prompt_are_no_word(prompt, text, expected):
    assert positive(text, prompt=prompt) == expected


def test_the_default_reward_takes_the_answer_to_a_conversation_as_a_text_of_its_own(make_settings):
    """What the user said last is no word that the answer could prolong."""
    messages = [{"role": "user", "content": "Say good"}]
    prompts = [messages, "Say good"]
    for flags, expected in (([], [1.0, -1.0]), (["--chat-template"], [1.0, 1.0])):
        rows = [{"prompt": prompt} for prompt in prompts]
        reward, _ = train_rlhf.load_reward(make_settings(*flags), rows, CPU)
        assert reward(rows, ["glad", "glad"]) == expected


# --------------------------------------------------------------------------- responses and tokens
class Letters:
    """A tokenizer of characters."""

    eos_token_id = 0

    def batch_decode(self, rows, **_):
        return ["".join(chr(int(number)) for number in ids) for ids in rows]


def ids_of(texts):
    return [torch.tensor([ord(letter) for letter in text]) for text in texts]


@pytest.mark.parametrize(
    ("score_prefixes", "expected"),
    [
        (True, [[0, 0, 0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 2, -2, 0], [0, 0, 0], [0]]),
        (False, [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1], [0, 0, -1], [-1]]),
    ],
)
def test_a_token_earns_what_it_adds_to_the_score_and_all_is_asked_in_one_call(
    score_prefixes, expected
):
    prompts = ["I am", "I am", "I am", "Life is"]
    texts = [" glad ly", " gladly", "joy", "!"]  # the second is taken back, the third is "amjoy"
    rows = [{"prompt": prompt} for prompt in prompts]
    calls = []

    def reward(rows, texts):
        calls.append(texts)
        return positive_word_reward([row["prompt"] for row in rows], texts)

    parts = Letters(), rows, ids_of(prompts), ids_of(texts), score_prefixes
    scores, token_scores = train_rlhf.score_responses(reward, train_rlhf.AS_IT_IS, *parts)
    assert scores == [1.0, -1.0, -1.0, -1.0]
    assert [each.tolist() for each in token_scores] == expected
    assert all(each.dtype == torch.float32 for each in token_scores)
    (asked,) = calls
    beginnings = [text[:end] for text in texts for end in range(len(text) + 1)]
    assert asked == (beginnings if score_prefixes else texts)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("score_prefixes", [True, False])
def test_what_tokens_earn_is_on_the_scale_and_the_scores_are_as_they_were_given(
    score_prefixes, graded
):
    scale = {"mean": 10.0, "deviation": 4.0, "graded": graded, "threshold": None}
    rows, queries, responses = [{"prompt": "I"}] * 2, ids_of("II"), ids_of(["ab", "c"])
    given = {"": 8.0, "a": 20.0, "ab": 12.0, "c": 6.0}

    def reward(rows, texts):
        return [given[text] for text in texts]

    parts = Letters(), rows, queries, responses, score_prefixes
    scores, token_scores = train_rlhf.score_responses(reward, scale, *parts)
    assert scores == [12.0, 6.0]
    empty, a, ab, c = (math.asinh(x) if graded else x for x in (-0.5, 2.5, 0.5, -1.0))
    wanted = [[a - empty, ab - a], [c - empty]] if score_prefixes else [[0.0, ab], [c]]
    for earned, each in zip(token_scores, wanted):
        assert earned.tolist() == pytest.approx(each)


# ---------------------------------------------------------------------------- a function of the user
def see(seen):
    """Return a reward function that notes what it is given, and gives 1 for the first, 2, 3…"""

    def kindness(prompts, completions, **kwargs):
        seen.append({"prompts": prompts, "completions": completions} | kwargs)
        return range(1, len(completions) + 1)

    return kindness


def test_a_function_gets_prompts_completions_and_all_other_fields_as_lists_by_keyword():
    seen, rows = [], [{"answer": 7, "prompt": "A", "hint": None}, {"answer": 8, "prompt": "B"}]
    rows[1]["hint"] = "no"
    assert train_rlhf.call_reward(see(seen), rows, [" a", " b"]) == [1.0, 2.0]
    fields = {"answer": [7, 8], "hint": [None, "no"]}
    assert seen == [{"prompts": ["A", "B"], "completions": [" a", " b"]} | fields]


def test_a_function_with_the_arguments_that_it_needs_is_enough():
    def right(completions, answer, **kwargs):
        return [float(text.strip() == wanted) for text, wanted in zip(completions, answer)]

    rows = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 =", "answer": "3"}]
    assert train_rlhf.call_reward(right, rows, [" 2", " 2"]) == [1.0, 0.0]


def test_rows_of_messages_give_conversations_and_texts_stay_texts():
    seen, messages = [], [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": messages}, {"prompt": "Life is"}]
    assert train_rlhf.call_reward(see(seen), rows, ["Hello", " good"]) == [1.0, 2.0]
    answer = [{"role": "assistant", "content": "Hello"}]
    assert seen == [{"prompts": [messages, "Life is"], "completions": [answer, " good"]}]


@pytest.mark.parametrize("flags", [[], ["--chat-template"]], ids=["plain", "chat"])
def test_the_prompts_of_a_function_are_those_of_the_rows_whatever_the_template(
    make_settings, monkeypatch, flags
):
    seen, rows = [], [{"prompt": "A"}, {"prompt": "B"}, {"prompt": "C"}]
    monkeypatch.setattr(train_rlhf, "REWARD", see(seen))
    reward, scale = train_rlhf.load_reward(make_settings(*flags), rows, CPU)
    assert scale is None  # which is measured
    assert seen == [{"prompts": ["A", "C"], "completions": ["", " fine"]}]  # the try
    assert reward(rows, ["a", "b", "c"]) == [1.0, 2.0, 3.0]
    assert seen[1:] == [{"prompts": ["A", "B", "C"], "completions": ["a", "b", "c"]}]


@pytest.mark.parametrize(
    "numbers",
    [
        [1, 2],
        (1.0, 2.0),
        [True, 2],
        (number for number in (1, 2)),
        numpy.array([1, 2]),
        numpy.array([1, 2], dtype=numpy.float16),
        [numpy.float32(1), numpy.int64(2)],
        torch.tensor([1, 2], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2)],
    ],
    ids=["list", "tuple", "switch", "generator", "array", "float16", "numpy", "bfloat16", "torch"],
)
def test_scores_are_floats_whatever_numbers_the_reward_gives(numbers):
    values = train_rlhf.call_reward(lambda **_: numbers, [{"prompt": "I"}] * 2, ["a", "b"])
    assert [type(value) for value in values] == [float, float]
    assert values == [1.0, 2.0]


# ------------------------------------------------------------------------------------- its failures
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
            train_rlhf.call_reward(kindness, rows, texts)
        assert str(error.value).startswith("REWARD is kindness: ")
        line = kindness.__code__.co_firstlineno
        place = f"{__file__}, line {line}"
        assert str(error.value).endswith(f" for ' what it is' in {place}: {REMEDY}")


@pytest.mark.parametrize("given", [None, 1.0, [], [1.0, 2.0], "1", torch.tensor(1.0)], ids=str)
def test_what_is_no_number_for_each_text_stops_the_run(given):
    with pytest.raises(RunError, match=f"REWARD is <lambda>: .* for ' so' in .*: {MATCH}"):
        score(lambda **_: given, " so")


def test_a_number_too_few_is_told_with_what_came():
    with pytest.raises(RunError) as error:
        rows = [{"prompt": "I"}] * 3
        train_rlhf.call_reward(
            lambda completions, **_: [1.5] * min(2, len(completions)), rows, "abc"
        )
    assert "ValueError('it returned [1.5, 1.5] for 3 texts') for 'a' in " in str(error.value)


@pytest.mark.parametrize(
    "error",
    [ValueError("no idea"), SystemExit(3), RecursionError(), AssertionError("a\nb")],
    ids=repr,
)
def test_a_reward_that_raises_stops_the_run_and_shows_text_and_line(error):
    def kindness(prompts, completions, **kwargs):
        for text in completions:
            if text == "bad":
                raise error
        return [1.0] * len(completions)

    with pytest.raises(RunError) as caught:
        train_rlhf.call_reward(kindness, [{"prompt": "I"}] * 3, ["good", "bad", "good"])
    line = kindness.__code__.co_firstlineno + 3
    place = f"{__file__}, line {line}"
    assert str(caught.value) == f"REWARD is kindness: {error!r} for 'bad' in {place}: {REMEDY}"
    assert caught.value.__cause__ is error


def test_a_reward_that_has_not_the_arguments_is_told_where_it_stands():
    def kindness(text):
        return 1.0

    with pytest.raises(RunError) as error:
        score(kindness, " so")
    place = f"{__file__}, line {kindness.__code__.co_firstlineno}"
    assert str(error.value).startswith("REWARD is kindness: TypeError(")
    assert str(error.value).endswith(f" for ' so' in {place}: {REMEDY}")


def test_the_line_of_a_decorated_reward_is_one_of_its_file():
    def decorate(function):
        @functools.wraps(function)
        def call(**kwargs):
            return json.loads(function(**kwargs))  # what raises stands in another file

        return call

    @decorate
    def kindness(prompts, completions, **kwargs):
        return "{"

    with pytest.raises(RunError) as error:
        score(kindness, " so")
    line = kindness.__wrapped__.__code__.co_firstlineno - 4
    assert f" for ' so' in {__file__}, line {line}: " in str(error.value)


def test_ctrl_c_is_no_failure_of_the_reward():
    def slow(**kwargs):
        raise train_rlhf.Stopped(2)

    with pytest.raises(train_rlhf.Stopped):
        score(slow, " what it is")


class Unnamed:
    def __call__(self, **kwargs):
        return None


@pytest.mark.parametrize(
    ("reward", "name"),
    [(Unnamed(), "Unnamed"), (functools.partial(lambda **kwargs: None), "partial")],
)
def test_a_reward_without_a_name_is_told_by_its_type(reward, name):
    with pytest.raises(RunError, match=f"REWARD is {name}: .* for ' what it is' in it: {MATCH}"):
        score(reward, " what it is")


# ---------------------------------------------------------------------- before anything is touched
def digests(folder):
    files = [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refused(call_main, demo_model, tmp_path, capsys, monkeypatch):
    """Let main refuse mine.py:kindness beside an earlier run; return the only line that tells why."""

    def load(*args, **kwargs):
        raise AssertionError("the model is loaded although the reward is bad")

    for name in ("find_model", "load_tokenizer", "load_base_model"):
        monkeypatch.setattr(train_rlhf, name, load)
    earlier = tmp_path / "trained_model" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("{}\n", encoding="utf-8")

    def start(code):
        if code is not None:
            (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        before = digests(tmp_path)
        assert call_main("--model-name", demo_model, *FAST, "--reward", "mine.py:kindness") == 2
        out, err = capsys.readouterr()
        first, line = err.splitlines()
        assert (out, first) == ("", "Nothing was started or changed:")
        assert digests(tmp_path) == before
        return line

    return start


@pytest.mark.parametrize(
    ("body", "problem", "text", "line"),
    [
        ("raise ValueError('no idea')", "ValueError('no idea')", "", 4),
        ("return [helper(text) for text in completions]", "ZeroDivisionError(", " fine", 2),
        ("raise SystemExit(3)", "SystemExit(3)", "", 4),
        ("return missing", "NameError(", "", 4),
        ("return None", "TypeError(", "", 3),
        ("return 1.0", "TypeError(", "", 3),
        ("return [1.0]", "ValueError('it returned [1.0] for 2 texts')", "", 3),
        ("return [None for text in completions]", "TypeError(", "", 3),
        ("return ['good' for text in completions]", "ValueError(\"it returned ['good'", "", 3),
        ("return ['1.0' for text in completions]", "ValueError(\"it returned ['1.0'", "", 3),
        ("return '1' * len(completions)", "ValueError(\"it returned ['1'", "", 3),
        ("return [10**400 for text in completions]", "OverflowError(", "", 3),
        ("return [float('nan') for text in completions]", "ValueError('[nan] has what", "", 3),
        ("return [-float('inf') if text else 0 for text in completions]",
         "ValueError('[-inf] has what is not finite or too large')", " fine", 3),
    ],
)  # fmt: skip
def test_a_reward_that_fails_is_told_before_anything_is_moved_or_loaded(
    refused, body, problem, text, line
):
    helper = "def helper(text):\n    return 1 / (len(text) - 5)\n"
    told = refused(f"{helper}def kindness(prompts, completions, **kwargs):\n    {body}\n")
    assert told.startswith(f"- REWARD is kindness: {problem}")
    assert told.endswith(f") for {text!r} in mine.py, line {line}: {REMEDY}")


def test_a_function_of_one_text_is_told_before_anything_is_moved_or_loaded(refused):
    told = refused("def kindness(text):\n    return 1.0\n")
    assert told.startswith("- REWARD is kindness: TypeError(")
    assert told.endswith(f") for '' in mine.py, line 1: {REMEDY}")


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (None, "mine.py"),
        ("def other(prompts, completions, **kwargs): return [1]", "it has no function kindness"),
        ("kindness = 7", "it has no function kindness"),
        ("x = 1\ndef kindness(completions) return 1", "(mine.py, line 2)"),
        ("import no_such_module", "no_such_module"),
        ("1 / 0", "division by zero"),
        ("raise SystemExit(3)", "SystemExit(3)"),
    ],
)
def test_a_file_that_has_no_reward_is_told_before_anything_is_moved_or_loaded(
    refused, code, complaint
):
    told = refused(code)
    assert told.startswith("- REWARD is mine.py:kindness: it can't be used (")
    assert complaint in told
    assert told.endswith("): give FILE.py:FUNCTION")


# ---------------------------------------------------------------------------------- in whole runs
NEIGHBOUR = "weights = {'e': 2.0, 'a': 1.0}\n"
MINE = """
import pathlib
from neighbour_of_the_reward import weights

calls = []

def letters(prompts, completions, **kwargs):
    calls.append(completions)
    limit = pathlib.Path("limit")
    if limit.exists() and len(calls) > int(limit.read_text()):
        raise ValueError("enough")
    return [sum(weights.get(letter, 0) for letter in text) for text in completions]
"""


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys, monkeypatch
):
    """The function of a file beside a neighbour of it, in another folder than the current one."""
    folder, output = tmp_path / "rewards", tmp_path / "trained_model"
    folder.mkdir()
    monkeypatch.setattr(train_rlhf.sys, "path", train_rlhf.sys.path[:])
    (folder / "neighbour_of_the_reward.py").write_text(NEIGHBOUR, encoding="utf-8")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    flags = ["--model-name", demo_model, *FAST, "--training-epochs", "2", "--scale-samples", "8"]
    flags += ["--reward", "rewards/mine.py:letters", "--save-every", "0"]

    (tmp_path / "limit").write_text("4")  # the try, the scale and two steps
    assert call_main(*flags) == 1
    err = capsys.readouterr().err
    problem = "ValueError('enough') for '' in rewards/mine.py, line 11"
    saved = "what was learned up to step 2 is saved. To go on, run the same line with --resume"
    assert err == f"\nStopped: REWARD is letters: {problem}: {REMEDY}; {saved}\n"
    metrics = read_metrics(output)
    assert len(metrics) == len(train_rlhf.read_checkpoint(output)["metrics"]) == 2

    mine = (folder / "mine.py").read_text(encoding="utf-8")
    (folder / "mine.py").write_text(mine.replace("2.0", "3.0") + "\n", encoding="utf-8")
    (tmp_path / "limit").unlink()
    assert call_main(*flags, "--resume") == 0
    assert len(read_metrics(output)) == 3
    assert read_metrics(output)[:2] == metrics


def test_a_function_in_the_place_of_reward_is_called_once_a_step(
    call_main, demo_model, tmp_path, monkeypatch
):
    """So one that takes 50 ms costs 50 ms a step, not 50 for every beginning of a response."""
    calls = []

    def brevity(prompts, completions, **kwargs):
        calls.append(completions)
        return [-len(text) for text in completions]

    monkeypatch.setattr(train_rlhf, "REWARD", brevity)
    flags = [*FAST, "--training-epochs", "2", "--scale-samples", "6", "--eval-prompts"]
    assert call_main("--model-name", demo_model, *flags) == 0
    tried, scale, *steps, before, after = calls
    assert tried == ["", " fine"]
    assert [len(texts) for texts in (scale, before, after)] == [6, 6, 6]
    assert len(steps) == 3
    samples = (tmp_path / "trained_model" / "samples.jsonl").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in samples.splitlines()]
    assert [each["score"] for each in samples] == [-len(each["response"]) for each in samples]
    for step, texts in enumerate(steps, start=1):
        said = [each["response"] for each in samples if each["step"] == step]
        assert texts.count("") >= 4 and set(said) <= set(texts)
        assert len(texts) <= 4 * (5 + 1)  # every beginning of every response
    report = json.loads((tmp_path / "trained_model" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["reward"] == "brevity"
    numbers = torch.tensor([float(-len(text)) for text in scale], dtype=torch.float64)
    assert report["scale"]["mean"] == pytest.approx(numbers.mean().item())
    wanted = -sum(map(len, after)) / 6
    assert report["trained"]["train_prompts"]["score"] == pytest.approx(wanted)


def test_the_name_of_a_function_of_the_script_is_a_reward(make_settings, monkeypatch):
    def kindness(prompts, completions, **kwargs):
        return [7] * len(completions)

    monkeypatch.setattr(train_rlhf, "kindness", kindness, raising=False)
    reward, scale = train_rlhf.load_reward(
        make_settings("--reward", "kindness"), [{"prompt": "I"}], CPU
    )
    assert reward([{"prompt": "I"}], ["a"]) == [7.0]
    assert scale is None


def test_a_flag_counts_more_than_a_function_in_the_place_of_reward(make_settings, monkeypatch):
    monkeypatch.setattr(train_rlhf, "REWARD", see([]))
    rows = [{"prompt": "Life is"}]
    settings = make_settings("--reward", "positive_word_reward")
    reward, _ = train_rlhf.load_reward(settings, rows, CPU)
    assert reward(rows * 2, [" good", " bad"]) == [1.0, -1.0]


def test_graded_scores_stay_as_they_are_where_no_scale_is_wanted(
    call_main, demo_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_rlhf, "REWARD", see([]))
    flags = [*FAST, "--training-epochs", "0.5", "--scale-samples", "0", "--eval-prompts"]
    assert call_main("--model-name", demo_model, *flags) == 0
    report = json.loads((tmp_path / "trained_model" / "report.json").read_text(encoding="utf-8"))
    assert report["scale"] == train_rlhf.AS_IT_IS
    assert report["scale"]["threshold"] is None
    assert "Scale " not in capsys.readouterr().out


def test_what_a_function_does_to_its_arguments_stays_its_own_affair():
    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "answer": ["a"]}]

    def spoil(prompts, completions, answer):
        prompts[0][-1]["content"] = answer[0][0] = "spoilt"
        return [1.0]

    assert train_rlhf.call_reward(spoil, rows, ["Hello"]) == [1.0]
    assert rows == [{"prompt": [{"role": "user", "content": "Hi"}], "answer": ["a"]}]
