"""Datasets of the Hub: one that is there, one in the cache, and one that can't be reached."""

import gzip
import hashlib
import io
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import datasets
import huggingface_hub
import pandas
import pytest
from helpers import refusals

import make_instructions
import train_reward_model
import train_sft
from finetune import hub_data
from finetune.data import read_data
from finetune.errors import SettingsError
from finetune.examples import EXAMPLES
from finetune.files import hash_files, read_table
from finetune.prompts import read_prompts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = "hf://datasets/some/data/more/rows.json"
TRAIN = [{"prompt": f"Say {word}", "completion": word} for word in ("ja", "007", "a, b")]
TEST = [{"prompt": "Count", "completion": "1, 2"}]
OTHERS = [{"prompt": f"Other {number}", "completion": "yes"} for number in range(2)]
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.parquet
  - split: test
    path: data/test.parquet
---
# Some data
"""
BY_NAME = ["some/data", "some/data:test"]
REMEDY = "check name and connection, or run: hf auth login"


# ----------------------------------------------------------------------------- a Hub that is there
class Hub(BaseHTTPRequestHandler):
    """What one dataset needs of the Hub; the server holds its files and what was asked for."""

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        self.server.asked.append(path)
        revision = rf"(main|{COMMIT})"
        name = re.sub(rf"^/datasets/some/data/resolve/{revision}/", "", path)
        if re.fullmatch(rf"/api/datasets/some/data(/revision/{revision})?", path):
            siblings = [{"rfilename": file} for file in self.server.files]
            data = {"id": "some/data", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(data).encode())
        elif tree := re.fullmatch(rf"/api/datasets/some/data/tree/{revision}/?(.*)", path):
            self.answer(200, json.dumps(self.entries(tree[2])).encode())
        elif name in self.server.files:
            content = self.server.files[name]
            headers = {"ETag": f'"{checksum(content)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, content, headers)
        elif path == "/api/datasets/some/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/datasets/some/data/"):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        """Answer what is known of some paths."""
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = [unquote(part.partition("=")[2]) for part in asked.split("&")]
        entries = [entry for entry in self.entries("") if entry["path"] in paths]
        self.answer(200, json.dumps(entries).encode())

    def entries(self, folder):
        """Return what the Hub tells of all files below a folder, and of their folders."""
        found = {}
        for path, content in self.server.files.items():
            if path.startswith(folder):
                oid = checksum(content)
                found[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
                above = path.rpartition("/")[0]
                if above:
                    found[above] = {"type": "directory", "path": above, "oid": oid}
        return [*found.values()]

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def checksum(data):
    return hashlib.sha1(data).hexdigest()


def parquet_of(rows):
    file = io.BytesIO()
    pandas.DataFrame(rows).to_parquet(file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Let the caches be folders of this test, and nothing be known of tests before it."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", place / "downloads")
    forget()
    yield place
    forget()


def forget():
    """Let all be asked again, as a run anew does."""
    hub_data.fetch_rows.cache_clear()
    hub_data.fetch_file.cache_clear()
    huggingface_hub.HfFileSystem.clear_instance_cache()


@pytest.fixture
def hub_at(monkeypatch):
    """Let the Hub have another address."""

    def move(address):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)

    return move


@pytest.fixture
def hub(hub_at):
    """Return a server that has some/data, of two splits, and a file beside them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {
        "README.md": CARD.encode(),
        "data/train.parquet": parquet_of(TRAIN),
        "data/test.parquet": parquet_of(TEST),
        "more/rows.json": json.dumps(OTHERS).encode(),
        "more/rows.jsonl.gz": gzip.compress("\n".join(map(json.dumps, OTHERS)).encode()),
        "more/notes.md": b"no rows",
    }
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub_at(f"http://127.0.0.1:{server.server_port}")
    yield server
    stop(server)


@pytest.fixture
def waits(monkeypatch):
    """Return for how long a library wanted to wait before it tried again; here it does not."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def stop(hub):
    """Let nobody be there any more who answers."""
    hub.shutdown()
    hub.server_close()
    forget()


def fetched(hub):
    """Return the names of the files whose content was asked for, each once."""
    return {path.split("/", 6)[6] for path in hub.asked if "/resolve/" in path} & {*hub.files}


def examples_of(data):
    """Return what is asked and answered in the examples of DATA."""
    found = read_data(data, 0.1, 0, EXAMPLES)
    turns = [row["turns"] for row in found.rows + found.eval_rows]
    return sorted((asked["content"], answer["content"]) for asked, answer in turns)


def refused(read, *args):
    """Return the only line that tells why data can't be read."""
    with pytest.raises(SettingsError) as error:
        read(*args)
    (problem,) = error.value.args
    return problem


