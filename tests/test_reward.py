"""The reward of train_rlhf.py: the default rule, what REWARD names, what tokens earn."""

import itertools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import digests, read_metrics, refusals

import train_rlhf
from finetune.checkpoint import read_checkpoint
from finetune.scale import Scale
from train_rlhf import load_reward, positive_word_reward, score_responses

REMEDY = "let f(prompts, completions, **kwargs) return a finite number for each completion"
CPU = torch.device("cpu")
FAST = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--batch-size", "4"]
FAST += ["--max-new-tokens", "5", "--eval-samples", "6"]


def positive(text, *words, prompt="Say:"):
    (value,) = positive_word_reward([prompt], [text], positive_words=words or None)
    return value


# -------------------------------------------------------------- positive words
@pytest.mark.parametrize(
    "text",  # a hyphen parts words, and so does an apostrophe
    ["happy", " happy and proud", "I am so HAPPY", "GlAd of it", '"good"', "so\ngood\nindeed",
     "a feel-good film", "love's labour", "l'amour is love", "¡good!", "unhappy, but glad",
     "很 good 很"],
)  # fmt: skip
def test_a_positive_word_scores_one(text):
    assert positive(text) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "goodbye", "killjoy", "good_", "good2", "h a p p y", "hap-py", "goodé", "égood",
     "나는 행복해요"],
)  # fmt: skip
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
        (["행복"], "정말 행복해요", 1.0),
        (["schön"], "Wie SCHÖN!", 1.0),
        (["schon"], "schön", -1.0),
        (["self-made"], "a self-made man", 1.0),
        (["don't"], "I don't", 1.0),
    ],
)
def test_words_of_the_user(words, text, score):
    assert positive(text, *words) == score


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Life is", " good", 1.0),
        ("Life is", "good", -1.0),  # "Life isgood"
        ("I feel un", "happy", -1.0),
        ("I feel un", "happy and glad", 1.0),
        ("Life is ", "good", 1.0),
        ("Life is:", "good", 1.0),
        ("Life is", "-good", 1.0),
        ("나는", "good", -1.0),
        ("나는", "행복 good", 1.0),
    ],
)
def test_letters_that_prolong_the_last_word_of_the_prompt_are_no_word(prompt, text, expected):
    assert positive(text, prompt=prompt) == expected


def test_scripts_without_spaces_between_words_prolong_nothing():
    assert positive("开心!", "开心", prompt="我很") == 1.0
    assert positive("행복 !", "행복", prompt="나는") == -1.0  # which Korean has


# ----------------------------------------------------------- what REWARD names
def see(seen):
    """Return a reward function that notes what it is given, and gives 1 for the first, 2, 3…"""

    def kindness(prompts, completions, **kwargs):
        seen.append({"prompts": prompts, "completions": completions} | kwargs)
        return range(1, len(completions) + 1)

    return kindness


def test_the_default_reward_takes_the_words_of_the_settings(make_settings):
    """It is a rule, whose scale and threshold are known: nothing is measured for them."""
    rows = [{"prompt": "Life is"}] * 2
    settings = make_settings("--positive-words", "calm", "serene")
    scorer, scale = load_reward(settings, rows, CPU)
    assert scorer(rows, [" so serene", " so happy"]) == [1.0, -1.0]
    assert scale == Scale(threshold=0.0, is_rule=True)


def test_the_default_reward_takes_the_answer_to_a_conversation_as_a_text_of_its_own(make_settings):
    """What the user said last is no word that the answer could prolong."""
    messages = [{"role": "user", "content": "Say good"}]
    rows = [{"prompt": messages}, {"prompt": "Say good"}]
    for flags, expected in (([], [1.0, -1.0]), (["--chat-template"], [1.0, 1.0])):
        scorer, _ = load_reward(make_settings(*flags), rows, CPU)
        assert scorer(rows, ["glad", "glad"]) == expected


def test_a_function_gets_the_tools_of_a_row_and_all_that_is_not_used_else(
    make_settings, monkeypatch
):
    """What a row has is handed on as it is, in the same columns for all of them."""
    seen, tools = [], [{"name": "clock"}]
    turns = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": turns, "tools": tools, "id": 7}, {"prompt": "A", "tools": None, "id": 8}]
    monkeypatch.setattr(train_rlhf, "REWARD", see(seen))
    scorer, _ = load_reward(make_settings(), rows, CPU)
    assert scorer.text_before is None
    answers = [[{"role": "assistant", "content": ""}], " fine"]
    wanted = {"prompts": [turns, "A"], "completions": answers}
    assert seen == [wanted | {"tools": [tools, None], "id": [7, 8]}]


