"""The result in words: a table, what was said before and after, what to try, how to load it."""

import textwrap

import pytest

from finetune import summary

PROMPT = 'say "so"'
FIGURES = {
    "score": -0.5,
    "standard_error": 0.0625,
    "win_rate": 0.5,
    "success_rate": 0.25,
    "kl": -1e-9,  # as rounding leaves it
    "kl_minimum": None,
    "distinct": 1.0,
    "perplexity_under_base": 4.0,
    "first_sample": {PROMPT: " and so"},
}
AFTER = FIGURES | {
    "score": 0.5,
    "win_rate": 0.75,
    "success_rate": 0.75,
    "kl": 2.0,
    "first_sample": {PROMPT: " so\n\n good"},
}


def make_report(before=FIGURES, after=AFTER, **more):
    """Return a report of a run that went well, as far as nothing else is given."""
    return {
        "chat": False,
        "encoder_decoder": False,
        "settings": {"model_name": "a/model", "seed": 7},
        "scale": {"accuracy": None},
        "base": {"train_prompts": before},
        "trained": {"train_prompts": after},
        "learned": True,
        "close_to_base": True,
        "samples": 900,
        "seconds": 29.6,
        "device": "CPU",
    } | more


def test_a_summary_from_top_to_bottom():
    assert summary.summarize(make_report(), ".").splitlines() == [
        "# model, fine-tuned with PPO",
        "",
        "|                       |   base | trained |",
        "|---|---|---|",
        "| score                 | -0.500 |   0.500 |",
        "| standard_error        |  0.062 |   0.062 |",
        "| win_rate              |  0.500 |   0.750 |",
        "| success_rate          |  0.250 |   0.750 |",
        "| kl                    |  0.000 |   2.000 |",
        "| kl_minimum            |      - |       - |",
        "| distinct              |  1.000 |   1.000 |",
        "| perplexity_under_base |  4.000 |   4.000 |",
        "",
        "900 samples in 30 seconds on CPU, seed 7. The first response to each prompt:",
        "",
        '    say "so"',
        "        before  and so",
        "        after   so good",
        "",
        "Score: -0.50 ± 0.06 before, +0.50 ± 0.06 after, a win rate of 75%,",
        "at 2.0 nats from the base model. Success: 25.0% before, 75.0% after.",
        "",
        "The model is beside report.json and watch.html, which shows how it learned. To load it:",
        "",
        "    from transformers import pipeline",
        "",
        """    print(pipeline("text-generation", '.')('say "so"'))""",
    ]


def test_prompts_held_out_have_columns_and_responses_of_their_own():
    """Of either kind the first six prompts are shown."""
    said = {f"Day {number} is": " fine" for number in range(8)}
    held_out = FIGURES | {"success_rate": None, "first_sample": said}
    base = {"train_prompts": FIGURES, "eval_prompts": held_out}
    trained = {"train_prompts": AFTER, "eval_prompts": held_out}
    lines = summary.summarize(make_report(base=base, trained=trained), ".").splitlines()
    assert "|   base | trained | base, held out | trained, held out |" in lines[2]
    row = "| success_rate          |  0.250 |   0.750 |              - |                 - |"
    assert row in lines
    shown = [line for line in lines if line.endswith(" (held out)")]
    assert shown == [f"    Day {number} is (held out)" for number in range(6)]
    assert lines.count("        after   fine") == 6


def test_where_success_is_not_known_nothing_is_said_of_it():
    graded = {"success_rate": None}
    text = summary.summarize(make_report(FIGURES | graded, AFTER | graded), ".")
    assert "\nat 2.0 nats from the base model.\n\nThe model is" in text
    assert "Success" not in text


SAME = FIGURES | {"standard_error": 0}
FAR = "Little is left of it: lower LEARNING_RATE, TARGET_APPROX_KL or raise KL_COEF."
ALIKE = "All responses score the same: try words or prompts with which some are better."
CHANCE = "Beyond chance this run did not learn: raise TRAINING_EPOCHS or lower KL_COEF."
AGREES = "The reward model, which says so, agrees with 81% of held-out comparisons."


@pytest.mark.parametrize(
    ("report", "advice"),
    [
        (make_report(), []),
        (make_report(learned=False), [CHANCE]),
        (make_report(SAME, SAME, learned=False), [ALIKE]),
        (make_report(SAME, AFTER, learned=False), [CHANCE]),
        (make_report(SAME, SAME, learned=False, close_to_base=False), [FAR]),  # the first thing
        (make_report(learned=False, scale={"accuracy": 0.807}), [CHANCE, AGREES]),
        (make_report(scale={}), []),  # of a run of an older version
    ],
)
def test_the_advice_is_about_what_went_wrong(report, advice):
    _, _, text = summary.summarize(report, ".").partition("% after.")
    text, _, _ = text.partition("\n\nThe model is beside")
    assert text.splitlines()[1:] == advice


@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_that_loads_the_model_is_python_that_quotes_what_it_is_given(chat):
    text = summary.summarize(make_report(chat=chat), "./it's")
    code = textwrap.dedent(text[text.index("    from transformers") :])
    compile(code, "snippet", "exec")
    assert code.count("""pipeline("text-generation", "./it's")""") == 1
    assert """'say "so"'""" in code
    assert ("[{'role': 'user', 'content': 'say \"so\"'}]" in code) is chat


def test_an_encoder_decoder_is_loaded_without_a_pipeline():
    text = summary.summarize(make_report(encoder_decoder=True), "./it's")
    code = textwrap.dedent(text[text.index("    from transformers") :])
    compile(code, "snippet", "exec")
    assert """AutoModelForSeq2SeqLM.from_pretrained("./it's")""" in code
    assert "pipeline" not in text