def prompts_of(*entries):
    return [row["prompt"] for row in read_prompts([*entries], [], 0, "auto", 0).rows]


# ------------------------------------------------------------------------------ by its name
@pytest.mark.parametrize(
    ("data", "rows"),
    [("some/data", TRAIN), ("some/data:train", TRAIN), ("some/data:test", TEST)],
)
def test_a_dataset_of_the_hub_is_fetched_once_and_found_again(hub, capfd, data, rows):
    """A run reads it twice, for its check and where it begins; the next one has it already."""
    assert read_table(data, by_name=True) == read_table(data, by_name=True) == rows
    told = "Fetching what the cache lacks of some/data from the Hub\n"
    assert capfd.readouterr() == (told, "")
    assert {"data/train.parquet", "data/test.parquet"} >= fetched(hub) - {"README.md"} > set()

    hub.asked.clear()
    forget()
    assert read_table(data, by_name=True) == rows
    assert not [name for name in fetched(hub) if name.startswith("data/")]


def test_data_of_the_hub_is_learned_from(hub):
    assert examples_of("some/data") == sorted(tuple(row.values()) for row in TRAIN)
    assert len(examples_of("some/data:train[:2]")) == 2


def test_data_of_the_hub_has_a_checksum_of_its_rows(hub):
    hashes = hash_files(["some/data", "some/data:test", FILE], by_name=True)
    assert [*hashes] == ["some/data", "some/data:test", FILE]
    assert len({*hashes.values()}) == 3
    assert hash_files(["some/data"]) == {}  # of PROMPTS it is a text


def test_a_folder_that_is_here_is_not_looked_for_on_the_hub(hub, tmp_path):
    datasets.Dataset.from_list(OTHERS).save_to_disk(tmp_path / "some" / "data")
    assert read_table("some/data", by_name=True) == OTHERS
    assert hub.asked == []


@pytest.mark.parametrize("name", ["some/data", "some/data:train", "some/other"])
def test_in_prompts_a_name_is_a_text(hub, name):
    assert prompts_of(name) == [name]
    assert hub.asked == []


def test_a_split_that_is_not_there_is_told(hub):
    problem = refused(examples_of, "some/data:nope")
    assert problem.startswith("DATA is some/data:nope: it can't be used (")
    assert "nope" in problem.partition("(")[2] and "train" in problem and "test" in problem


@pytest.mark.parametrize("name", ["some/other", "some/gated", "some/other:train"])
def test_a_name_that_the_hub_has_no_data_of(hub, name):
    problem = refused(examples_of, name)
    told = f"DATA is {name}: it can't be used (there is no such file, and the Hub does not give "
    assert problem.startswith(told + name.partition(":")[0])
    assert "hf auth login" in problem


# --------------------------------------------------------------------------- a file of the Hub
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl.gz"])
@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_file_of_the_hub_is_read_like_one_that_is_here(hub, capfd, name, revision):
    entry = f"hf://datasets/some/data{revision}/more/{name}"
    assert read_table(entry) == OTHERS
    assert prompts_of("Zero", entry) == ["Zero", "Other 0", "Other 1"]
    assert examples_of(entry) == [("Other 0", "yes"), ("Other 1", "yes")]
    told = "Fetching what the cache lacks of some/data from the Hub\n"
    assert capfd.readouterr() == (told, "")
    assert fetched(hub) == {f"more/{name}"}  # and nothing else of the dataset

    hub.asked.clear()
    forget()
    assert read_table(entry) == OTHERS
    assert len(fetched(hub)) <= 1  # whether it is still the same


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("hf://datasets/some/data/more/notes.md", "its ending does not tell what is in it"),
        ("hf://datasets/some/data/none.json", "none.json"),
        ("hf://datasets/some/other/rows.json", "the Hub does not give some/other ("),
        ("hf://datasets/some/data", "it has not the form hf://datasets/OWNER/NAME/PATH-OF-A-FILE"),
        ("hf://some/data/more/rows.json", "it has not the form hf://datasets/OWNER/NAME/PATH"),
        ("hf://", "it has not the form hf://datasets/OWNER/NAME/PATH-OF-A-FILE"),
    ],
)
def test_a_file_that_the_hub_does_not_have_is_told(hub, entry, reason):
    for setting, read in (("DATA", examples_of), ("PROMPTS", prompts_of)):
        problem = refused(read, entry)
        assert problem.startswith(f"{setting} is {entry}: it can't be used (")
        assert reason in problem and len(problem) < 550


