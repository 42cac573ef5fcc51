"""watch.html and what it is made of: the figures of each token, and the command that makes it."""

import ast
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import page_content, read_metrics, read_rows, write_run
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from finetune import pages, samples, shown, watch
from finetune.labels import Learned
from finetune.progress import recent, write_lines
from finetune.run_files import read_run
from finetune.tokens import load_tokenizer, texts_of
from finetune.words import has_word, word_spans

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ["score", "kl", "value", "advantage", "logprob", "ref_logprob"]
SHORT = ["--training-epochs", "5", "--log-every", "4"]  # 8 steps of 4


@pytest.fixture(scope="module")
def trained(run_script, demo_model, tmp_path_factory):
    """Return the folder of a short run that came to its end."""
    cwd = tmp_path_factory.mktemp("trained")
    flags = ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--max-new-tokens", "8"]
    run = run_script(cwd, "--model-name", demo_model, *flags, "--eval-samples", "12", *SHORT)
    assert run.status == 0, run.stderr
    return cwd / "trained_model"


def command(*arguments):
    """Call the command in a process of its own; return status, stdout and stderr."""
    line = [sys.executable, "-m", "finetune.watch", *map(str, arguments)]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout, run.stderr


# ------------------------------------------------------------- the figures of each token
def test_the_figures_of_tokens_sum_to_what_is_told_of_responses_and_steps(trained):
    metrics, rows = read_metrics(trained), read_rows(trained / "samples.jsonl")
    assert len(rows) == 4 * len(metrics) == 32
    for row in rows:
        tokens = row["tokens"]
        assert [*tokens] == ["text", *FIGURES]
        assert "".join(tokens["text"]) == row["response"]
        assert {len(tokens[name]) for name in tokens} == {len(tokens["text"])}
        assert sum(tokens["kl"]) == pytest.approx(row["kl"], rel=1e-3, abs=1e-6)
        assert sum(tokens["score"]) == pytest.approx(row["score"] + 1)  # an empty text scores -1
    for record in metrics:
        of_step = [row for row in rows if row["step"] == record["step"]]
        kls = [sum(row["tokens"]["kl"]) for row in of_step]
        assert sum(kls) / 4 == pytest.approx(record["kl"], rel=1e-3, abs=1e-6)
        assert sum(row["score"] for row in of_step) / 4 == record["score"]


def test_a_token_s_advantage_follows_from_its_reward_and_the_values(trained):
    """That is what the page shows beside each other; here GAE as it is written in the paper."""
    for row in read_rows(trained / "samples.jsonl"):
        tokens = row["tokens"]
        advantage, next_value = 0.0, 0.0
        for place in reversed(range(len(tokens["text"]))):
            reward = tokens["score"][place] - 0.1 * tokens["kl"][place]
            delta = reward + next_value - tokens["value"][place]
            advantage = delta + 0.95 * advantage
            next_value = tokens["value"][place]
            assert tokens["advantage"][place] == pytest.approx(advantage, rel=2e-3, abs=2e-3)


def test_the_first_step_is_the_base_model_s(trained):
    first = read_rows(trained / "samples.jsonl")[0]["tokens"]
    assert first["logprob"] == first["ref_logprob"]
    assert set(first["kl"]) == set(first["value"]) == {0.0}


def settings_of(batch_size=10, max_new_tokens=10):
    return SimpleNamespace(batch_size=batch_size, max_new_tokens=max_new_tokens)


@given(
    total=st.integers(1, 10**5),
    batch_size=st.integers(1, 2000),
    max_new_tokens=st.integers(1, 5000),
)
def test_a_long_run_keeps_an_even_choice_of_steps(total, batch_size, max_new_tokens):
    settings = settings_of(batch_size, max_new_tokens)
    total = min(total, 3000)
    kept = [step for step in range(1, total + 1) if samples.keeps_tokens(step, total, settings)]
    assert (kept[0], kept[-1]) == (1, total)
    gaps = {later - step for step, later in pairwise(kept[:-1])}
    assert len(gaps) <= 1  # but for the last step, which is always kept
    of_step = min(batch_size * max_new_tokens, samples.TOKENS_OF_STEP)
    assert len(kept) * of_step <= samples.TOKENS_OF_RUN + 2 * of_step


