"""The notebook, executed as a reader does; and the script in a notebook of one's own."""

import ast
import html
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from helpers import refusals

import train_rlhf
from finetune.settings import flag_of

pytest.importorskip("ipykernel", reason="pip install ipykernel nbclient")
nbclient = pytest.importorskip("nbclient", reason="pip install ipykernel nbclient")
nbformat = pytest.importorskip("nbformat", reason="pip install ipykernel nbclient")

from jupyter_client.manager import KernelManager

NOTEBOOK = ROOT / "examples" / "rlhf_in_a_minute.ipynb"
NEEDED = ("train_rlhf.py", "requirements.txt", "demo_model", "examples", "finetune")
FASTER = {"EPOCHS = 150": "EPOCHS = 50", "SAMPLES = 240": "SAMPLES = 60"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def code(notebook):
    """Return {id: source} of the cells with code."""
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a folder with what the notebook needs of a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


class Kernel:
    """A kernel of Jupyter's in a process of its own, and what its cells show."""

    def __init__(self, folder):
        self.folder = folder
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), stderr=subprocess.DEVNULL)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, source, interrupt_after=None):
        """Run a cell; return its stdout, stderr and error, (name, traceback) or None."""
        texts, error = {"stdout": "", "stderr": ""}, None
        self.kinds = []  # of the messages, in order
        request = self.client.execute(source)
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != request:
                continue
            self.kinds.append(kind)
            if kind == "stream":
                texts[content["name"]] += content["text"]
            if kind == "error":
                error = content["ename"], "\n".join(content["traceback"])
            if kind == "status" and content["execution_state"] == "idle":
                return texts["stdout"], texts["stderr"], error
            if interrupt_after and interrupt_after in texts["stdout"]:
                self.manager.interrupt_kernel()
                interrupt_after = None

    def close(self):
        """End the process."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(clone):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        kernel = Kernel(clone / "examples")
    yield kernel
    kernel.close()


@pytest.fixture(scope="module")
def executed(notebook, kernel):
    """Return the cells, {id: cell}, as they are after a run of all of them, with fewer steps."""
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    set_up = next(cell for cell in copy.cells if cell.id == "set-up")
    for constant, smaller in FASTER.items():
        assert set_up.source.count(constant) == 1
        set_up.source = set_up.source.replace(constant, smaller)
    nbclient.NotebookClient(copy, km=kernel.manager, timeout=120).execute()
    return {cell.id: cell for cell in copy.cells if cell.cell_type == "code"}


def printed(cell, name="stdout"):
    """Return what a cell prints."""
    found = [output.text for output in cell.outputs if output.output_type == "stream"]
    assert all(output.get("name", name) == name for output in cell.outputs), cell.outputs
    return "".join(found)


def tables(cell):
    """Return the tables that a cell shows, each a list of rows, the titles first."""
    found = []
    for output in cell.outputs:
        shown = output.get("data", {}).get("text/html", "")
        rows = re.findall("<tr>(.*?)</tr>", shown, re.DOTALL)
        if rows:
            cells = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
            found.append([[html.unescape(text) for text in row] for row in cells])
    return found


def pictures(cell):
    """Return the pictures that a cell shows, as base64 texts."""
    found = [output.data.get("image/png") for output in cell.outputs if "data" in output]
    return [picture for picture in found if picture]


def column(table, title):
    """Return what stands in a column of a table."""
    place = table[0].index(title)
    return [row[place] for row in table[1:]]


# --------------------------------------------------------------------------------- as it is in git
def test_the_notebook_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert "widgets" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


def test_cells_are_few_and_short(notebook, code):
    assert 9 <= len(code) <= 14
    assert all(len(source.splitlines()) <= 40 for source in code.values())
    lines = "\n".join(cell.source for cell in notebook.cells).splitlines()
    assert max(map(len, lines)) <= 110


WANTED = """
    train_rlhf.load_reward loading.load_model train_rlhf.make_policy train_rlhf.make_trainer
    sampling.sample_responses train_rlhf.train
    train_rlhf.sample_and_score trainer.make_batch trainer.policy_pass
    train_rlhf.compute_advantages
    evaluation.measure measurement.make_report train_rlhf.main
