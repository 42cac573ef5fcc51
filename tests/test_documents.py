"""README, docs/, CONTRIBUTING.md and CHANGELOG.md: what they name is there, what they show works."""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from finetune.settings import read_settings

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
GUIDES = [README, *PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in GUIDES}
SCRIPTS = ["train_rlhf", "train_sft", "train_reward_model", "make_instructions"]
WRITTEN = {  # what the commands that are shown write, and files of the user's own
    *("README.md", "training.png", "report.json", "metrics.jsonl", "samples.jsonl", "watch.html"),
    *("measured.jsonl", "run.json", "learned.jsonl", "compared.jsonl", "trained_model/watch.html"),
    *("comparison.md", "comparison.png", "answers.jsonl", "instructions.jsonl", "texts.jsonl"),
    *("instructions/instructions.jsonl", "pairs.jsonl", "my_prompts.csv", "rewards.py"),
    *("config.json", "rewards.py:few_words"),
}

each_guide = pytest.mark.parametrize("name", TEXTS)


def blocks(text, language):
    """Return the fenced blocks of a language, each as its lines in one text."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def commands(text):
    """Return the commands in the sh blocks of a text and between its backticks, as words."""
    # A line may go on behind \ or &&.
    lines = []
    for block in blocks(text, "sh"):
        lines += re.sub(r"(\\|&&)\n\s+", r"\1 ", block).replace("\\ ", "").splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines += re.findall(r"`((?:python|uv run|torchrun|accelerate launch) [^`]*)`", prose)
    parts = [part for line in lines for part in line.split(" && ")]
    return [shlex.split(part) for part in parts]


COMMANDS = [(name, words) for name, text in TEXTS.items() for words in commands(text)]


def test_what_counts_as_a_command():
    text = "Run `python a.py --b`.\n\n```sh\nc d \\\n    e && f &&\n  g 'h i'\nj\n```\n"
    expected = [["c", "d", "e"], ["f"], ["g", "h i"], ["j"], ["python", "a.py", "--b"]]
    assert commands(text) == expected


# ----------------------------------------------------------------------------- the form
def test_how_long_they_are():
    assert 160 <= len(TEXTS["README.md"].splitlines()) <= 180
    assert len(TEXTS["CONTRIBUTING.md"].splitlines()) < 45


@each_guide
def test_lines_are_short(name):
    """What a screen shows, in a block without a language, and a lone address can't be wrapped."""
    text = re.sub(r"^```\n.*?^```$", "", TEXTS[name], flags=re.M | re.S)
    text = re.sub(r"^\[\w+\]: \S+$", "", text, flags=re.M)
    assert [line for line in text.splitlines() if len(line) > 110] == []


@each_guide
def test_no_commit_is_named(name):
    """They stand in benchmarks/, beside what was measured."""
    hashes = re.findall(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b", TEXTS[name])
    assert hashes == []


def test_one_line_of_the_readme_runs_the_tests():
    """CI takes it from there, so it makes its own environment."""
    lines = [line for line in TEXTS["README.md"].splitlines() if line.endswith("python -m pytest")]
    (line,) = lines
    assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install -r ")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_first_screen_says_what_it_is_shows_it_and_runs_it():
    beginning = "\n".join(TEXTS["README.md"].splitlines()[:30])
    assert "![" in beginning and "pip install -r requirements.txt" in beginning
    assert "**It costs**" in beginning
    (loop,) = re.findall(r"^The model continues.*?\n\n", beginning, flags=re.M | re.S)
    assert len(re.findall(r"\.\s", loop)) == 3


def test_the_workflow_calls_what_ci_runs():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run\n" in text and 'python-version: "3.11"' in text
    assert "has not been run on GitHub" in text


def test_what_was_measured_has_its_source():
    """The README's tables stand in benchmarks/ too, beside commit, seed and machine."""

    def rows(section):
        text = TEXTS["README.md"].partition(f"## {section}\n")[2].partition("\n## ")[0]
        table = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table[1:]]

    demo = (ROOT / "benchmarks" / "demo.md").read_text(encoding="utf-8")
    said = rows("Before and after")
    assert len(said) == 4
    for row in said:
        assert f"| {' | '.join(row)} |" in demo, row
    for figure in re.findall(r"\d+\.\d %", TEXTS["README.md"]):
        assert f"| {figure} |" in demo, figure

    shape = (ROOT / "benchmarks" / "tinyllama_shape.md").read_text(encoding="utf-8")
    ((_, _, *figures),) = rows("TinyLlama")
    assert f"| {' | '.join(figures)} |" in shape
    for text in (demo, shape):
        assert re.match(r"Commit [0-9a-f]{7}, ", text)