def test_at_the_defaults_all_steps_are_kept():
    assert all(samples.keeps_tokens(step, 90, settings_of()) for step in range(1, 91))
    kept = [step for step in range(1, 1201) if samples.keeps_tokens(step, 1200, settings_of())]
    assert kept == [*range(1, 1200, 2), 1200]


def test_a_step_of_very_many_tokens_keeps_those_of_its_first_responses(monkeypatch):
    monkeypatch.setattr(samples, "TOKENS_OF_STEP", 5)
    tokenizer = load_tokenizer(ROOT / "demo_model")
    query = torch.tensor(tokenizer("I am")["input_ids"])
    responses = [torch.tensor(tokenizer("so happy")["input_ids"][-2:])] * 3
    figures = [[torch.full((len(response),), 1 / 3) for response in responses]] * 6
    names = ("scores", "kl", "values", "advantages", "logprobs", "ref_logprobs")
    rollout = SimpleNamespace(queries=[query] * 3, responses=responses)
    rows = [{} for _ in responses]
    samples.add_tokens(rows, tokenizer, rollout, SimpleNamespace(**dict(zip(names, figures))))
    assert ["tokens" in row for row in rows] == [True, True, False]
    assert rows[0]["tokens"]["kl"] == [0.3333] * len(responses[0])


def test_numbers_that_are_not_finite_are_null():
    numbers = torch.tensor([1.23456789, math.nan, -math.inf, 0.0])
    assert samples.rounded(numbers) == [1.235, None, None, 0.0]


def test_in_all_files_of_lines_such_numbers_are_null(tmp_path):
    row = {"a": math.nan, "b": {"c": [math.inf, 1.5, 2]}, "d": None, "e": "nan"}
    write_lines(tmp_path / "rows.jsonl", [row])
    wanted = {"a": None, "b": {"c": [None, 1.5, 2]}, "d": None, "e": "nan"}
    assert read_rows(tmp_path / "rows.jsonl") == [wanted]


def test_an_empty_response_has_no_tokens():
    tokenizer = load_tokenizer(ROOT / "demo_model")
    query = torch.tensor(tokenizer("I am")["input_ids"])
    assert samples.token_texts(tokenizer, query, query[:0]) == []


def test_other_processes_leave_the_tokens_to_the_main_one(monkeypatch):
    monkeypatch.setattr(samples, "is_main_process", lambda: False)
    rows = [{}]
    samples.add_tokens(rows, None, None, None)
    assert rows == [{}]