"""


def test_the_work_is_done_by_functions_of_the_script_and_by_no_copies_of_them(code):
    everything = "\n".join(code.values())
    assert [name for name in WANTED.split() if f" {name}(" not in everything] == []
    ours = [module for name, module in sys.modules.items() if name.startswith("finetune.")]
    for source in code.values():
        source = re.sub("^ *%.*", "    pass", source, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert not any(hasattr(module, node.name) for module in [train_rlhf, *ours])
                assert len(node.body) <= 9, node.name


def test_what_the_texts_name_is_there(notebook, code):
    names = list(train_rlhf.Settings.model_fields)
    constants = {name.upper() for name in names}
    flags = {flag_of(name) for name in names} | {"--no-score-prefixes"}
    files = [ROOT / "train_rlhf.py", *(ROOT / "finetune").glob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    everything = "".join([*code.values(), *sources])
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    for name in re.findall(r"`([^`\n]+)`", "\n".join(texts)):
        if re.fullmatch("[A-Z_]{3,}", name):
            assert name in constants, name
        for flag in re.findall(r"--[\w-]+", name):
            assert flag in flags, name
        if "/" in name or name.endswith((".md", ".txt", ".py")):
            assert (ROOT / name).exists(), name
        elif re.fullmatch(r"\w+(\.\w+)?", name):
            assert name.split(".")[-1] in everything, name


# -------------------------------------------------------------------------------- from end to end
def test_every_cell_is_executed_without_noise(executed):
    numbers = [cell.execution_count for cell in executed.values()]
    assert numbers == [*range(1, len(numbers) + 1)]
    for name, cell in executed.items():
        lines = printed(cell).splitlines()  # and nothing on stderr
        assert len(lines) < 60, name
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data", "execute_result"), name
            assert not re.search("warn", output.get("text", ""), re.IGNORECASE), name


def test_the_base_model_is_shown_with_what_the_rule_says_of_it(executed):
    (table,) = tables(executed["before"])
    assert table[0] == ["prompt", "response", "score"]
    assert column(table, "prompt") == train_rlhf.PROMPTS
    for _, response, score in table[1:]:
        words = set(re.findall(r"\w+", response.lower()))
        assert float(score) == (1 if words & set(train_rlhf.POSITIVE_WORDS) else -1)


def test_the_curve_is_drawn_in_one_place_while_it_trains(executed):
    assert len(pictures(executed["train"])) == 1
    assert executed["train"].outputs[0].output_type == "display_data"
    assert "step 30/30" in printed(executed["train"])


def test_a_response_is_taken_apart_as_ppo_does(executed):
    """The columns of the table follow from each other, by the formulas of PPO."""
    (table,) = tables(executed["inside"])
    said = printed(executed["inside"]).removesuffix("\n")
    assert said.endswith("".join(text for text in column(table, "token") if text != "</s>"))
    numbers = [[float(text.rstrip("%")) for text in row[1:]] for row in table[1:]]
    names = table[0][1:]
    columns = {name: [row[place] for row in numbers] for place, name in enumerate(names)}
    assert all(0 <= each <= 100 for name in ("base", "policy") for each in columns[name])
    assert max(columns["KL"]) > 0.3  # it has moved away
    advantage, following = 0.0, 0.0
    for index in reversed(range(len(numbers))):
        reward = columns["earns"][index] - train_rlhf.KL_COEF * columns["KL"][index]
        assert columns["reward"][index] == pytest.approx(reward, abs=0.011)
        delta = reward + train_rlhf.GAMMA * following - columns["value"][index]
        advantage = delta + train_rlhf.GAMMA * train_rlhf.LAM * advantage
        following = columns["value"][index]
        # What it is computed of is shown with two digits.
        assert columns["advantage"][index] == pytest.approx(advantage, abs=0.1)


def test_it_learned_and_every_prompt_is_compared(executed):
    (table,) = tables(executed["after"])
    assert column(table, "prompt") == train_rlhf.PROMPTS + train_rlhf.EVAL_PROMPTS
    assert column(table, "prompts") == ["trained on"] * 6 + ["held out"] * 6
    assert all(len(text) > 3 for name in ("before", "after") for text in column(table, name))
    (table,) = tables(executed["figures"])
    assert column(table, "prompts") == ["trained on", "held out"]
    for before, after, kl, least in (row[1:] for row in table[1:]):
        first, last = (float(text.removesuffix("%")) / 100 for text in (before, after))
        error = (first * (1 - first) / 60 + last * (1 - last) / 60) ** 0.5
        assert last - first > 4 * error
        assert float(kl) >= float(least) > 0
    assert len(pictures(executed["figures"])) == 1


@pytest.mark.parametrize("name", ["words", "reward"])
def test_a_whole_new_run_learns_what_it_is_told(executed, clone, name):
    folder = {"words": "trained_model_calm", "reward": "trained_model_short"}[name]
    report = json.loads((clone / folder / "report.json").read_text())
    wanted = {"words": "positive_word_reward", "reward": "short_sentences"}[name]
    assert report["settings"]["reward"] == wanted
    assert f"Reward    {wanted}\n" in printed(executed[name])
    before, after = (report[model]["train_prompts"] for model in ("base", "trained"))
    assert after["score"] > before["score"]
    lines = (clone / folder / "samples.jsonl").read_text().splitlines()
    for line in map(json.loads, lines[:50]):
        response = line["response"]
        calm = re.search(r"\b(calm|serene|peaceful)\b", response)
        ends = response.count(".") + response.count("!")
        assert line["score"] == {"words": 1 if calm else -1, "reward": ends}[name]


def test_only_ignored_folders_are_written(executed, clone):
    new = {path.name for path in clone.iterdir()} - {*NEEDED, "__pycache__"}
    assert new == {"trained_model_notebook", "trained_model_calm", "trained_model_short"}
    assert "/trained_model*/" in (ROOT / ".gitignore").read_text().splitlines()
    for name in ("examples", "demo_model"):
        there = {path.name for path in (ROOT / name).iterdir()} - {"__pycache__"}
        assert {path.name for path in (clone / name).iterdir()} == there


def test_outside_of_a_clone_it_says_what_to_do(executed, kernel, code, tmp_path):
    try:
        out, _, error = kernel.run(f"os.chdir({str(tmp_path)!r})\n{code['set-up']}")
    finally:
        kernel.run(f"os.chdir({str(kernel.folder)!r})")
    assert out == ""
    name, trace = error
    assert name == "SystemExit"
    assert "pip install -r requirements.txt" in trace
    assert "Traceback" not in trace


def test_a_clone_is_found_from_its_root_and_from_the_folder_above(executed, kernel, code, clone):
    """On Colab a clone lies in the folder that the notebook works in."""
    for folder in (clone, clone / "examples", clone.parent):
        source = f"os.chdir({str(folder)!r})\n{code['set-up']}\nprint(os.getcwd())"
        assert kernel.run(source) == (f"{clone.resolve()}\n", "", None)


# ----------------------------------------------------------------------- the script in a notebook
HANDLERS = "[signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]"
QUICK = "--model-name demo_model --device cpu --training-epochs 2 --batch-size 6"
QUICK += " --max-new-tokens 4 --eval-samples 6 --output-dir trained_model_own --eval-prompts"


def test_main_takes_no_flags_from_the_kernel_and_gives_signals_back(executed, kernel):
    source = f"""
        import signal, sys
        print("-f" in sys.argv, sys.argv[-1].endswith(".json"))
        before = {HANDLERS}
        status = train_rlhf.main({QUICK.split()})
        print(status, {HANDLERS} == before, sys.excepthook == hook)
        train_rlhf.MODEL_NAME = "no/such"
        status = train_rlhf.main()
        print(status, {HANDLERS} == before)
    """
    out, err, error = kernel.run("hook = sys.excepthook\n" + inspect.cleandoc(source))
    assert error is None
    first, *_, last = out.splitlines()
    assert first == "True True"
    assert "\n0 True True\n" in out
    assert last == "2 True"
    assert "is no flag" not in err
    (problem,) = refusals(2, err)
    assert problem.startswith("MODEL_NAME is no/such: t")


def test_the_script_pasted_into_a_cell_does_a_run(executed, kernel, clone, script):
    source = script.read_text(encoding="utf-8")
    edits = "MODEL_NAME='demo_model' OUTPUT_DIR='trained_model_pasted' DEVICE='cpu' BATCH_SIZE=6"
    edits += " TRAINING_EPOCHS=2 MAX_NEW_TOKENS=4 EVAL_SAMPLES=12"
    for edit in edits.split():
        name, _, value = edit.partition("=")
        source, count = re.subn(f"^{name} = .*", f"{name} = {value}", source, flags=re.M)
        assert count == 1
    out, err, error = kernel.run(source)
    assert (err, error) == ("", None)
    assert "step 2/2, " in out
    assert (clone / "trained_model_pasted" / "report.json").exists()


def test_the_cell_that_trains_draws_as_it_goes_and_can_be_interrupted(executed, kernel, code):
    """The figure is replaced every few steps; the cells below go on with what was learned."""
    before = "settings.training_epochs, settings.log_every, settings.save_every = 10**4, 2, 3"
    _, err, error = kernel.run(f"{before}\n{code['train']}", interrupt_after="step 6/")
    assert (error, err) == (None, "\nStopping after this step; once more to stop at once\n")
    drawn = kernel.kinds.count("update_display_data")
    assert kernel.kinds.count("display_data") == 1
    out, err, error = kernel.run("print(len(metrics), len(panels[0].lines[0].get_xdata()))")
    steps, shown = map(int, out.split())
    assert (err, error) == ("", None)
    assert 6 <= steps == shown < 100  # the last picture has them all
    assert drawn == steps // 3 + (steps % 3 > 0)
