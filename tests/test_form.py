"""The form of the scripts and of finetune/: airy, in one direction, and nothing twice."""

import ast
import collections
import copy
import difflib
import hashlib
import importlib
import io
import re
import signal
import sys
import tokenize
import tomllib
from pathlib import Path
from statistics import mean

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train_rlhf", "train_sft", "train_reward_model", "make_instructions"]
ORDER = [  # of the files in finetune/: each imports only from those before it
    *("errors", "words", "guests", "processes", "settings", "hub", "checks", "command"),
    *("hub_data", "fields", "files", "messages", "dialogues", "data", "prompts"),
    *("examples", "comparisons", "seed_tasks", "functions", "tokens", "chat", "labels", "figures"),
    *("judged", "logits", "models", "saving", "loading", "scale", "beginnings", "classifiers"),
    *("scorers", "checkpoint", "trackers", "progress", "output", "sampling", "batches", "rates"),
    "supervised",
    *("held_out", "heads", "writer", "self_instruct", "answers"),
    *("run_files", "curves", "pages", "watch", "measurement", "samples", "shown"),
    *("summary", "evaluation"),
]
PATHS = {name: ROOT / f"{name}.py" for name in SCRIPTS}
PATHS |= {f"finetune.{name}": ROOT / "finetune" / f"{name}.py" for name in ORDER}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in PATHS.items()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}

each_file = pytest.mark.parametrize("name", PATHS)
each_script = pytest.mark.parametrize("name", SCRIPTS)