# ------------------------------------------------------------------ the texts of tokens
@pytest.mark.parametrize("text", [" so happy 😀 행복, naïve 日本", "🙂🙃", "\n\n a\tb", ""])
@pytest.mark.parametrize("name", ["demo_model", "gpt2"])
def test_the_texts_of_tokens_are_together_that_of_the_response(name, text, request):
    """Where a token is a part of a letter, the letter belongs to the last of its tokens."""
    path = request.getfixturevalue(name)
    tokenizer = load_tokenizer(path)
    query = torch.tensor(tokenizer("I feel")["input_ids"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    response = torch.tensor(ids)
    (whole,) = texts_of(tokenizer, query, [response])
    texts = samples.token_texts(tokenizer, query, response)
    assert "".join(texts) == whole
    assert len(texts) == len(ids)
    assert texts[-1] == ""  # the end token says nothing
    assert not any("\ufffd" in part for part in texts)


def test_letters_cut_off_at_the_end_are_shown_as_such():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo_model")
    query = torch.tensor(tokenizer("I feel")["input_ids"])
    ids = tokenizer("😀", add_special_tokens=False)["input_ids"]
    if len(ids) < 4:
        pytest.skip("this tokenizer has a token for it")
    response = torch.tensor(ids[:-1])
    (whole,) = texts_of(tokenizer, query, [response])
    texts = samples.token_texts(tokenizer, query, response)
    assert "".join(texts) == whole and "\ufffd" in whole


# ------------------------------------------------------------------- the words that count
def test_where_the_words_are_that_count():
    words = ["happy", "glad", ":)", "행복", "straße"]
    assert word_spans(" so happy, unhappy, HAPPY", words) == [(4, 9), (20, 25)]
    assert word_spans("ly glad :)", words, before="I am happ") == [(3, 7), (8, 10)]
    assert word_spans("ppy glad", ["happy"], before="I am ha") == []
    assert word_spans("😀 glad 행복해", words) == [(2, 6), (7, 9)]
    assert word_spans("die STRASSE", words) == [(4, 11)]
    assert word_spans("ﬁne cafe\u0301 x", ["café"]) == [(4, 9)]


@given(st.text(alphabet="hapyß İé\u0301ﬁ😀", max_size=12), st.text(alphabet="ha y", max_size=4))
def test_words_are_marked_where_and_only_where_they_count(text, before):
    words = ["happy", "ß", "é", "fi"]
    spans = word_spans(text, words, before)
    assert bool(spans) == has_word(text, words, before)
    assert all(0 <= first < last <= len(text) for first, last in spans)


# ---------------------------------------------------------------------------- the page
def test_the_page_of_a_run(trained):
    path = trained / "watch.html"
    content = page_content(path)
    rows, report = (
        read_rows(trained / "samples.jsonl"),
        json.loads((trained / "report.json").read_text()),
    )
    assert [step["step"] for step in content["steps"]] == [*range(1, 9)]
    assert json.loads((trained / "run.json").read_text())["scored_places"] == [*range(8)]
    assert content["scored_places"] is None and content["score_prefixes"]
    responses = [response for step in content["steps"] for response in step["responses"]]
    assert [response["tokens"] for response in responses] == [row["tokens"] for row in rows]
    assert (
        content["results"]["trained"]["train_prompts"]["kl"]
        == report["trained"]["train_prompts"]["kl"]
    )
    for response in responses:
        words = [response["response"][first:last] for first, last in response["marks"]]
        assert bool(words) == (response["score"] > 0)

    measured = read_rows(trained / "measured.jsonl")
    assert len(measured) == 4 * 12
    for model, name in (("base", "train_prompts"), ("trained", "eval_prompts")):
        rows = [row for row in measured if (row["model"], row["prompts"]) == (model, name)]
        mean_score = sum(row["score"] for row in rows) / 12
        assert mean_score == pytest.approx(report[model][name]["score"])
    asked = [(row["prompt"], row["held_out"]) for row in content["measured"]]
    assert len(asked) == 12 and [held_out for _, held_out in asked] == [False] * 6 + [True] * 6
    for row in content["measured"]:
        before, after = row["pairs"][0]
        prompts = "eval_prompts" if row["held_out"] else "train_prompts"
        assert before["response"] == report["base"][prompts]["first_sample"][row["prompt"]]
        assert after["response"] == report["trained"][prompts]["first_sample"][row["prompt"]]


def test_the_command_makes_the_same_page_as_the_run(trained):
    made = (trained / "watch.html").read_bytes()
    status, stdout, stderr = command(trained)
    assert (status, stderr) == (0, "")
    assert stdout == f"{trained}/watch.html, {len(made) / 1000:,.0f} kB: open it in a browser\n"
    assert (trained / "watch.html").read_bytes() == made
    assert not [*trained.glob("*.unfinished")]


def test_the_command_loads_no_heavy_library():
    code = (
        "import sys, finetune.watch; print({'torch', 'transformers', 'pydantic'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n"


def test_what_is_no_run_s_folder_is_told_in_a_line(tmp_path):
    assert watch.main([str(tmp_path / "none")]) == 2
    (tmp_path / "a_file").touch()
    for path, problem in (
        (tmp_path / "none", "is no folder"),
        (tmp_path / "a_file", "is no folder"),
        (tmp_path, "has no metrics.jsonl"),
    ):
        status, stdout, stderr = command(path)
        assert (status, stdout) == (2, "")
        remedy = "name OUTPUT_DIR of a run, or wait until its first step is done"
        assert stderr == f"{path} {problem}: {remedy}\n"


def test_before_the_first_step_there_is_nothing_to_watch(tmp_path, capsys):
    write_run(tmp_path, 0, total=5)
    assert watch.main([str(tmp_path)]) == 2
    told = f"{tmp_path} has no step yet: wait until the first is done\n"
    assert capsys.readouterr() == ("", told)


def test_a_broken_line_is_told_with_its_file_and_number(tmp_path, capsys):
    folder = write_run(tmp_path, 3)
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:30] + "\n", *lines[5:]]))
    assert watch.main([str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"{path}, line 5, can't be read (")


def test_of_a_run_that_goes_on_the_line_that_is_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path, 5, total=9)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = folder / name
        path.write_text(path.read_text()[:-40])
    # It may end within a letter.
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join([*lines[:-1], b'{"prompt": "\xed\x96']))
    content = page_content(watch.write_page(folder))
    assert (content["step"], content["total_steps"], content["results"]) == (4, 9, None)
    # The samples of a step are written before its metrics.
    assert [step["step"] for step in content["steps"]] == [1, 2, 3, 4]
    assert content["measured"] == []


