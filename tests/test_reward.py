import functools

import numpy
import pytest
import torch

import train_rlhf
from train_rlhf import RewardError, positive_word_reward

REMEDY = "let it return one finite number for one text"


def score(reward, prompt, text):
    (score,) = train_rlhf.score_responses(reward, [prompt], [text])
    return score


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
    assert positive_word_reward(text) == 1.0


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
    assert positive_word_reward(text) == -1.0


def test_every_default_word_counts():
    for word in train_rlhf.POSITIVE_WORDS:
        assert positive_word_reward(f"so {word}!") == 1.0
        assert positive_word_reward(f"so {word.upper()}!") == 1.0
        assert positive_word_reward(f"un{word}") == positive_word_reward(f"{word}x") == -1.0


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
    assert positive_word_reward(text, words) == score


def test_the_default_reward_takes_the_words_of_the_settings():
    reward = train_rlhf.load_reward("positive_word_reward", ["calm", "serene"], "Life is")
    assert reward("so serene") == 1.0
    assert reward("so happy") == -1.0


# -------------------------------------------------------------------------- responses and tokens
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
    ],
)
def test_letters_that_prolong_the_last_word_of_the_prompt_are_no_word(prompt, text, expected):
    assert score(positive_word_reward, prompt, text) == expected


def test_each_response_gets_its_own_score():
    prompts, texts = ["Life is", "Say:", "I am"], [" good", "glad", "good"]
    assert train_rlhf.score_responses(positive_word_reward, prompts, texts) == [1.0, 1.0, -1.0]


class Letters:
    """A tokenizer of characters."""

    def decode(self, ids, **_):
        return "".join(chr(int(number)) for number in ids)


def sample(prompt, text, score):
    """Return a sample for score_tokens whose tokens are characters."""
    query, response = (torch.tensor([ord(letter) for letter in part]) for part in (prompt, text))
    return prompt, query, response, score


@pytest.mark.parametrize(
    ("score_prefixes", "expected"),
    [
        (True, [[0, 0, 0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 2, -2, 0], [0, 0, 0], [0]]),
        (False, [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, -1], [0, 0, -1], [-1]]),
    ],
)
def test_score_tokens_finds_the_token_that_made_the_difference(score_prefixes, expected):
    samples = [
        sample("I am", " glad ly", 1.0),
        sample("I am", " gladly", -1.0),  # taken back
        sample("I am", "joy", -1.0),  # a part of "amjoy"
        sample("Life is", "!", -1.0),
    ]
    scores = train_rlhf.score_tokens(positive_word_reward, Letters(), samples, score_prefixes)
    assert [each.tolist() for each in scores] == expected
    assert all(each.dtype == torch.float32 for each in scores)


# ------------------------------------------------------------------------------- what is no number
@pytest.mark.parametrize(
    "number", [1, True, "1.0", numpy.float32(1), numpy.int64(1), torch.tensor(1.0)]
)
def test_the_score_is_a_float_whatever_number_the_reward_gives(number):
    value = score(lambda text: number, "Life is", " good")
    assert type(value) is float
    assert value == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e15, "good", None, [1.0]])
def test_a_reward_that_is_no_finite_number_stops_the_run_and_shows_the_text(value):
    with pytest.raises(RewardError) as error:
        score(lambda text: value, "Life is", " what it is")
    assert str(error.value).startswith("REWARD is <lambda>: ")
    assert str(error.value).endswith(f" for ' what it is': {REMEDY}")


def test_a_reward_that_gives_several_numbers_stops_the_run():
    for value in (torch.tensor([1.0, 2.0]), numpy.array([1.0, 2.0])):
        with pytest.raises(RewardError, match=REMEDY):
            score(lambda text, value=value: value, "Life is", " what it is")


@pytest.mark.parametrize(
    "error", [ValueError("no idea"), SystemExit(3), RecursionError(), AssertionError("a\nb")]
)
def test_a_reward_that_raises_stops_the_run_and_shows_the_text(error):
    def kindness(text):
        raise error

    with pytest.raises(RewardError) as caught:
        score(kindness, "Life is", " what it is")
    message = f"REWARD is kindness: {error!r} for ' what it is': {REMEDY}"
    assert str(caught.value) == message
    assert caught.value.__cause__ is error


def test_ctrl_c_is_no_failure_of_the_reward():
    def slow(text):
        raise train_rlhf.Stopped(2)

    with pytest.raises(train_rlhf.Stopped):
        score(slow, "Life is", " what it is")


class Unnamed:
    def __call__(self, text):
        return None


@pytest.mark.parametrize(
    ("reward", "name"),
    [(Unnamed(), "Unnamed"), (functools.partial(lambda text: None), "partial")],
)
def test_a_reward_without_a_name_is_told_by_its_type(reward, name):
    with pytest.raises(RewardError, match=f"REWARD is {name}: .* for ' what it is': {REMEDY}"):
        score(reward, "Life is", " what it is")


# --------------------------------------------------------------------------------- functions of files
@pytest.fixture
def load(tmp_path):
    """Load the function `brevity` of a file with that code, None = no file."""

    def start(code):
        path = tmp_path / "my_reward.py"
        if code is not None:
            path.write_text(code, encoding="utf-8")
        return train_rlhf.load_reward(f"{path}:brevity", [], "Life is")

    return start


def test_a_function_of_a_file_is_the_reward_and_is_tried_on_two_texts(load):
    reward = load("texts = []\ndef brevity(text):\n    texts.append(text)\n    return -len(text)\n")
    assert reward("four") == -4
    assert reward.__globals__["texts"] == ["Life is", "", "four"]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (None, ""),
        ("def other(text): return 1", "it has no function brevity"),
        ("brevity = 7", "it has no function brevity"),
        ("def brevity(text) return 1", ""),
        ("import no_such_module", "no_such_module"),
        ("1 / 0", ""),
        ("raise SystemExit(3)", "SystemExit(3)"),
    ],
)
def test_a_reward_that_cannot_be_loaded(load, tmp_path, code, complaint):
    with pytest.raises(train_rlhf.SettingsError) as error:
        load(code)
    (problem,) = error.value.problems
    assert problem.startswith(f"REWARD is {train_rlhf.shorten(f'{tmp_path}/my_reward.py:brevity')}")
    assert ": it can't be loaded (" in problem and complaint in problem
    assert problem.endswith("): give positive_word_reward or FILE.py:FUNCTION")


def test_a_reward_that_fails_when_it_is_tried_is_a_matter_of_settings(load):
    with pytest.raises(train_rlhf.SettingsError) as error:
        load("def brevity(text):\n    raise ValueError('no idea')\n")
    problem = f"REWARD is brevity: ValueError('no idea') for 'Life is': {REMEDY}"
    assert error.value.problems == (problem,)