def functions_and_classes(body):
    """Yield those of a file and of its classes; what a function has inside is its own affair."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from functions_and_classes(node.body)


def has_docstring(node):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return isinstance(node, kinds) and ast.get_docstring(node) is not None


# ---------------------------------------------------------------------------- to be read
def density(source):
    """Return mean length of lines, share beyond 90 characters, expressions a line of code.

    Empty lines count nowhere; those of docstrings and comments alone are no code.
    """
    nodes = list(ast.walk(ast.parse(source)))
    docstrings = set()
    for node in filter(has_docstring, nodes):
        docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))

    lengths, code = [], 0
    for number, line in enumerate(source.splitlines(), start=1):
        if line.strip():
            lengths.append(len(line))
            code += number not in docstrings and not line.strip().startswith("#")
    share = sum(length > 90 for length in lengths) / len(lengths)
    places = [node.lineno for node in nodes if isinstance(node, ast.expr)]
    expressions = sum(place not in docstrings for place in places)
    return mean(lengths), share, expressions / code


def test_how_density_is_counted():
    source = '"""Doc."""\n\n# Twelve.\nx = 1\n\n'
    source += 'def f(a):\n    """Say\n\n    it."""\n    return a\n'
    lengths = [10, 9, 5, 9, 10, 10, 12]
    assert density(source) == (mean(lengths), 0, 3 / 3)  # x, 1 and a, in three lines
    assert density("x = 1\n\n" + "#" * 91)[1] == 1 / 2


@each_file
def test_lines_are_airy(name):
    mean_length, share_of_long, expressions = density(SOURCES[name])
    assert mean_length <= 55
    assert share_of_long <= 0.1
    assert expressions <= (5.0 if name == "train_rlhf" else 5.5)


@each_file
def test_functions_and_files_are_short(name):
    for node in functions_and_classes(TREES[name].body):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
    assert name == "train_rlhf" or SOURCES[name].count("\n") < 300


@each_file
def test_nothing_is_assigned_in_the_middle_of_an_expression(name):
    nodes = ast.walk(TREES[name])
    assert [node.lineno for node in nodes if isinstance(node, ast.NamedExpr)] == []


@each_file
def test_every_function_and_class_says_in_a_sentence_what_it_is(name):
    nodes = [*functions_and_classes(TREES[name].body)]
    for node in [TREES[name], *nodes]:
        title = getattr(node, "name", name)
        if title == "__init__":  # the class says it
            continue
        first, _, rest = (ast.get_docstring(node) or "").partition("\n")
        assert re.fullmatch(r"[A-Z].*[^.]\.", first), f"{title}: {first!r}"
        assert not re.search(r"[.!?] [A-Z]", first), f"{title}: {first!r}"
        assert not rest or rest.startswith("\n"), f"{title}: no empty line after the first"


@each_file
def test_every_signature_has_type_hints(name):
    for node in functions_and_classes(TREES[name].body):
        if isinstance(node, ast.FunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            arguments += [node.args.vararg, node.args.kwarg]
            lacking = [arg.arg for arg in arguments if arg and not arg.annotation]
            assert lacking in ([], ["self"]), node.name
            assert node.returns is not None, node.name


@each_file
def test_nothing_is_handed_on_through_attributes(name):
    """What a method needs are its arguments, or what __init__ set; else who could follow?"""
    for node in ast.walk(TREES[name]):
        # pydantic validates a setting as it is set.
        if isinstance(node, ast.Call) and "setattr(settings, name" not in ast.unparse(node):
            assert ast.unparse(node.func) not in ("setattr", "delattr"), node.lineno
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value).split(".")[-1]
            assert owner not in ("trainer", "policy", "learner"), node.lineno


# ------------------------------------------------------------------------- one direction
def imports_of(name):
    """Return the modules of ours that a file imports anywhere, but for type hints alone."""
    found = set()
    for node in TREES[name].body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                found |= {alias.name for alias in inner.names}
            if isinstance(inner, ast.ImportFrom) and inner.module == "finetune":
                found |= {f"finetune.{alias.name}" for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                found.add("." * inner.level + (inner.module or ""))
    ours = ("finetune", ".", *SCRIPTS)
    return {module for module in found if module.startswith(ours)}


def test_all_files_of_the_folder_are_in_that_order():
    files = {path.stem for path in (ROOT / "finetune").glob("*.py")}
    assert sorted(ORDER) == sorted(files - {"__init__"})


@each_file
def test_imports_point_one_way(name):
    modules = [f"finetune.{module}" for module in ORDER]
    allowed = modules if name in SCRIPTS else modules[: modules.index(name)]
    assert imports_of(name) - {*allowed} == set()
    if name in SCRIPTS:
        assert imports_of(name), "it imports nothing from finetune"


WORDS_OF_PPO = {"ppo", "kl", "kls", "gae", "advantage", "advantages", "rollout", "rollouts"}
WORDS_OF_PPO |= {"policy", "policies", "surrogate", "clip", "clipped", "cliprange"}
OF_PPO = {  # what knows of PPO in finetune/, and why
    "finetune.measurement": "it tells the KL of a policy",
    "finetune.summary": "it tells the same in Markdown",
    "finetune.evaluation": "it measures the policy before and after",
    "finetune.samples": "it writes what a step of PPO did with each token",
    "finetune.curves": "it draws the KL of a policy",
    "finetune.pages": "it shows that, and the KL of a policy",
}
NAMED = {"finetune.command": {"ppo"}}  # it names classes of TRL to silence what they say


@pytest.mark.parametrize("name", sorted(PATHS.keys() - OF_PPO.keys() - {*SCRIPTS}))
def test_the_folder_knows_nothing_of_ppo(name):
    tree = copy.deepcopy(TREES[name])
    for node in filter(has_docstring, list(ast.walk(tree))):
        node.body[0] = ast.Pass()
    words = set(re.findall("[a-z]+", ast.unparse(tree).lower().replace("_", " ")))
    assert words & WORDS_OF_PPO == NAMED.get(name, set())


# ------------------------------------------------------------------------- nothing twice
# What files have of their own, and call alike because it does the like.
ROLES = {"Settings", "run", "main", "train", "fit", "HeldOut", "make_trainer", "make_report"}
ROLES |= {"summarize", "announce", "tokenize", "draw"}


class Anonymous(ast.NodeTransformer):
    """A function without what it calls things: names by their order, no docstring."""

    def __init__(self):
        self.names = {}

    def new_name(self, name):
        return self.names.setdefault(name, f"name_{len(self.names)}")

    def visit_Name(self, node):
        return ast.Name(self.new_name(node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.new_name(node.arg))

    def visit_FunctionDef(self, node):
        node.name, node.returns = "function", None
        if has_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


def anonymous(node):
    """Return the words and signs of a function as they would be under any other names."""
    code = ast.unparse(Anonymous().visit(copy.deepcopy(node)))
    return re.findall(r"\w+|[^\w\s]", code)


def alikeness(one, other):
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def test_a_function_under_other_names_is_told_as_the_same():
    one, other, third = (
        anonymous(ast.parse(text).body[0])
        for text in (
            "def mean(values):\n    'Return it.'\n    total = sum(values)\n    return total",
            "def average(xs):\n    s = sum(xs)\n    return s",
            "def last(xs):\n    return xs[-1] if xs and len(xs) > 3 else None",
        )
    )
    assert one == other and alikeness(one, third) < 0.7


def test_no_name_stands_for_two_things():
    places = collections.defaultdict(list)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                places[node.name].append(name)
    twice = {title: names for title, names in places.items() if len(names) > 1}
    assert {title: names for title, names in twice.items() if title not in ROLES} == {}


def test_no_function_stands_twice_nearly_alike():
    """Under the same name they may be less alike; those of a line are too short to tell."""
    functions = []
    for name, tree in TREES.items():
        for node in functions_and_classes(tree.body):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                functions.append((anonymous(node), name, node.name))
    functions = [entry for entry in functions if len(entry[0]) > 20 and entry[2] != "main"]

    for place, (code, name, title) in enumerate(functions):
        matcher = difflib.SequenceMatcher(None, b=code, autojunk=False)
        for other, other_name, other_title in functions[place + 1 :]:
            limit = 0.7 if title == other_title else 0.85
            matcher.set_seq1(other)
            # These two are quick, and never less.
            if matcher.real_quick_ratio() > limit and matcher.quick_ratio() > limit:
                assert matcher.ratio() < limit, f"{name}.{title}, {other_name}.{other_title}"


# -------------------------------------------------------------------------- to be edited
@each_script
def test_the_constants_are_plain_literals_each_with_what_it_does(name):
    """Between them stands nothing else."""
    module, lines = importlib.import_module(name), SOURCES[name].splitlines()
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(SOURCES[name]).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string
    numbers = [n for n, line in enumerate(lines, start=1) if line.startswith("# --- ")]
    border = next(n for n, line in enumerate(lines, start=1) if line.startswith("# -----"))

    found = []
    for node in TREES[name].body:
        if not numbers[0] < node.lineno < border:
            continue
        (target,) = node.targets
        found.append(target.id)
        assert getattr(module, target.id) == ast.literal_eval(node.value)
        assert lines[node.lineno - 1].startswith(f"{target.id} = ")
        comment = comments.get(node.lineno, "")
        assert re.match(r"# \S", comment) and len(comment) > 15, target.id
        assert "fmt:" not in comment and "noqa" not in comment
    assert sorted(found) == sorted(map(str.upper, module.Settings.model_fields))


# ------------------------------------------------------------------------ to be imported
def state():
    """Return what an import must leave alone: signals, hooks and the files here."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, sys.excepthook, sys.displayhook, sorted(Path().rglob("*"))