def test_the_report_of_an_earlier_end_says_nothing_of_a_run_that_went_on(tmp_path):
    folder = write_run(tmp_path, 5, total=9)
    report = {"samples": 30, "device": "CPU", "learned": True, "base": {}, "trained": {}}
    (folder / "report.json").write_text(json.dumps(report))
    assert page_content(watch.write_page(folder))["results"] is None
    (folder / "report.json").write_text(json.dumps(report | {"samples": 50}))
    assert page_content(watch.write_page(folder))["results"] is not None


def test_the_comparisons_of_an_earlier_end_are_not_shown_either(tmp_path):
    folder = write_run(tmp_path, 3, total=9)
    run = json.loads((folder / "run.json").read_text()) | {"script": "train_reward_model"}
    (folder / "run.json").write_text(json.dumps(run))
    line = {"better": "a", "better_score": 1.0, "worse": "b", "worse_score": math.nan}
    (folder / "compared.jsonl").write_text(json.dumps(line) + "\n")
    report = {"samples": 20, "device": "CPU", "learned": True, "base": {}, "trained": {}}
    (folder / "report.json").write_text(json.dumps(report))
    assert page_content(watch.write_page(folder))["comparisons"] == []
    (folder / "report.json").write_text(json.dumps(report | {"samples": 30}))
    (row,) = page_content(watch.write_page(folder))["comparisons"]
    assert row["worse_score"] is None


def test_figures_that_are_not_finite_are_no_hindrance(tmp_path):
    folder = write_run(tmp_path, 5)
    figures = {"loss": math.nan, "calibration": [{"observed": math.inf}], "first_sample": {}}
    report = {"samples": 50, "device": "CPU", "learned": False, "base": figures, "trained": figures}
    (folder / "report.json").write_text(json.dumps(report))
    results = page_content(watch.write_page(folder))["results"]
    assert results["base"] == {"loss": None, "calibration": [{"observed": None}]}


def test_a_run_without_tokens_has_a_page_too(tmp_path):
    folder = write_run(tmp_path, 3)
    rows = read_rows(folder / "samples.jsonl")
    for row in rows:
        del row["tokens"]
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines))
    content = page_content(watch.write_page(folder))
    assert [len(step["responses"]) for step in content["steps"]] == [10] * 3


