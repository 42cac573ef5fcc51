"""Where a model is: on a Hub that is there or not, in the cache, in a folder, and on what base."""

import hashlib
import json
import re
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from helpers import refusals
from transformers import AutoConfig

import train_rlhf
from finetune.errors import SettingsError, shorten
from finetune.hub import bases_of, context_of, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REASON = "there is no such folder, the cache lacks it, and the Hub does not give it ("
REMEDY = "check name and connection, or run: hf auth login; offline there is demo_model"


# ----------------------------------------------------------------------------- a Hub that is not there
@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Let the Hub's cache be a folder of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub_at(cache, monkeypatch):
    """Let the Hub have another address."""
    return lambda address: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)


def refused(setting, name):
    """Return why a model is not found, and the seconds that it took to tell."""
    start = time.perf_counter()
    with pytest.raises(SettingsError) as error:
        find_model(setting, name)
    seconds = time.perf_counter() - start
    (problem,) = error.value.args
    beginning, end = f"{setting} is {shorten(name)}: {REASON}", f"): {REMEDY}"
    assert problem.startswith(beginning) and problem.endswith(end)
    return problem.removeprefix(beginning).removesuffix(end), seconds


def test_a_run_whose_model_is_not_found_leaves_nothing(call_main, hub_at, capsys, tmp_path):
    hub_at("http://127.0.0.1:9")
    status = call_main("--device", "cpu")
    output, errors = capsys.readouterr()
    (problem,) = refusals(status, errors)
    assert problem.startswith(f"MODEL_NAME is {train_rlhf.MODEL_NAME}: {REASON}")
    assert problem.endswith(f"): {REMEDY}")
    assert output == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://unknown.invalid"])
def test_a_hub_that_refuses_or_is_unknown_is_told_at_once(hub_at, address):
    hub_at(address)
    _, seconds = refused("MODEL_NAME", "some/model")
    assert seconds < 10  # a name server may take its time


def test_a_hub_that_is_not_to_be_asked(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    reason, _ = refused("MODEL_NAME", "some/model")
    assert "offline" in reason


def test_a_hub_that_never_answers(hub_at, monkeypatch):
    ask, waited = huggingface_hub.HfApi.model_info, []

    def ask_in_haste(api, *args, timeout):
        waited.append(timeout)
        return ask(api, *args, timeout=timeout / 10)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask_in_haste)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and is silent
        hub_at(f"http://127.0.0.1:{server.getsockname()[1]}")
        reason, seconds = refused("MODEL_NAME", "some/model")
    assert reason == "timed out"
    assert sum(waited) <= 30
    assert seconds < 10


