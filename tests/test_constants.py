"""Constants are plain Python that anybody edits: an edit works, or ends in one line that helps."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_rlhf

NAMES = [name for _, _, _, names in train_rlhf.RULES for name in names.split()]


def assigned_constants(source):
    """Return {name: node} of the names in capitals that are assigned at the top level."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.isupper():
                assert target.id not in found
                found[target.id] = node
    return found


def edit(source, name, text):
    """Return the source with other lines where a constant is."""
    node = assigned_constants(source)[name]
    lines = source.split("\n")
    lines[node.lineno - 1 : node.end_lineno] = text.split("\n") if text else []
    return "\n".join(lines)


@pytest.fixture
def source(script):
    return script.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Go to a folder with an earlier run, without a GPU; return it."""
    (tmp_path / "trained_model").mkdir()
    (tmp_path / "trained_model" / "report.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def assert_untouched(folder):
    """Nothing was moved, and there is nothing new but the script."""
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert paths - {"edited.py"} == {"trained_model", "trained_model/report.json"}
    assert (folder / "trained_model" / "report.json").read_text() == "{}"


@pytest.fixture
def call_edited(folder, capsys):
    """Call main of a copy of the script; return its status, the settings it would run, stderr."""

    def call(source, *flags):
        path = folder / "edited.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", path)
        edited = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(edited)
        started = []
        edited.run = started.append
        status = edited.main(list(flags))
        output, message = capsys.readouterr()
        assert output == ""
        assert_untouched(folder)
        return status, started, message

    return call


# ----------------------------------------------------------------------------- the edits that work
ABOVE = "# Price of one nat of KL.\n#\n\nKL_COEF = 0.2"
MY_REWARD = 'REWARD = Path("my.py").name + ":score"'


@pytest.mark.parametrize(
    ("text", "flags", "value"),
    [
        pytest.param("KL_COEF = 0.2", [], 0.2, id="comment dropped"),
        pytest.param(ABOVE, [], 0.2, id="comment above"),
        pytest.param("KL_COEF = 0.2  # KL_COEF = 7, 100 % {x} \\", [], 0.2, id="other comment"),
        pytest.param("KL_COEF = 0.2 # price", [], 0.2, id="one space"),
        pytest.param("KL_COEF=0.2# price", [], 0.2, id="no space"),
        pytest.param("KL_COEF: float = 0.2", [], 0.2, id="annotation"),
        pytest.param("KL_COEF = 1", [], 1.0, id="whole number"),
        pytest.param("KL_COEF = 1", ["--kl-coef", "0.5"], 0.5, id="whole number, fraction as flag"),
        pytest.param("BATCH_SIZE = 12.0", [], 12, id="fraction that is whole"),
        pytest.param('BATCH_SIZE = "12"', [], 12, id="whole number in quotes"),
        pytest.param('LEARNING_RATE = "1e-4"', [], 1e-4, id="number in quotes"),
        pytest.param("SEED = 2 * 3", [], 6, id="calculation"),
        pytest.param('RESUME = "False"', [], False, id="switch in quotes"),
        pytest.param('OUTPUT_DIR = Path("x") / "y"', [], "x/y", id="path"),
        pytest.param('MODEL_NAME = Path("..")', [], "..", id="model as path"),
        pytest.param('POSITIVE_WORDS = "happy"', [], ["happy"], id="one word"),
        pytest.param('POSITIVE_WORDS = ("happy", "glad")', [], ["happy", "glad"], id="tuple"),
        pytest.param('PROMPTS = "Good day"', [], ["Good day"], id="one prompt"),
        pytest.param('PROMPTS = "Good day",', [], ["Good day"], id="tuple of one prompt"),
        pytest.param('EVAL_PROMPTS = "..."', [], ["..."], id="one prompt held out"),
        pytest.param("EVAL_PROMPTS = []", [], [], id="nothing held out"),
        pytest.param("EVAL_PROMPTS = ()", [], [], id="nothing held out, in a tuple"),
        pytest.param("TRAINING_EPOCHS = 0.1", [], 0.1, id="a tenth of an epoch"),
        pytest.param("SUCCESS_THRESHOLD = 5", [], 5.0, id="number where auto was"),
        pytest.param("SUCCESS_THRESHOLD = 5", ["--success-threshold", "auto"], "auto", id="auto"),
        pytest.param('LORA_TARGETS = "q_proj"', [], ["q_proj"], id="one layer"),
        pytest.param(MY_REWARD, [], "my.py:score", id="calculated text"),
    ],
)
def test_an_edit_that_works(source, call_edited, text, flags, value):
    name = re.search("^[A-Z_]+", text, flags=re.M)[0]
    status, (settings,), message = call_edited(edit(source, name, text), *flags)
    assert (status, message) == (0, "")
    found = getattr(settings, name.lower())
    assert (found, type(found)) == (value, type(value))


# ------------------------------------------------------------------------ the edits that are refused
OR_AUTO = "give a number, or auto, from -1000000000000000 to 1000000000000000"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("KL_COEF", "KL_COEF = None", "None: give a number from 0 to 1e+30"),
        ("MAX_GRAD_NORM", "MAX_GRAD_NORM = None", "None: give a number from 0 to 1e+30"),
        ("KL_COEF", "KL_COEF = 0,1", "(0, 1): give a number from 0 to 1e+30"),
        ("KL_COEF", "KL_COEF = True", "True: give a number from 0 to 1e+30"),
        ("KL_COEF", 'KL_COEF = float("nan")', "nan: give a number from 0 to 1e+30"),
        ("BATCH_SIZE", "BATCH_SIZE = 12.5", "12.5: give a whole number from 1 to 1000000"),
        ("BATCH_SIZE", 'BATCH_SIZE = "ten"', "ten: give a whole number from 1 to 1000000"),
        ("RESUME", "RESUME = 0", "0: give True or False"),
        ("CHAT_TEMPLATE", "CHAT_TEMPLATE = None", "None: give True or False"),
        ("SUCCESS_THRESHOLD", "SUCCESS_THRESHOLD = None", f"None: {OR_AUTO}"),
        ("SUCCESS_THRESHOLD", "SUCCESS_THRESHOLD = True", f"True: {OR_AUTO}"),
        ("DEVICE", "DEVICE = None", "None: give auto, cpu, cuda or mps"),
        ("OUTPUT_DIR", "OUTPUT_DIR = 5", "5: give a text"),
        ("MODEL_NAME", 'MODEL_NAME = ""', "empty: give a text"),
        ("PROMPTS", 'PROMPTS = ["I", 5]', "['I', 5]: give a list of texts, none empty"),
        # What has a name is no text for that.
        ("PROMPTS", 'PROMPTS = (text for text in ["I"])', "<generator object: give a list of texts, none empty"),
        ("POSITIVE_WORDS", "POSITIVE_WORDS = str", "<class 'str'>: give a list of texts, none empty"),
        ("OUTPUT_DIR", "OUTPUT_DIR = json", "<module 'json': give a text"),
        ("POSITIVE_WORDS", "POSITIVE_WORDS = []", "[]: give a list of texts, none empty"),
        ("POSITIVE_WORDS", "POSITIVE_WORDS = {}", "{}: give a list of texts, none empty"),
        # A constant that was deleted.
        ("SEED", "", "None: give a whole number from 0 to 4294967295"),
        ("PROMPTS", "", "None: give a list of texts, none empty"),
    ],
)  # fmt: skip
def test_an_edit_that_is_refused(source, call_edited, name, text, problem):
    status, started, message = call_edited(edit(source, name, text))
    assert (status, started) == (2, [])
    problem, _, remedy = problem.partition(": ")
    assert message.startswith(f"Nothing was started or changed:\n- {name} is {problem}")
    assert message.endswith(f": {remedy}\n") and message.count("\n") == 2


def test_several_edits_that_are_refused_are_told_at_once(source, call_edited):
    for text in ("GAMMA = 2", "KL_COEF = None", 'DTYPE = "int8"'):
        source = edit(source, text.split()[0], text)
    status, started, message = call_edited(source, "--gamma", "1")  # the flag mends the first one
    assert (status, started) == (2, [])
    first, *problems = message.splitlines()
    assert first == "Nothing was started or changed:"
    assert sorted(problems) == [
        "- DTYPE is int8: give auto, float32, bfloat16 or float16",
        "- KL_COEF is None: give a number from 0 to 1e+30",
    ]


# ------------------------------------------------------------------------------ quotes that are missing
def test_a_script_with_a_constant_that_lacks_its_quotes(source, folder):
    """A fresh process, since this goes through sys.excepthook; its path is a relative one."""
    (folder / "edited.py").write_text(edit(source, "DEVICE", "DEVICE = cpu  # or cuda"))
    done = subprocess.run([sys.executable, "edited.py"], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'DEVICE = cpu: give "cpu", in quotes\n'
    assert_untouched(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "REWARD = positive_word_reward",  # it is there, but only further below
            'REWARD = positive_word_reward: give "positive_word_reward", in quotes',
        ),
        ("LORA_TARGETS = [q_proj]", 'LORA_TARGETS = [q_proj]: give "q_proj", in quotes'),
        ("RESUME = true", 'RESUME = true: give "true", in quotes'),
    ],
)
def test_what_else_may_lack_its_quotes(source, folder, monkeypatch, capsys, text, message):
    path = folder / "edited.py"
    path.write_text(edit(source, text.split()[0], text))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    program = compile(path.read_text(), path, "exec")
    with pytest.raises(NameError) as error:
        exec(program, {"__name__": "__main__", "__file__": str(path)})
    with pytest.raises(SystemExit) as exit:
        sys.excepthook(error.type, error.value, error.tb.tb_next)  # without the frame of this test
    assert exit.value.code == 2
    assert capsys.readouterr() == ("", f"{message}\n")
    assert_untouched(folder)


def test_other_errors_than_missing_quotes_keep_their_traceback(source, folder, monkeypatch, capsys):
    path = folder / "edited.py"
    path.write_text(edit(source, "SEED", "SEED = 1 / 0"))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    program = compile(path.read_text(), path, "exec")
    with pytest.raises(ZeroDivisionError) as error:
        exec(program, {"__name__": "__main__", "__file__": str(path)})
    sys.excepthook(error.type, error.value, error.tb)
    assert capsys.readouterr().err.endswith("ZeroDivisionError: division by zero\n")

    with pytest.raises(NameError) as error:
        exec("def wrong():\n    no_such_name\nwrong()", {})  # not in a line of the script
    sys.excepthook(error.type, error.value, error.tb)
    assert "Traceback" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the imported module
def test_constants_that_are_set_on_the_imported_module(folder, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(train_rlhf, "run", started.append)
    monkeypatch.setattr(sys, "argv", ["my_program.py", "--nonsense"])  # flags of something else
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
    assert train_rlhf.main() == 2
    problems = capsys.readouterr().err
    assert "- KL_COEF is None: give a number from 0 to 1e+30\n" in problems
    assert "- SEED is None: give a whole number from 0 to 4294967295\n" in problems
    assert len(started) == 2
    assert_untouched(folder)


@pytest.mark.parametrize("good", [True, False], ids=["works", "refused"])
def test_a_function_of_ones_own_set_on_the_imported_module(
    folder, monkeypatch, capsys, demo_model, good
):
    """As in a notebook: it is called by its object, and refused before anything is moved."""

    def politeness(prompts, completions, **kwargs):
        return [float(len(text)) for text in completions] if good else None

    def stop(settings):
        rows = [{"prompt": "I feel so"}, {"prompt": "Life is"}]
        reward, scale = train_rlhf.load_reward(settings, rows, torch.device("cpu"))
        found.append((reward(rows, ["a", "bcd"]), scale, settings.reward))

    found = []
    monkeypatch.setattr(train_rlhf, "REWARD", politeness)
    monkeypatch.setattr(train_rlhf, "run", stop)
    status = train_rlhf.main(["--model-name", str(demo_model)])
    output, message = capsys.readouterr()
    assert output == ""
    if good:
        assert (status, message) == (0, "")
        assert found == [([1.0, 3.0], None, "politeness")]
    else:
        first, line = message.splitlines()
        assert (status, first, found) == (2, "Nothing was started or changed:", [])
        assert line.startswith("- REWARD is politeness: TypeError(")
        remedy = "let f(prompts, completions, **kwargs) return a finite number for each completion"
        assert line.endswith(f": {remedy}")
    assert_untouched(folder)


# --------------------------------------------------------------------------------- a notebook's cell
@pytest.fixture
def run_cell(folder, monkeypatch):
    """Run a source as a cell of a notebook does; return what it prints."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    def run(source):
        hook, before = sys.excepthook, signal.signal(signal.SIGINT, interrupt)
        monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel-1.json"])
        output, message = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(message):
                exec(compile(source, "<cell>", "exec"), {"__name__": "__main__"})
            assert signal.getsignal(signal.SIGINT) is interrupt
            assert sys.excepthook is hook
        finally:
            signal.signal(signal.SIGINT, before)
        return output.getvalue(), message.getvalue()

    return run