# ---------------------------------------------------------------------------- the links
def anchors(path):
    """Return the anchors of the headings of a file, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_guide
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub("<!--.*?-->", "", TEXTS[name])):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.is_relative_to(ROOT) and found.exists(), target
        assert not anchor or anchor in anchors(found), target
    used = set(re.findall(r"\]\[(\w+)\]", TEXTS[name]))
    assert used == set(re.findall(r"^\[(\w+)\]: ", TEXTS[name], flags=re.M))


def test_all_pages_are_found_from_the_readme_and_lead_back():
    subjects = "data rewards stages several_gpus metrics models papers trackers troubleshooting"
    assert {path.stem for path in PAGES} >= {*subjects.split()}
    for path in PAGES:
        text = TEXTS[f"docs/{path.name}"]
        assert f"](docs/{path.name})" in TEXTS["README.md"], path.name
        assert text.splitlines()[2] == "[Back to the README](../README.md)", path.name
        assert blocks(text, "sh"), f"{path.name} has no line that runs"


# ---------------------------------------------------------------------- what they name
@each_guide
def test_files_that_are_named_are_there(name):
    """A name without a folder, in a line of CONTRIBUTING.md, is in finetune/ if the first one is."""
    endings = r"(?:py|md|txt|jsonl|json|png|csv|ipynb|html|yml)"
    for line in TEXTS[name].splitlines():
        folder = ""
        for file in re.findall(rf"`([\w./-]+\.{endings}(?::\w+)?)`", line):
            if name == "CONTRIBUTING.md":
                folder = "finetune/" if file.startswith("finetune/") else folder
                file = file if "/" in file or (ROOT / file).exists() else folder + file
            assert file in WRITTEN or (ROOT / file).exists(), f"{name}: {file}"


def names_in(path):
    """Return all functions, classes and methods of a file, with their classes' names too."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            for method in methods:
                names |= {method.name, f"{node.name}.{method.name}"}
    return names


def test_the_names_to_read_by_are_in_the_script():
    (table,) = re.findall(r"^\| \| in `train_rlhf.py` \|\n.*?\n\n", TEXTS["README.md"], re.M | re.S)
    rows = [line.split("|")[1:3] for line in table.strip().splitlines()[2:]]
    concepts = {concept.strip() for concept, _ in rows}
    wanted = {"policy", "rollout", "reward", "KL", "advantage", "clipped loss", "step"}
    assert concepts >= wanted
    known = names_in(ROOT / "train_rlhf.py")
    for concept, places in rows:
        names = re.findall(r"`([\w.]+)`", places)
        assert names and {*names} <= known, concept

    glossary = re.findall(r"^- \*\*(\w+)\*\*: ", TEXTS["README.md"], flags=re.M)
    assert len(glossary) == 6


def test_the_names_to_change_are_in_the_script():
    for line in TEXTS["CONTRIBUTING.md"].splitlines():
        if line.startswith("|") and re.search("`train_rlhf.py`|there", line):
            names = set(re.findall(r"`(\w+)`", line))
            assert names <= names_in(ROOT / "train_rlhf.py"), line


# ------------------------------------------------------------------- what they show
def script_of(words):
    """Return the script of ours that a command runs, and what is handed to it, or None."""
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[place + 1 :]
    return None


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_command_is_understood(name, words):
    """The script is there, knows the flags, and takes their values."""
    if words[0] == "python" and words[1] == "-m" and words[2].startswith("finetune."):
        file = words[2].replace(".", "/") + ".py"
        assert (ROOT / file).exists()
        return
    ours = script_of(words)
    if ours is None or "pip" in words:
        programs = "python3 . pip python hf tensorboard trackio wandb .ci/run"
        assert words[0] in programs.split(), words
        return
    script, flags = ours
    assert (ROOT / script).exists(), script
    module = Path(script).stem
    if module in SCRIPTS:
        constants = vars(importlib.import_module(module))
        read_settings(flags, constants, constants["Settings"], checks=())
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--")), words