@pytest.mark.parametrize("flags", [[], ["--chat-template"]], ids=["plain", "chat"])
def test_a_function_in_the_place_of_reward_gets_the_prompts_as_they_are(
    make_settings, monkeypatch, flags
):
    """Whatever the template. It is tried on the first row and the last; its scale is measured."""
    seen, rows = [], [{"prompt": "A"}, {"prompt": "B"}, {"prompt": "C"}]
    monkeypatch.setattr(train_rlhf, "REWARD", see(seen))
    scorer, scale = load_reward(make_settings(*flags), rows, CPU)
    assert scale is None
    assert seen == [{"prompts": ["A", "C"], "completions": ["", " fine"]}]
    assert scorer(rows, ["a", "b", "c"]) == [1.0, 2.0, 3.0]
    assert seen[1:] == [{"prompts": ["A", "B", "C"], "completions": ["a", "b", "c"]}]


def test_a_flag_may_name_any_function_of_the_script(make_settings, monkeypatch):
    """It counts more than a function in the place of REWARD."""
    rows = [{"prompt": "Life is"}] * 2
    monkeypatch.setattr(train_rlhf, "REWARD", lambda **_: [5, 5])
    monkeypatch.setattr(train_rlhf, "kindness", see([]), raising=False)
    scorer, _ = load_reward(make_settings("--reward", "kindness"), rows, CPU)
    assert scorer(rows, [" good", " bad"]) == [1.0, 2.0]
    scorer, _ = load_reward(make_settings("--reward", "positive_word_reward"), rows, CPU)
    assert scorer(rows, [" good", " bad"]) == [1.0, -1.0]


def test_what_is_no_function_is_a_classifier_that_may_bring_its_scale(make_settings, monkeypatch):
    """It says itself what stands before a response, of a row and of whether that is a turn."""
    asked, seen = [], []
    judge = see(seen)
    judge.text_before = lambda row, is_turn: f"{row['prompt']} ({is_turn}) "

    def load(*args):
        asked.append(args)
        return judge, Scale(threshold=2.0, accuracy=0.8)

    monkeypatch.setattr(train_rlhf.scorers, "load_classifier", load)
    flags = ["--reward-label", "calm", "--eval-batch-size", "3", "--chat-template"]
    settings = make_settings("--reward", "my/judge", *flags)
    _, scale = load_reward(settings, [{"prompt": "Life is"}], CPU)
    assert asked == [("REWARD", "my/judge", "calm", 3, CPU)]
    assert scale == Scale(threshold=2.0, accuracy=0.8)
    assert seen == [{"prompts": ["Life is (True) "] * 2, "completions": ["", " fine"]}]


# ------------------------------------------------------------ what tokens earn
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

    def scorer(rows, texts):
        calls.append(texts)
        return positive_word_reward([row["prompt"] for row in rows], texts)

    scores, token_scores = score_responses(
        scorer,
        Scale(),
        Letters(),
        rows,
        ids_of(prompts),
        ids_of(texts),
        score_prefixes,
        [*range(9)],
    )
    assert scores == [1.0, -1.0, -1.0, -1.0]
    assert [earned.tolist() for earned in token_scores] == expected
    assert all(earned.dtype == torch.float32 for earned in token_scores)
    (asked,) = calls
    beginnings = [text[:end] for text in texts for end in range(len(text) + 1)]
    assert asked == (beginnings if score_prefixes else texts)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("score_prefixes", [True, False])
def test_what_tokens_earn_is_on_the_scale_and_the_scores_are_as_they_were_given(
    score_prefixes, graded
):
    scale = Scale(mean=10.0, deviation=4.0, graded=graded)
    rows, queries, responses = [{"prompt": "I"}] * 2, ids_of("II"), ids_of(["ab", "c"])
    given = {"": 8.0, "a": 20.0, "ab": 12.0, "c": 6.0}

    def scorer(rows, texts):
        return [given[text] for text in texts]

    scores, token_scores = score_responses(
        scorer, scale, Letters(), rows, queries, responses, score_prefixes, [*range(9)]
    )
    assert scores == [12.0, 6.0]
    empty, a, ab, c = (math.asinh(x) if graded else x for x in (-0.5, 2.5, 0.5, -1.0))
    wanted = [[a - empty, ab - a], [c - empty]] if score_prefixes else [[0.0, ab], [c]]
    for earned, numbers in zip(token_scores, wanted):
        assert earned.tolist() == pytest.approx(numbers)


def score_every(stride, text, scorer):
    """Return the score of a text, and what its letters earn by beginnings so many apart."""
    rows, queries, responses = [{"prompt": "I"}], ids_of("I"), ids_of([text])
    places = [*range(0, 99, stride)]
    (score,), (earned,) = score_responses(
        scorer, Scale(), Letters(), rows, queries, responses, True, places
    )
    return score, earned


@pytest.mark.parametrize("stride", [2, 3, 5, 50])
def test_of_beginnings_some_are_asked_evenly_without_half_words_and_the_last_of_them_earns(stride):
    text = " glad to be of use"
    asked = []

    def scorer(rows, texts):
        asked.extend(texts)
        return [len(text) / 10 for text in texts]

    score, earned = score_every(stride, text, scorer)
    whole = [train_rlhf.whole_words(text[:end]) for end in range(0, len(text), stride)]
    assert asked == [*whole, text]
    assert all(beginning.strip(" ") in ("", "glad", "glad to", "glad to be", "glad to be of")
               for beginning in whole)  # fmt: skip
    assert score == len(text) / 10
    assert earned.sum().item() == pytest.approx(score)
    places = {*range(stride, len(text), stride), len(text)}
    assert {int(place) + 1 for place in earned.nonzero()} <= places