def test_a_whole_run_in_a_cell_with_many_edits_at_once(source, folder, run_cell, demo_model):
    edits = (
        f"MODEL_NAME = Path({str(demo_model)!r})",
        'OUTPUT_DIR = Path("mine")',
        'DEVICE = "cpu"',
        'LORA_TARGETS = "q_proj"',
        'PROMPTS = ("I feel so", "Life is")',
        'EVAL_PROMPTS = "My day was"',
        'POSITIVE_WORDS = "happy"',
        'BATCH_SIZE = "4"',
        "MAX_NEW_TOKENS = 4.0",
        "TRAINING_EPOCHS = 2 # enough",
        "PPO_EPOCHS: int = 1",
        "TARGET_APPROX_KL = 0",
        "EVAL_SAMPLES = 4",
    )
    for text in edits:
        source = edit(source, re.match("[A-Z_]+", text)[0], text)
    output, message = run_cell(source)
    assert "step 1/1, " in output
    assert message == ""
    report = json.loads((folder / "mine" / "report.json").read_text())
    assert report["settings"]["model_name"] == str(demo_model)
    assert report["settings"]["output_dir"] == "mine"
    assert report["settings"]["positive_words"] == ["happy"]
    assert report["settings"]["batch_size"] == 4
    assert list(report["trained"]["train_prompts"]["first_sample"]) == ["I feel so", "Life is"]
    assert list(report["trained"]["eval_prompts"]["first_sample"]) == ["My day was"]