def test_a_file_that_was_spoiled_costs_a_run_its_page_and_nothing_else(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, "--device", "cpu", "--batch-size", "4"]
    flags += ["--eval-samples", "4", "--eval-prompts", "--max-new-tokens", "4"]
    assert call_main(*flags, "--training-epochs", "1") == 0
    folder = tmp_path / "trained_model"
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(["no JSON\n", *lines[1:]]))
    (folder / "watch.html").unlink()
    capsys.readouterr()
    assert call_main(*flags, "--training-epochs", "2", "--resume") == 0
    out, err = capsys.readouterr()
    told = "There is no new watch.html (trained_model/samples.jsonl, line 1, can't be read ("
    assert told in out and err == ""
    assert json.loads((folder / "report.json").read_text())["samples"] == 12
    assert not (folder / "watch.html").exists()


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "watch.css"), KeyError("x")]
)
def test_whatever_fails_costs_a_run_its_page_and_nothing_else(
    call_main, demo_model, tmp_path, capsys, monkeypatch, error
):
    folder = tmp_path / "trained_model"

    def fail(path):
        # The results have moved: nothing can be lost any more.
        assert json.loads((folder / "report.json").read_text())["samples"] == 8
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        raise error

    monkeypatch.setattr(watch, "make_page", fail)
    flags = ["--model-name", demo_model, "--device", "cpu", "--batch-size", "4"]
    flags += ["--eval-samples", "4", "--eval-prompts", "--max-new-tokens", "4"]
    assert call_main(*flags, "--training-epochs", "1") == 0
    out, err = capsys.readouterr()
    assert out.count("There is no new watch.html (") == 1 and err == ""


def test_a_disk_that_is_full_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path, 2)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    assert watch.main([str(folder)]) == 1
    told = f"{folder}/watch.html can't be used: No space left on device\n"
    assert capsys.readouterr().err == told


def test_a_file_that_is_lacking_is_the_one_that_is_named(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path, 2)
    monkeypatch.setattr(watch, "__file__", str(tmp_path / "elsewhere" / "watch.py"))
    assert watch.main([str(folder)]) == 1
    told = f"{tmp_path}/elsewhere/watch.css can't be used: No such file or directory\n"
    assert capsys.readouterr().err == told


def test_several_may_make_a_page_at_once(tmp_path):
    folder = write_run(tmp_path, 30)
    line = [sys.executable, "-m", "finetune.watch", str(folder)]
    runs = [subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(4)]
    assert [run.communicate()[1] for run in runs] == [b""] * 4
    assert not [*folder.glob("*.unfinished")]


LONG = [" 행복" * 3, " happy", *(["<&>\u2028"] * 8)]


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (1200, {}),
        (30, {"texts": LONG * 40}),
        (6, {"texts": ["a", "b"] * 20_000, "batch_size": 2}),
        (12, {"batch_size": 800, "texts": LONG}),
        (3000, {"batch_size": 1}),
    ],
    ids=["samples", "tokens", "a_token_too_many", "batch", "steps"],
)
def test_no_page_is_larger_than_two_megabytes(tmp_path, steps, options):
    folder = write_run(tmp_path, steps, **options)
    path = watch.write_page(folder)
    assert path.stat().st_size <= 2_000_000
    content = page_content(path)
    numbers = [step["step"] for step in content["steps"]]
    assert (numbers[0], numbers[-1]) == (1, steps)
    gaps = {later - step for step, later in pairwise(numbers[:-1])}
    assert len(gaps) <= 1
    assert all(step["responses"] for step in content["steps"])
    assert content["steps"][0]["count"] == options.get("batch_size", 10)
    curve = content["curve"]
    assert curve["step"][0] == 1 and curve["step"][-1] == steps
    assert len(curve["step"]) <= pages.POINTS + 1
    if steps <= pages.POINTS:
        assert curve["scaled"] == [1.0] * steps


def test_texts_can_t_end_the_element_that_they_are_in(tmp_path):
    texts = ["</script>", "<script>alert(1)</script>", "<!--", " \"'&amp;\u2028", "{{SCRIPT}}"]
    folder = write_run(tmp_path, 2, texts=texts, model_name="<script><b>{{STYLE}}")
    path = watch.write_page(folder)
    page = path.read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert "<!--" not in page.partition('id="content">')[2].partition("</script>")[0]
    content = page_content(path)
    assert content["steps"][0]["responses"][0]["response"] == "".join(texts)
    assert content["model"] == "<script><b>{{STYLE}}"