# --------------------------------------------------------------------- a Hub that is not there
@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://unknown.invalid"])
@pytest.mark.parametrize("entry", [*BY_NAME, FILE])
def test_a_hub_that_refuses_or_is_unknown_is_told_at_once_in_one_line(
    hub_at, capfd, entry, address, waits
):
    hub_at(address)
    start = time.perf_counter()
    problem = refused(examples_of, entry)
    assert time.perf_counter() - start < 10  # a name server may take its time
    reason = "" if entry == FILE else "there is no such file, and "
    told = f"DATA is {entry}: it can't be used ({reason}the Hub does not give some/data ("
    assert problem.startswith(told) and f"): {REMEDY}" in problem
    assert capfd.readouterr() == ("", "")
    assert sum(waits) < 3


def test_a_file_of_prompts_on_a_hub_that_refuses(hub_at, waits):
    hub_at("http://127.0.0.1:9")
    problem = refused(prompts_of, FILE)
    told = f"PROMPTS is {FILE}: it can't be used (the Hub does not give some/data ("
    assert problem.startswith(told) and f"): {REMEDY}" in problem
    assert sum(waits) < 3


def test_a_hub_that_is_not_to_be_asked(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for entry in ("some/data", FILE):
        assert "offline" in refused(examples_of, entry)


def test_a_hub_that_never_answers(hub_at, monkeypatch, waits):
    ask, waited = huggingface_hub.HfApi.dataset_info, []

    def ask_in_haste(api, *args, timeout):
        waited.append(timeout)
        return ask(api, *args, timeout=timeout / 10)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask_in_haste)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and is silent
        hub_at(f"http://127.0.0.1:{server.getsockname()[1]}")
        problem = refused(examples_of, FILE)
    assert "the Hub does not give some/data (timed out)" in problem
    assert sum(waited) <= 30


@pytest.mark.parametrize("entry", [*BY_NAME, FILE])
def test_where_the_hub_is_not_there_a_copy_in_the_cache_will_do(hub, capfd, waits, entry):
    """At once, and without a word of libraries."""
    rows = read_table(entry, by_name=True)
    stop(hub)
    capfd.readouterr()
    assert read_table(entry, by_name=True) == rows
    assert capfd.readouterr() == ("", "")
    assert sum(waits) < 3


@pytest.mark.parametrize("entry", ["some/data", "some/data:test", FILE])
def test_where_the_hub_is_not_to_be_asked_a_copy_in_the_cache_will_do(
    hub, monkeypatch, waits, entry
):
    rows = read_table(entry, by_name=True)
    hub.asked.clear()
    forget()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert read_table(entry, by_name=True) == rows
    assert (hub.asked, waits) == ([], [])


def test_what_the_cache_lacks_of_a_dataset_is_told_where_the_hub_is_not_there(hub, waits):
    read_table(FILE)
    stop(hub)
    problem = refused(examples_of, "hf://datasets/some/data/more/other.json")
    assert "the Hub does not give some/data (" in problem


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        (train_sft, "--data"),
        (train_reward_model, "--data"),
        (make_instructions, "--seed-tasks"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_run_whose_data_is_not_found_leaves_nothing(
    hub_at, script, flag, demo_model, tmp_path, capsys, waits
):
    hub_at("http://127.0.0.1:9")
    flags = ["--model-name", str(demo_model), "--device", "cpu", flag, "some/data"]
    status = script.main(flags)
    output, errors = capsys.readouterr()
    (problem,) = refusals(status, errors)
    assert "is some/data: it can't be used (there is no such file, and the Hub does not" in problem
    assert output == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
