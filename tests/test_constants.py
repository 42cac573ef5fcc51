"""Constants are plain Python that anybody edits: it works, or ends in one line that helps."""

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refusals

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from finetune.command import run_main

SCRIPTS = [train_rlhf, train_sft, train_reward_model, make_instructions]
ROOT = Path(train_rlhf.__file__).parent


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def each(request):
    return request.param


def names_of(script):
    return [name.upper() for name in script.Settings.model_fields]


def source_of(script):
    return Path(script.__file__).read_text(encoding="utf-8")


def assigned_constants(source):
    """Return {name: node} of what is assigned before the first class."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            return found
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            assert target.id not in found
            found[target.id] = node


def name_in(text):
    """Return the constant that the text of an edit assigns or deletes."""
    return re.search("^(del )?([A-Z_]+)", text, flags=re.M)[2]


def edit(source, *texts):
    """Return the source with these texts where their constants are; "del X" leaves nothing."""
    for text in texts:
        node = assigned_constants(source)[name_in(text)]
        lines = source.split("\n")
        new = [] if text.startswith("del ") else text.split("\n")
        lines[node.lineno - 1 : node.end_lineno] = new
        source = "\n".join(lines)
    return source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go to a folder with an earlier run, and data for all scripts, without a GPU."""
    for name in ("trained_model", "sft_model", "reward_model", "instructions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text("{}")
    row = {"prompt": "Hi", "chosen": " good", "rejected": " bad", "completion": " good"}
    rows = json.dumps([row, row | {"prompt": "Life is"}])
    for name in ("instructions.jsonl", "pairs.jsonl"):
        (tmp_path / name).write_text(rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def contents(folder):
    """Return what is in a folder but for the script."""
    paths = [path for path in folder.rglob("*") if path.name != "edited.py"]
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.fixture
def call_edited(folder, monkeypatch, capsys):
    """Execute an edited file, and call main; return status, what it would run, stderr."""

    def call(source, *flags):
        before, started = contents(folder), []
        (folder / "edited.py").write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", folder / "edited.py")
        edited = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", edited)
        spec.loader.exec_module(edited)
        edited.run = started.append
        status = edited.main(list(flags))
        output, message = capsys.readouterr()
        assert output == "" and contents(folder) == before
        return status, started, message

    return call


@pytest.fixture
def call_constants(folder, capsys):
    """Do the same with the constants of train_rlhf.py alone, which takes no time."""

    def call(source, *flags):
        names = {"Path": Path, "json": json}
        nodes = list(assigned_constants(source).values())
        exec(compile(ast.Module(nodes, []), "<edited>", "exec"), names)
        started, settings = [], train_rlhf.Settings
        status = run_main(started.append, flags, names, settings, train_rlhf.CHECKS)
        output, message = capsys.readouterr()
        assert output == ""
        return status, started, message

    return call


# ------------------------------------------------------------------- the edits that work
ABOVE = "# Price of one nat of KL.\n#\n\nKL_COEF = 0.2"
MY_REWARD = 'REWARD = Path("my.py").name + ":score"'


@pytest.mark.parametrize(
    ("text", "flags", "value"),
    [
        pytest.param("KL_COEF = 0.2", [], 0.2, id="comment dropped"),
        pytest.param(ABOVE, [], 0.2, id="comment above"),
        pytest.param("KL_COEF = 0.2  # KL_COEF = 7, {x} \\", [], 0.2, id="other comment"),
        pytest.param("KL_COEF=0.2# price", [], 0.2, id="no space"),
        pytest.param("KL_COEF: float = 0.2", [], 0.2, id="annotation"),
        pytest.param("KL_COEF = 1", [], 1.0, id="whole number"),
        pytest.param("KL_COEF = 1", ["--kl-coef", "0.5"], 0.5, id="fraction as flag"),
        pytest.param("BATCH_SIZE = 12.0", [], 12, id="fraction that is whole"),
        pytest.param('BATCH_SIZE = "12"', [], 12, id="whole number in quotes"),
        pytest.param('LEARNING_RATE = "1e-4"', [], 1e-4, id="number in quotes"),
        pytest.param("SEED = 2 * 3", [], 6, id="calculation"),
        pytest.param('RESUME = "False"', [], False, id="switch in quotes"),
        pytest.param('OUTPUT_DIR = Path("x") / "y"', [], "x/y", id="path"),
        pytest.param('MODEL_NAME = Path("..")', [], "..", id="model as path"),
        pytest.param('POSITIVE_WORDS = "happy"', [], ["happy"], id="one word"),
        pytest.param('POSITIVE_WORDS = ("joy", "glad")', [], ["joy", "glad"], id="tuple"),
        pytest.param('PROMPTS = "Good day"', [], ["Good day"], id="one prompt"),
        pytest.param('PROMPTS = "Good day",', [], ["Good day"], id="tuple of one prompt"),
        pytest.param('EVAL_PROMPTS = "..."', [], ["..."], id="one prompt held out"),
        pytest.param("EVAL_PROMPTS = ()", [], [], id="nothing held out"),
        pytest.param("TRAINING_EPOCHS = 0.1", [], 0.1, id="a tenth of an epoch"),
        pytest.param("SUCCESS_THRESHOLD = 5", [], 5.0, id="number where auto was"),
        pytest.param('LORA_TARGETS = "q_proj"', [], ["q_proj"], id="one layer"),
        pytest.param(MY_REWARD, [], "my.py:score", id="calculated text"),
    ],
)
def test_an_edit_that_works(call_constants, text, flags, value):
    source = edit(source_of(train_rlhf), text)
    status, (settings,), message = call_constants(source, *flags)
    assert (status, message) == (0, "")
    found = getattr(settings, name_in(text).lower())
    assert (found, type(found)) == (value, type(value))


EDITS = (
    '# Which model?\nMODEL_NAME = str("sft") + "_model"',
    'OUTPUT_DIR="mine"# all of it',
    'DEVICE: str = "cpu"',
    'BATCH_SIZE = "4"  # BATCH_SIZE = 7, 100 % {x} \\',
    "LOG_EVERY = 4.0",
    "SEED = 2 * 3",
)
EDITED = {"model_name": "sft_model", "output_dir": "mine", "device": "cpu", "batch_size": 4}
EDITED |= {"log_every": 4, "seed": 6}


def test_an_edited_file(each, call_edited):
    source = edit(source_of(each), *EDITS)
    status, (settings,), message = call_edited(source, "--dtype", "float32")
    assert (status, message) == (0, "")
    defaults = {name.lower(): getattr(each, name) for name in names_of(each)}
    assert settings.model_dump() == defaults | EDITED | {"dtype": "float32"}


# ------------------------------------------------------------ the edits that are refused
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("KL_COEF = None", "None"),
        ("KL_COEF = 0,1", "(0, 1)"),
        ("KL_COEF = True", "True"),
        ("BATCH_SIZE = 10**5000", "1" + "0" * 78 + "…"),
        ("SUCCESS_THRESHOLD = True", "True"),
        # What has a name is no text for that.
        ('PROMPTS = (text for text in ["I"])', "<generator object"),
        ("POSITIVE_WORDS = str", "<class 'str'>"),
        ("OUTPUT_DIR = json", "<module 'json'"),
        ("POSITIVE_WORDS = {}", "{}"),
        ("del SEED", "None"),
        ("PROMPTS: list", "None"),  # which gives it no value
    ],
)
def test_an_edit_that_is_refused(call_constants, text, shown):
    status, started, message = call_constants(edit(source_of(train_rlhf), text))
    (problem,) = refusals(status, message)
    assert started == []
    assert problem.startswith(f"{name_in(text)} is {shown}") and ": give " in problem