def test_nothing_but_what_is_in_the_page_is_allowed_there(tmp_path):
    page = watch.write_page(write_run(tmp_path, 2)).read_text(encoding="utf-8")
    (allowed,) = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert allowed.startswith("default-src 'none'; ")
    assert "unsafe" not in allowed and "http" not in allowed
    assert not re.search(r"(src|href)=(?!.data:)", page)
    script = (ROOT / "finetune" / "watch.js").read_text(encoding="utf-8")
    assert not re.search("innerHTML|outerHTML|insertAdjacent|document.write|eval\\(|fetch", script)


def test_each_quantity_names_a_function_of_the_script():
    template = (ROOT / "finetune" / "watch.html").read_text(encoding="utf-8")
    named = re.findall(r'data-quantity="(\w+)".*?<code>(\w+)</code></td>\s*</tr>', template, re.S)
    assert [quantity for quantity, _ in named] == [
        "score", "kl", "price", "reward", "value", "advantage", "change",
    ]  # fmt: skip
    tree = ast.parse((ROOT / "train_rlhf.py").read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.ClassDef
    functions = {node.name: ast.unparse(node) for node in ast.walk(tree) if isinstance(node, kinds)}
    # What stands there, and not only that it is there.
    lines = {
        "score": "earned[asked[1:] - 1] = scaled.diff()",
        "kl": "kl = expectation(probabilities, differences)",
        "price": "config.init_kl_coef * kl",
        "reward": "rewards = batch.token_scores - config.init_kl_coef * kl",
        "value": "return (states, values[..., 0] + values[..., 1] * earned)",
        "advantage": "advantage = delta + gamma * lam * advantage",
        "change": "ref_logprobs = of_tokens(all_ref_logprobs, tokens)",
    }
    for quantity, name in named:
        assert lines[quantity] in functions[name], quantity


# ------------------------------------------------------------------------ marks without a rule
def test_where_there_are_no_words_the_token_is_marked_that_earned_most(tmp_path):
    folder = write_run(tmp_path, 2, reward="rewards.py:few_words")
    response = page_content(watch.write_page(folder))["steps"][0]["responses"][0]
    assert response["marks"] == [[4, 9]]
    assert response["response"][4:9] == "happy"


@pytest.mark.parametrize(
    ("scores", "places", "marked"),
    [
        ([0.0, 0.5, 0.0, 2.0], [0, 1, 2, 3], ["d"]),
        ([0.0, 0.5, 0.0, 2.0], [0, 2], ["c d"]),
        ([0.0, 3.0, 0.0, 2.0], [0, 2], ["a b"]),
        ([0.0, 0.0, 0.0, 2.0], [0], ["a b c d"]),
        ([-1.0, None, 0.0, 0.0], [0, 1, 2, 3], []),
        ([], [0], []),
    ],
)
def test_marked_is_what_was_scored_together(tmp_path, scores, places, marked):
    """With MAX_PREFIXES the last token earns what those since the place before it added."""
    texts = [" a", " b", " c", " d"][: len(scores)]
    folder = write_run(tmp_path, 1, texts=[" a", " b", " c", " d"], places=places, reward="r.py:f")
    tokens = {"text": texts, "score": scores}
    marks = pages.best_tokens(tokens, read_run(folder))
    assert ["".join(texts)[first:last] for first, last in marks] == marked
    content = page_content(watch.write_page(folder))
    assert content["scored_places"] == (None if len(places) == 4 else places)


def test_where_only_whole_responses_are_scored_no_token_is_marked(tmp_path):
    folder = write_run(tmp_path, 1, reward="rewards.py:few_words", score_prefixes=False)
    assert page_content(watch.write_page(folder))["steps"][0]["responses"][0]["marks"] == []


def test_a_run_tells_after_how_many_tokens_the_score_was_asked(call_main, demo_model, tmp_path):
    flags = ["--model-name", demo_model, "--device", "cpu", "--batch-size", "4"]
    flags += ["--eval-samples", "4", "--eval-prompts", "--max-new-tokens", "8"]
    flags += ["--training-epochs", "0.5", "--output-dir"]
    for name, more, places in (
        ("some", ["--max-prefixes", "2"], [0, 4]),
        ("none", ["--no-score-prefixes"], None),
    ):
        assert call_main(*flags, name, *more) == 0
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["scored_places"] == places
        content = page_content(tmp_path / name / "watch.html")
        assert content["scored_places"] == places


# ------------------------------------------------------------------------ what is told
def test_the_mean_is_that_of_the_screen_whatever_the_batch(tmp_path):
    folder = write_run(tmp_path, 9, batch_size=30)
    metrics = read_rows(folder / "metrics.jsonl")
    for record in metrics:
        record["score"] = record["step"] ** 2 / 81
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    for step in page_content(watch.write_page(folder))["steps"]:
        screen = recent(metrics[: step["step"]], "score")
        assert step["mean_score"] == pytest.approx(screen, rel=1e-3)


def test_only_scores_on_another_scale_are_told_as_such(tmp_path):
    folder = write_run(tmp_path, 3)
    metrics = read_rows(folder / "metrics.jsonl")
    for factor, is_scaled in ((1.0, False), (2.0, True)):
        for record in metrics:
            record |= {"score": 7477.938, "reward": factor * 7477.938 - 0.1 * record["kl"]}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        content = page_content(watch.write_page(folder))
        assert content["is_scaled"] is is_scaled
        assert content["steps"][0]["score"] == 7477.938


def test_the_title_is_the_last_name_of_any_path(tmp_path):
    for name in ("C:\\models\\tiny\\", "/home/tiny", "org/tiny", "tiny", "x" * 90 + "/tiny/"):
        folder = write_run(tmp_path, 1, model_name=name)
        assert page_content(watch.write_page(folder))["model"] == "tiny"


def test_a_mark_at_the_very_end_of_a_text_is_kept():
    text = "x" * 395 + " glad"
    shown_text = pages.marked_text(text, [(396, 400)])
    assert shown_text == {"response": text, "marks": [(396, 400)]}
    assert pages.marked_text(text + "!", [(396, 400)])["marks"] == []


def test_samples_that_are_lacking_are_told(tmp_path):
    folder = write_run(tmp_path, 9)
    path = folder / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:50]))
    assert page_content(watch.write_page(folder))["last_step_with_samples"] == 5