def test_importing_the_scripts_has_no_side_effects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["a_program.py", "--batch-size", "ten"])
    for name in [*sys.modules]:
        if name in SCRIPTS or name.partition(".")[0] == "finetune":
            monkeypatch.delitem(sys.modules, name)
    before = state()
    for name in SCRIPTS:
        module = importlib.import_module(name)
        assert Path(module.__file__) == PATHS[name]
    assert state() == before
    assert capsys.readouterr() == ("", "")


# --------------------------------------------------------------- what stands beside them
# PEP 723: a block begins and ends with a line of its own, and all between are comments.
BLOCK = r"^# /// script\n((?:#|# .*)\n)+?# ///$"
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # SHA-256


@pytest.fixture(scope="module")
def metadata():
    """Return what the script says of its requirements to uv and others."""
    source = SOURCES["train_rlhf"]
    (block,) = re.finditer(BLOCK, source, flags=re.M)
    assert source.count("# /// ") == 1  # a second block would be an error, or another one's
    lines = [line.removeprefix("#") for line in block[0].splitlines()[1:-1]]
    return tomllib.loads("\n".join(lines))


def test_the_script_requires_what_requirements_txt_does(metadata):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.partition("#")[0].strip() for line in lines]
    wanted = [Requirement(text) for text in texts if text]
    given = [Requirement(text) for text in metadata["dependencies"]]
    assert set(given) == set(wanted)
    assert len(given) == len(wanted) > 10


def test_the_script_requires_the_pythons_that_it_was_tried_with(metadata):
    """Those of the README, each with a whole run of these tests, and no other."""
    versions = SpecifierSet(metadata["requires-python"])
    assert "{}.{}.{}".format(*sys.version_info) in versions

    readme, troubleshooting, runs = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "docs/troubleshooting.md", "benchmarks/pythons.md")
    )
    (told,) = re.findall(r"You need Python 3\.(\d+) to 3\.(\d+)", readme)
    assert re.findall(r"You need Python 3\.(\d+) to 3\.(\d+)", troubleshooting) == [told]

    first, last = map(int, told)
    for minor in range(first, last + 1):
        assert f"3.{minor}.0" in versions and f"3.{minor}.99" in versions
        assert re.search(rf"^\| 3\.{minor}\.\d+ \| \d+ \| \d+ \| \d+ \|", runs, flags=re.M)
    assert f"3.{first - 1}.99" not in versions
    assert f"3.{last + 1}.0" not in versions


def test_the_licence_is_the_whole_apache_licence():
    first, _, text = (ROOT / "LICENSE").read_text(encoding="utf-8").partition("\n")
    assert first == "Copyright 2026 the train_rlhf.py authors"
    lines = text.strip().splitlines()
    assert [line.strip() for line in lines[:2]] == ["Apache License", "Version 2.0, January 2004"]
    assert lines[-1].strip() == "limitations under the License."
    assert hashlib.sha256(text.encode()).hexdigest() == APACHE
