"""The Hub: what is fetched from it and found again, and what is said where that fails.

The folders of models are in test_inputs.py.
"""

import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

import train_rlhf

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REASON = "there is no such folder, the cache lacks it, and the Hub does not give it ("
REMEDY = "check name and connection, or run: hf auth login; offline there is demo_model"


# ----------------------------------------------------------------------------- a Hub that is not there
def test_a_hub_that_cannot_be_reached(run_script, tmp_path):
    result = run_script(tmp_path)
    assert (result.status, result.stdout) == (2, "")
    first, line = result.stderr.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith(f"- MODEL_NAME is {train_rlhf.MODEL_NAME}: {REASON}")
    assert line.endswith(f"): {REMEDY}")
    assert result.seconds < 5
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Let the Hub's cache be a folder of this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def refused(cache, call_main, capsys):
    """Ask for a model that nobody has got; return the problem, and the seconds that it took."""

    def ask():
        start = time.perf_counter()
        assert call_main("--model-name", "some/model", "--device", "cpu") == 2
        seconds, (output, errors) = time.perf_counter() - start, capsys.readouterr()
        first, line = errors.splitlines()
        assert (output, first) == ("", "Nothing was started or changed:")
        assert line.startswith(f"- MODEL_NAME is some/model: {REASON}")
        assert line.endswith(f"): {REMEDY}")
        assert not [path for path in cache.parent.rglob("*") if path.is_file()]
        return line, seconds

    return ask


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://unknown.invalid"])
def test_a_hub_that_refuses_or_is_unknown_is_told_at_once(refused, monkeypatch, address):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    _, seconds = refused()
    assert seconds < 10  # a name server may take its time


def test_a_hub_that_is_not_to_be_asked(refused, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line, _ = refused()
    assert "offline" in line.removesuffix(REMEDY)  # which is why


def test_a_hub_that_never_answers(refused, monkeypatch):
    ask, waited = huggingface_hub.HfApi.model_info, []

    def ask_in_haste(api, *args, timeout):
        waited.append(timeout)
        return ask(api, *args, timeout=timeout / 10)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", ask_in_haste)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and is silent
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        line, seconds = refused()
    assert "(timed out)" in line
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
def hub(cache, demo_model, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    names = [path.name for path in demo_model.glob("*.json")] + ["model.safetensors"]
    server.files = {name: (demo_model / name).read_bytes() for name in names}
    unwanted = "pytorch_model.bin modeling_own.py onnx/model.safetensors README.md pickle.pkl"
    server.files |= dict.fromkeys(unwanted.split(), b"not wanted")
    server.asked, server.broken, server.wanted = [], False, names
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_and_found_again(hub, demo_model, capsys):
    folder = Path(train_rlhf.find_model("MODEL_NAME", "some/model"))
    assert "Fetching what the cache lacks of some/model from the Hub\n" in capsys.readouterr().out
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: (demo_model / name).read_bytes() for name in hub.wanted
    }
    fetched = {path.split(COMMIT + "/")[1] for path in hub.asked if "/resolve/" in path}
    assert fetched == set(hub.wanted)

    hub.asked.clear()
    assert train_rlhf.find_model("MODEL_NAME", "some/model") == str(folder)
    assert not [path for path in hub.asked if "/resolve/" in path]  # all of it is in the cache

    hub.shutdown()
    hub.server_close()
    assert train_rlhf.find_model("MODEL_NAME", "some/model") == str(folder)


@pytest.mark.parametrize(
    "name", ["some/other", "some/gated", "a/b/c", "some model", "ünknown/model", "a" * 200]
)
def test_a_name_that_the_hub_has_no_model_of(hub, name):
    with pytest.raises(train_rlhf.SettingsError) as error:
        train_rlhf.find_model("REWARD", name)  # a classifier is found in the same way
    (problem,) = error.value.args
    assert problem.startswith(f"REWARD is {train_rlhf.shorten(name)}: {REASON}")
    assert problem.endswith(f"): {REMEDY}")
    asked = [f"/api/models/{name}"] if name.startswith("some/") else []
    assert hub.asked == asked  # the others are no names at all


def test_a_download_that_breaks_off(hub, call_main, capsys, tmp_path):
    """It is no model, not even in the cache, until the same line fetches the rest."""
    hub.broken = True
    assert call_main("--model-name", "some/model", "--device", "cpu") == 2
    line = capsys.readouterr().err.splitlines()[1]
    assert line.startswith(f"- MODEL_NAME is some/model: {REASON}")
    assert line.endswith(f"): {REMEDY}")
    assert not (tmp_path / "trained_model").exists()
    fetched = {path for path in hub.asked if path.endswith("/config.json")}
    hub.broken = False
    hub.asked.clear()
    assert (Path(train_rlhf.find_model("MODEL_NAME", "some/model")) / "model.safetensors").exists()
    assert fetched and not fetched & set(hub.asked)  # what is fetched already stays


def test_half_a_download_is_no_model_while_the_hub_cannot_be_reached(hub):
    hub.broken = True
    with pytest.raises(train_rlhf.SettingsError):
        train_rlhf.find_model("MODEL_NAME", "some/model")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(train_rlhf.SettingsError, match="the Hub does not give it"):
        train_rlhf.find_model("MODEL_NAME", "some/model")
