import functools

import numpy
import pytest
import torch

import train_rlhf
from train_rlhf import positive_word_reward, score_response


@pytest.mark.parametrize(
    "text",
    [
        "happy",
        " happy and proud",
        "I am so HAPPY",
        "GlAd of it",
        "It was good.",
        "good, bad and ugly",
        '"good"',
        "(good)",
        "so\ngood\nindeed",
        "good\ttimes",
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
        "goods",
        "Gladys",
        "lovely",
        "killjoy",
        "enjoy",
        "good_",
        "good2",
        "h a p p y",
        "hap-py",
        "sad",
        "goodé",
        "égood",
        "나는 행복해요",
        "очень хорошо",
    ],
)
def test_without_a_positive_word_the_score_is_minus_one(text):
    assert positive_word_reward(text) == -1.0


@pytest.mark.parametrize("word", train_rlhf.POSITIVE_WORDS)
def test_every_default_word_counts(word):
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


@pytest.mark.parametrize(
    ("prompt", "text", "score"),
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
def test_letters_that_prolong_the_last_word_of_the_prompt_are_no_word(prompt, text, score):
    assert score_response(positive_word_reward, prompt, text) == score


@pytest.mark.parametrize(
    "number", [1, 1.0, True, numpy.float32(1), numpy.float64(1), numpy.int64(1), torch.tensor(1.0)]
)
def test_the_score_is_a_float_whatever_number_the_reward_gives(number):
    score = score_response(lambda text: number, "Life is", " good")
    assert type(score) is float
    assert score == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1.0", None, [1.0]])
def test_a_reward_that_is_no_finite_number_stops_the_run_and_shows_the_text(value):
    with pytest.raises(train_rlhf.RunError) as error:
        score_response(lambda text: value, "Life is", " what it is")
    assert str(error.value) == (
        f"REWARD, <lambda>, gave {value!r} for ' what it is': it has to return one finite number for one text"
    )


def test_a_reward_that_gives_several_numbers_stops_the_run():
    for value in (torch.tensor([1.0, 2.0]), numpy.array([1.0, 2.0])):
        with pytest.raises(
            train_rlhf.RunError, match="it has to return one finite number for one text"
        ):
            score_response(lambda text, value=value: value, "Life is", " what it is")


@pytest.mark.parametrize(
    "error", [ValueError("no idea"), SystemExit(3), RecursionError(), AssertionError("a\nb")]
)
def test_a_reward_that_raises_stops_the_run_and_shows_the_text(error):
    def kindness(text):
        raise error

    with pytest.raises(train_rlhf.RunError) as caught:
        score_response(kindness, "Life is", " what it is")
    assert str(caught.value) == f"REWARD, kindness, raised {error!r} for ' what it is': mend it"
    assert caught.value.__cause__ is error


def test_ctrl_c_is_no_failure_of_the_reward():
    def slow(text):
        raise train_rlhf.Stopped

    with pytest.raises(train_rlhf.Stopped):
        score_response(slow, "Life is", " what it is")


class Unnamed:
    def __call__(self, text):
        return None


@pytest.mark.parametrize(
    "reward", [Unnamed(), functools.partial(lambda text: None)], ids=["object", "partial"]
)
def test_a_reward_without_a_name_is_told_too(reward):
    with pytest.raises(train_rlhf.RunError, match="gave None for ' what it is'"):
        score_response(reward, "Life is", " what it is")


def test_the_default_reward_takes_the_words_of_the_settings(make_settings):
    reward = train_rlhf.load_reward(make_settings("--positive-words", "calm", "serene"))
    assert reward("so serene") == 1.0
    assert reward("so happy") == -1.0


def test_a_function_of_a_file_is_the_reward(make_settings, tmp_path):
    (tmp_path / "my_reward.py").write_text(
        "def brevity(text):\n    return -len(text)\n", encoding="utf-8"
    )
    reward = train_rlhf.load_reward(make_settings("--reward", f"{tmp_path}/my_reward.py:brevity"))
    assert reward("four") == -4


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (None, "FileNotFoundError"),
        ("def other(text): return 1", "no attribute 'brevity'"),
        ("def brevity(text) return 1", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("1 / 0", "division by zero"),
        ("brevity = 7", "brevity"),  # no function
    ],
)
def test_a_reward_that_cannot_be_loaded(make_settings, tmp_path, code, complaint):
    path = tmp_path / "my_reward.py"
    if code:
        path.write_text(code, encoding="utf-8")
    settings = make_settings("--reward", f"{path}:brevity")
    with pytest.raises(train_rlhf.SettingsError) as error:
        train_rlhf.load_reward(settings)
    assert f"REWARD is {path}:brevity" in str(error.value)
    assert complaint in str(error.value)