def test_edits_of_a_file_that_are_refused_are_told_at_once(each, call_edited):
    source = edit(source_of(each), "BATCH_SIZE = 2.5", "SEED = None", 'DTYPE = "int8"')
    source = edit(source, "LOG_EVERY = str", "del MODEL_NAME")
    # The flag mends the first one.
    status, started, message = call_edited(source, "--batch-size", "1")
    assert started == []
    assert refusals(status, message) == [
        "MODEL_NAME is None: give a text",
        "DTYPE is int8: give auto, float32, bfloat16 or float16",
        "SEED is None: give a whole number from 0 to 4294967295",
        "LOG_EVERY is <class 'str'>: give a whole number from 1 to 1000000",
    ]


# --------------------------------------------------------------- quotes that are missing
def test_a_file_with_a_constant_that_lacks_its_quotes(each, folder):
    """A fresh process, since it goes through sys.excepthook; its path is a relative one."""
    before = contents(folder)
    (folder / "edited.py").write_text(edit(source_of(each), "DEVICE = cpu  # or cuda"))
    command = [sys.executable, "-B", "edited.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'DEVICE = cpu: give "cpu", in quotes\n'
    assert contents(folder) == before


@pytest.fixture
def end_of(folder, monkeypatch, capsys):
    """Execute a source as a script until it raises; return how that ends, and stderr."""
    path = folder / "edited.py"
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def execute(source):
        path.write_text(source, encoding="utf-8")
        names, status = {"__name__": "__main__", "__file__": str(path)}, None
        with pytest.raises(Exception) as error:
            exec(compile(source, path, "exec"), names)
        try:
            # Without the frame of this test.
            sys.excepthook(error.type, error.value, error.tb.tb_next)
        except SystemExit as exit:
            status = exit.code
        return status, capsys.readouterr().err

    yield execute
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        # It is there, but only further below.
        ("REWARD = positive_word_reward", "positive_word_reward"),
        ("LORA_TARGETS = [q_proj]", "q_proj"),
        ("RESUME = true", "true"),
    ],
)
def test_what_else_may_lack_its_quotes(end_of, text, name):
    message = f'{text}: give "{name}", in quotes\n'
    assert end_of(edit(source_of(train_rlhf), f"{text}  # a comment")) == (2, message)