def test_there_are_commands():
    assert {name for name, _ in COMMANDS} >= {name for name in TEXTS if name.startswith("docs/")}


@each_guide
def test_python_that_is_shown_runs(name, demo_model, monkeypatch, tmp_path):
    """What loads the result is shown demo_model in its place."""
    for source in blocks(TEXTS[name], "python"):
        path = tmp_path / "shown.py"
        path.write_text(source.replace("./trained_model", str(demo_model)), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            names = runpy.run_path(str(path))
        if "few_words" in names:
            assert names["few_words"]([], ["", " so very good"]) == [0, -3]
        else:
            assert "I feel so" in shown.getvalue()


# ------------------------------------------------------------------------- the fields
def fields(words):
    """Return the fields of the first table of docs/metrics.md after these words."""
    _, found, rest = TEXTS["docs/metrics.md"].partition(words)
    assert found, words
    table = re.search(r"^\| field \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", rest, re.M)[1]
    first_cells = [row.split("|")[1] for row in table.splitlines()]
    return {*re.findall(r"`(\w+)`", "".join(first_cells))}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_model):
    """Return the folders of a short run of each script that trains, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [{"text": f"I feel so {word} today."} for word in ("glad", "good", "sad", "bad")]
    pairs = [{"chosen": f"I am {n} times glad", "rejected": f"I am {n} times sad"} for n in "1234"]
    for name, rows in {"texts": texts, "pairs": pairs}.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    small = ["--device", "cpu", "--dtype", "float32", "--batch-size", "2"]
    flags = {
        "train_rlhf": ["--training-epochs", "0.5", "--eval-samples", "6"],
        "train_sft": ["--data", str(folder / "texts.jsonl"), "--eval-share", "0.5"],
        "train_reward_model": ["--data", str(folder / "pairs.jsonl"), "--eval-share", "0.5"],
    }
    for name, own in flags.items():
        places = ["--model-name", str(demo_model), "--output-dir", str(folder / name)]
        with contextlib.redirect_stdout(io.StringIO()):
            status = importlib.import_module(name).main([*places, *small, *own])
        assert status == 0, name
    return folder


def report_of(runs, name):
    return json.loads((runs / name / "report.json").read_text(encoding="utf-8"))


def test_the_fields_of_a_step_and_of_a_sample(runs):
    for record in read_lines(runs / "train_rlhf" / "metrics.jsonl"):
        assert record.keys() == fields("## metrics.jsonl")
    for sample in read_lines(runs / "train_rlhf" / "samples.jsonl"):
        assert sample.keys() == fields("## samples.jsonl")
        assert sample["tokens"].keys() == fields("`tokens` has")
    for measured in read_lines(runs / "train_rlhf" / "measured.jsonl"):
        names = ("model", "prompts", "prompt", "response", "score", "kl")
        assert tuple(measured) == names
        assert all(f"`{name}`" in TEXTS["docs/metrics.md"] for name in names)


def test_the_fields_of_the_report(runs):
    report = report_of(runs, "train_rlhf")
    assert report.keys() == fields("## report.json")
    assert report["scale"].keys() == fields("`scale` has:")
    for part in ("base", "trained"):
        assert report[part].keys() == {"train_prompts", "eval_prompts"}
        for figures in report[part].values():
            assert figures.keys() == fields("each of these has:")


@pytest.mark.parametrize("name", ["train_sft", "train_reward_model"])
def test_the_fields_of_the_stages_before(runs, name):
    for record in read_lines(runs / name / "metrics.jsonl"):
        assert record.keys() == fields("## The stages before PPO")
    report = report_of(runs, name)
    of_ppo = fields("## report.json")
    assert {"base", "trained", "learned"} <= report.keys() <= of_ppo | {"learning_rate"}
    for part in ("base", "trained"):
        assert report[part].keys() == fields(f"for `{name}.py`:")