# ------------------------------------------------------------------------------------ a Hub that is there
class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one model needs; the server holds its files and what was asked for."""

    def do_GET(self):
        files, path = self.server.files, self.path.split("?")[0]
        self.server.asked.append(path)
        name = path.removeprefix(f"/some/model/resolve/{COMMIT}/")
        if self.server.broken and path.endswith(".safetensors"):
            self.answer(403, b"")
        elif re.fullmatch(rf"/api/models/some/model(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": file} for file in files]
            model = {"id": "some/model", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(model).encode())
        elif path.startswith("/api/models/some/model/tree/"):
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": checksum(data)}
                for file, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif name in files:
            etag = f'"{checksum(files[name])}"'
            self.answer(200, files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif path == "/api/models/some/gated":
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def checksum(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(hub_at, demo_model, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    names = [path.name for path in demo_model.glob("*.json")] + ["model.safetensors"]
    server.files = {name: (demo_model / name).read_bytes() for name in names}
    unwanted = "pytorch_model.bin modeling_own.py onnx/model.safetensors README.md pickle.pkl"
    server.files |= dict.fromkeys(unwanted.split(), b"not wanted")
    server.asked, server.broken, server.wanted = [], False, names
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    hub_at(address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_and_found_again(hub, demo_model, capsys):
    folder = Path(find_model("MODEL_NAME", "some/model"))
    assert "Fetching what the cache lacks of some/model from the Hub\n" in capsys.readouterr().out
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: (demo_model / name).read_bytes() for name in hub.wanted
    }
    fetched = {path.split(COMMIT + "/")[1] for path in hub.asked if "/resolve/" in path}
    assert fetched == set(hub.wanted)

    hub.asked.clear()
    assert find_model("MODEL_NAME", "some/model") == str(folder)
    assert not [path for path in hub.asked if "/resolve/" in path]  # all of it is in the cache

    hub.shutdown()
    hub.server_close()
    assert find_model("MODEL_NAME", "some/model") == str(folder)


@pytest.mark.parametrize(
    "name", ["some/other", "some/gated", "a/b/c", "some model", "ünknown/model", "a" * 200]
)
def test_a_name_that_the_hub_has_no_model_of(hub, name):
    refused("REWARD", name)  # a classifier is found in the same way
    asked = [f"/api/models/{name}"] if name.startswith("some/") else []
    assert hub.asked == asked  # the others are no names at all


def test_a_download_that_breaks_off(hub, monkeypatch):
    """It is no model, not even in the cache, until the same line fetches the rest."""
    hub.broken = True
    refused("MODEL_NAME", "some/model")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        refused("MODEL_NAME", "some/model")

    fetched = {path for path in hub.asked if path.endswith("/config.json")}
    hub.broken = False
    hub.asked.clear()
    folder = Path(find_model("MODEL_NAME", "some/model"))
    assert (folder / "model.safetensors").exists()
    assert fetched and not fetched & set(hub.asked)  # what is fetched already stays


# ------------------------------------------------------------------------------------------- folders
@pytest.fixture
def make_adapter(tmp_path):
    """Write the config of an adapter on that base, without its weights; return its folder."""

    def make(name, base, **others):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        lora = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"} | others
        (folder / "adapter_config.json").write_text(json.dumps(lora))
        return folder

    return make


@pytest.fixture
def refused_run(call_main, capsys, tmp_path):
    """Return the line that refuses a run of a model, which has to leave nothing."""

    def call(folder, output="trained"):
        before = sorted(tmp_path.rglob("*"))
        status = call_main("--model-name", folder, "--output-dir", output, "--device", "cpu")
        (line,) = refusals(status, capsys.readouterr().err)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return call


def test_an_adapter_whose_base_is_missing(make_adapter, refused_run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = make_adapter("adapter", "nobody/nothing")
    (adapter / "adapter_model.safetensors").touch()
    line = refused_run(adapter)
    assert line.startswith("The base of MODEL_NAME is nobody/nothing: there is no such folder, ")
    remedy = "start where that folder is, or correct base_model_name_or_path in adapter_config.json"
    assert line.endswith(f": {remedy}")


def test_an_adapter_that_lacks_its_weights(make_adapter, refused_run, demo_model):
    line = refused_run(make_adapter("adapter", demo_model))
    assert line.startswith("MODEL_NAME is ") and "it has no adapter_model.safetensors" in line


def test_adapters_that_are_built_on_each_other(make_adapter, refused_run, tmp_path):
    """As where the folder of an adapter's base was moved aside, and the adapter took its place."""
    own = make_adapter("own", tmp_path / "own")
    line = refused_run(own)
    assert line.startswith("MODEL_NAME is ") and "which is built on itself" in line
    first = make_adapter("first", tmp_path / "second")
    make_adapter("second", first)
    assert "which is built on itself" in refused_run(first)


def test_the_base_of_an_adapter_is_not_moved_aside(make_adapter, refused_run, demo_model, tmp_path):
    """Nor the base of the adapter that is its base."""
    base = tmp_path / "base"
    shutil.copytree(demo_model, base)
    (base / "metrics.jsonl").touch()  # as in the folder of an earlier run
    first = make_adapter("first", base)
    second = make_adapter("second", first)
    assert bases_of(str(second)) == [str(second), str(first), str(base)]
    for adapter in (first, second):
        assert "the current folder or the model is in it" in refused_run(adapter, base)


def test_the_context_of_a_model_whose_text_has_a_config_of_its_own(tmp_path):
    """Qwen 3.5 is loaded without its eyes."""
    text = {"max_position_embeddings": 64}
    AutoConfig.for_model("qwen3_5", text_config=text).save_pretrained(tmp_path)
    assert context_of(tmp_path) == 64