def test_other_errors_than_missing_quotes_keep_their_traceback(end_of):
    source = source_of(train_rlhf)
    status, message = end_of(edit(source, "SEED = 1 / 0"))
    assert status is None and message.endswith("ZeroDivisionError: division by zero\n")

    # This one is not in a line of the script itself.
    wrong = "def wrong():\n    no_such_name\n\nwrong()\nSEED = 0"
    status, message = end_of(edit(source, wrong))
    assert status is None and message.startswith("Traceback")


# ------------------------------------------------------------------- the imported module
def test_constants_that_are_set_on_the_imported_module(folder, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(train_rlhf, "run", started.append)
    monkeypatch.setattr(sys, "argv", ["my_program.py", "--flag-of-its-own"])
    monkeypatch.setattr(train_rlhf, "KL_COEF", 1)
    monkeypatch.setattr(train_rlhf, "OUTPUT_DIR", Path("elsewhere"))
    monkeypatch.setattr(train_rlhf, "REWARD", train_rlhf.positive_word_reward)
    assert train_rlhf.main() == 0
    assert train_rlhf.main(["--kl-coef", "0.5"]) == 0
    assert [settings.kl_coef for settings in started] == [1.0, 0.5]
    assert started[0].output_dir == "elsewhere"
    assert started[0].reward == "positive_word_reward"
    assert capsys.readouterr() == ("", "")

    monkeypatch.setattr(train_rlhf, "KL_COEF", None)
    monkeypatch.delattr(train_rlhf, "SEED")
    seed, kl_coef = refusals(train_rlhf.main(), capsys.readouterr().err)
    assert seed == "SEED is None: give a whole number from 0 to 4294967295"
    assert kl_coef == "KL_COEF is None: give a number from 0 to 1e+30"
    assert len(started) == 2


def test_a_function_of_ones_own_set_on_the_imported_module(read_settings, monkeypatch):
    """As in a notebook: it is called by its object; the settings have its name alone."""

    def politeness(prompts, completions, **kwargs):
        return [float(len(text)) for text in completions]

    monkeypatch.setattr(train_rlhf, "REWARD", politeness)
    settings = read_settings("--device", "cpu")
    rows = [{"prompt": "I feel so"}, {"prompt": "Life is"}]
    scorer, scale = train_rlhf.load_reward(settings, rows, torch.device("cpu"))
    assert (settings.reward, scale) == ("politeness", None)
    assert scorer(rows, ["a", "bcd"]) == [1.0, 3.0]


# --------------------------------------------------------------------- a notebook's cell
@pytest.fixture
def run_cell(folder, monkeypatch):
    """Run a file as a notebook's cell, its run a mere note; return that, and its output."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def run(source):
        hook, before = sys.excepthook, signal.signal(signal.SIGINT, interrupt)
        monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
        head, _, end = source.rpartition("\nif ")
        source = f"{head}\nrun = started.append\nif {end}"
        names = {"__name__": "__main__", "started": []}
        output, message = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(message):
                exec(compile(source, "<cell>", "exec"), names)
            assert signal.getsignal(signal.SIGINT) is interrupt
            assert sys.excepthook is hook
        finally:
            signal.signal(signal.SIGINT, before)
        return names["started"], output.getvalue(), message.getvalue()

    return run


def test_a_cell_with_many_edits_at_once(each, run_cell):
    (settings,), output, message = run_cell(edit(source_of(each), *EDITS))
    assert (output, message) == ("", "")
    assert settings.model_dump().items() >= EDITED.items()


def test_a_constant_that_is_refused_in_a_cell(each, folder, run_cell):
    before = contents(folder)
    started, output, message = run_cell(edit(source_of(each), "SEED = None"))
    assert (started, output) == ([], "")
    problem = "SEED is None: give a whole number from 0 to 4294967295"
    assert refusals(2, message) == [problem]
    assert contents(folder) == before


# ---------------------------------------------------------------------- constants and code
def names_read(path):
    """Return what a file reads of its settings, and the other names that it reads."""
    of_settings, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(getattr(node, "ctx", None), ast.Load):
            if isinstance(node, ast.Name):
                others.add(node.id)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("settings"):
                of_settings.add(node.attr)
    return of_settings, others


def test_every_constant_is_read_by_the_code(each):
    """As settings.name, or as the argument of that name which a check has."""
    read, bypassed = names_read(Path(each.__file__))
    for path in ROOT.glob("finetune/*.py"):
        read |= names_read(path)[0]
    for check in each.CHECKS:
        read |= inspect.signature(check).parameters.keys()
    assert [name for name in names_of(each) if name.lower() not in read] == []

    # The names in capitals bypass the flags. But a function that others may call alone has the
    # words of the file as its default, and one that is set as REWARD is called by its object.
    allowed = {"POSITIVE_WORDS", "REWARD"} if each is train_rlhf else set()
    assert {*names_of(each)} & bypassed == allowed