# ---------------------------------------------------------------- the stages before PPO
def test_the_tokens_of_an_example_are_its_text_with_special_ones_by_name(demo_model):
    tokenizer = load_tokenizer(demo_model)
    ids = tokenizer("Say 😀, please")["input_ids"] + [tokenizer.eos_token_id]
    texts = shown.names_and_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert (texts[0], texts[-1]) == (tokenizer.bos_token, tokenizer.eos_token)
    assert "".join(texts[1:-1]).strip() == "Say 😀, please"


def test_of_a_long_example_the_end_is_shown_where_the_answer_is(demo_model, tmp_path):
    tokenizer = load_tokenizer(demo_model)
    ids = tokenizer(" dog" * 3000)["input_ids"]
    labels = [-100] * (len(ids) - 2) + ids[-2:]
    learned = Learned([{"input_ids": ids, "labels": labels}] * 9, [{"shown": "dog"}] * 9)
    shown.write_learned(tokenizer, learned, learned, tmp_path / "learned.jsonl")
    rows = read_rows(tmp_path / "learned.jsonl")
    assert [row["held_out"] for row in rows] == [True] * 6 + [False] * 6
    for row in rows:
        assert len(row["text"]) == len(row["learned"]) == 1000
        assert row["learned"] == [False] * 998 + [True] * 2


def test_of_many_comparisons_an_even_choice_is_scored_and_written(tmp_path):
    pairs = [{"texts": ("a" * n, "b"), "signs": (1.0, -1.0)} for n in range(1, 500)]
    labelled = [{"texts": ("bad",), "signs": (-1.0,)}]
    path = tmp_path / "compared.jsonl"
    lengths = [[float(len(text)) for text in pair["texts"]] for pair in pairs]
    shown.write_compared(pairs, lengths, path)
    rows = read_rows(path)
    assert [row["better_score"] for row in rows] == [*range(1, 500, 3)]
    shown.write_compared(labelled, [[3.0]], path)
    wanted = {"better": None, "better_score": None, "worse": "bad", "worse_score": 3.0}
    assert read_rows(path) == [wanted]