def expected_gradient(logits, reward_to_go):
    """Return the gradient of PPO without a critic, summed over all responses of four letters.

    logits: (4, 3, 3) of a policy of three letters, that sees its place and the last letter.
    """
    total = torch.zeros(())
    for letters in itertools.product(range(3), repeat=4):
        logprobs = torch.stack(
            [
                logits[place].log_softmax(-1)[letters[place - 1] if place else 0, letter]
                for place, letter in enumerate(letters)
            ]
        )
        weights = torch.tensor(reward_to_go("".join(" ab"[letter] for letter in letters)))
        total = total + logprobs.sum().exp().detach() * (logprobs * weights).sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_whatever_beginnings_are_asked_the_expected_gradient_is_that_of_the_whole_score(stride):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 3, requires_grad=True)
    all_scores = {}

    def score(text):
        return all_scores.setdefault(text, torch.randn(()).item())

    def to_go(text):
        _, earned = score_every(stride, text, lambda rows, texts: [*map(score, texts)])
        return earned.flip(0).cumsum(0).flip(0).tolist()

    shaped = expected_gradient(logits, to_go)
    at_the_end = expected_gradient(logits, lambda text: [score(text)] * 4)
    assert torch.allclose(shaped, at_the_end, atol=1e-5)
    assert shaped.abs().max() > 0.01


@pytest.mark.parametrize(
    ("max_new_tokens", "max_prefixes", "in_one_pass", "places"),
    [(4, 20, False, [0, 1, 2, 3]), (4, 4, False, [0, 1, 2, 3]), (8, 4, False, [0, 2, 4, 6]),
     (9, 4, False, [0, 2, 4, 6]), (7, 3, False, [0, 2, 4]), (5, 0, False, [0, 1, 2, 3, 4]),
     (5, 2, True, [0, 1, 2, 3, 4]), (7, 1, False, [0])],
)  # fmt: skip
def test_max_prefixes_beginnings_are_scored(max_new_tokens, max_prefixes, in_one_pass, places):
    settings = SimpleNamespace(max_new_tokens=max_new_tokens, max_prefixes=max_prefixes)
    scorer = SimpleNamespace(reads_beginnings=in_one_pass)
    assert train_rlhf.scored_places(settings, scorer) == places


# -------------------------------------------------- before anything is touched
@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "def kindness(prompts, completions, **kwargs):\n    raise SystemExit(3)",
            f"REWARD is kindness: SystemExit(3) for '' in mine.py, line 2: {REMEDY}",
        ),
        (
            "def kindness(completions, **kwargs):\n    return [1.0]",
            "REWARD is kindness: ValueError('it returned [1.0] for 2 texts') for '' "
            f"in mine.py, line 1: {REMEDY}",
        ),
        (
            "kindness = 7",
            "REWARD is mine.py:kindness: it can't be used (it has no function kindness): "
            "give FILE.py:FUNCTION",
        ),
    ],
    ids=["it raises", "it returns too little", "it is none"],
)
def test_a_bad_reward_is_told_before_anything_is_moved_or_loaded(
    call_main, demo_model, tmp_path, capsys, monkeypatch, code, problem
):
    def load(*args, **kwargs):
        raise AssertionError("the model is loaded although the reward is bad")

    monkeypatch.setattr(train_rlhf, "load_model", load)
    monkeypatch.setattr(sys, "path", sys.path[:])
    earlier = tmp_path / "trained_model" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("{}\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    before = digests(tmp_path)
    status = call_main("--model-name", demo_model, *FAST, "--reward", "mine.py:kindness")
    out, err = capsys.readouterr()
    assert refusals(status, err) == [problem]
    assert out == "" and digests(tmp_path) == before


# --------------------------------------------------------------- in whole runs
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


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys, monkeypatch
):
    """The function of a file beside a neighbour of it, in another folder than the current one."""
    folder, output = tmp_path / "rewards", tmp_path / "trained_model"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", sys.path[:])
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
    assert len(metrics) == len(read_checkpoint(output)["metrics"]) == 2

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
    assert all(sample["score"] == -len(sample["response"]) for sample in samples)
    for step, texts in enumerate(steps, start=1):
        said = {sample["response"] for sample in samples if sample["step"] == step}
        assert texts.count("") >= 4 and said <= set(texts)
        assert len(texts) <= 4 * (5 + 1)  # every beginning of every response
    report = json.loads((tmp_path / "trained_model" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["reward"] == "brevity"
    numbers = torch.tensor([float(-len(text)) for text in scale], dtype=torch.float64)
    assert report["scale"]["mean"] == pytest.approx(numbers.mean().item())
    wanted = -sum(map(len, after)) / 6
    assert report["trained"]["train_prompts"]["score"] == pytest.approx(wanted)