def test_a_constant_that_is_refused_in_a_cell(source, folder, run_cell):
    problem = "KL_COEF is None: give a number from 0 to 1e+30"
    told = f"Nothing was started or changed:\n- {problem}\n"
    assert run_cell(edit(source, "KL_COEF", "KL_COEF = None")) == ("", told)
    assert_untouched(folder)


# ------------------------------------------------------------------------- constants, rules and code
def test_every_constant_has_one_rule_and_every_rule_a_constant(source):
    """Names in capitals that stand further below, as RULES, are tables of the code."""
    (run,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "run")
    nodes = assigned_constants(source)
    constants = [name for name, node in nodes.items() if node.lineno < run.lineno]
    assert sorted(NAMES) == sorted(constants)


def test_every_constant_stands_before_the_code_with_a_comment(source):
    nodes = assigned_constants(source)
    lines = source.split("\n")
    (run,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "run")
    for name in NAMES:
        assert nodes[name].end_lineno < run.lineno
        assert len(lines[nodes[name].lineno - 1].partition("  # ")[2]) > 10, name


def read_by_name(function):
    """Return the texts in the comprehensions that get each of them out of the settings."""
    tuples = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.DictComp) and ast.unparse(node.value) == "getattr(settings, name)":
            names = [*ast.walk(node.generators[0].iter)]
            names += [
                each
                for name in names
                if isinstance(name, ast.Name) and name.id in tuples
                for each in ast.walk(tuples[name.id])
            ]
            found |= {each.value for each in names if isinstance(each, ast.Constant)}
    return found


def test_every_constant_is_read_by_the_code(source):
    """As settings.name, or by name; the names in capitals would bypass the flags.

    By name means a comprehension over names that a function lists, as {name: getattr(settings,
    name) for name in ("gamma", "lam")}.
    """
    read, bypassed = set(), set()
    for node in ast.walk(ast.parse(source)):
        loaded = isinstance(getattr(node, "ctx", None), ast.Load)
        if loaded and ast.unparse(node).startswith("settings."):
            read.add(getattr(node, "attr", None))
        if loaded and isinstance(node, ast.Name):
            bypassed.add(node.id)
        if isinstance(node, ast.FunctionDef):
            read |= read_by_name(node)
    assert [name for name in NAMES if name.lower() not in read] == []
    # A function that others may call alone has the words of the file as its default.
    assert set(NAMES) & bypassed == {"POSITIVE_WORDS"}


def test_the_defaults_follow_their_own_rules(folder, read_settings):
    settings = vars(read_settings())
    assert settings == {name.lower(): getattr(train_rlhf, name) for name in NAMES}
    for name in NAMES:
        kinds = {type(settings[name.lower()]), type(getattr(train_rlhf, name))}
        assert len(kinds) == 1 or kinds == {int, float}, name  # 150 is a number too
