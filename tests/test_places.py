"""The Hub: what is fetched from it and found again, and what is said where that fails. Folders: test_inputs.py."""

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


def test_a_hub_that_cannot_be_reached(run_script, tmp_path, script):
    start = time.perf_counter()
    result = run_script(tmp_path)
    assert time.perf_counter() - start < 15
    assert result.status == 2
    assert "Traceback" not in result.stderr
    assert f"MODEL_NAME is {train_rlhf.MODEL_NAME}: " in result.stderr
    assert "the Hub can't be reached" in result.stderr
    command = result.stderr.strip().splitlines()[-1].strip()
    python, path, flag, model = command.split()
    assert (python, path, flag) == ("python", str(script), "--model-name")
    assert (tmp_path / model).resolve() == (script.parent / "demo_model").resolve()
    assert result.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_hub_that_never_answers(run_script, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and is silent
        start = time.perf_counter()
        result = run_script(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.perf_counter() - start < 20
    assert result.status == 2
    assert "Traceback" not in result.stderr
    assert "the Hub can't be reached" in result.stderr
    assert "--model-name" in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one model needs; the server holds its files and what was asked for."""

    def do_GET(self):
        files, path = self.server.files, self.path.split("?")[0]
        self.server.asked.append(path)
        if self.server.broken and path.endswith(".safetensors"):
            self.answer(403, b"")
        elif re.fullmatch(rf"/api/models/some/model(/revision/(main|{COMMIT}))?", path):
            siblings = [{"rfilename": name} for name in files]
            self.answer(
                200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode()
            )
        elif path.startswith("/api/models/some/model/tree/"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif (name := path.removeprefix(f"/some/model/resolve/{COMMIT}/")) in files:
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            self.answer(200, files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
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


@pytest.fixture
def hub(demo_model, monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    names = [path.name for path in demo_model.glob("*.json")] + ["model.safetensors"]
    server.files = {name: (demo_model / name).read_bytes() for name in names}
    for name in (
        "pytorch_model.bin",
        "modeling_own.py",
        "onnx/model.safetensors",
        "README.md",
        "pickle.pkl",
    ):
        server.files[name] = b"not wanted"
    server.asked, server.broken, server.wanted = [], False, names
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_of_the_hub_is_fetched_and_found_again(hub, settings, demo_model):
    folder = train_rlhf.find_model("some/model")
    assert {name: (Path(folder) / name).read_bytes() for name in hub.wanted} == {
        name: (demo_model / name).read_bytes() for name in hub.wanted
    }
    assert sorted(path.name for path in Path(folder).rglob("*") if path.is_file()) == sorted(
        hub.wanted
    )
    fetched = {path.split(COMMIT + "/")[1] for path in hub.asked if "/resolve/" in path}
    assert fetched == set(hub.wanted)

    hub.asked.clear()
    assert train_rlhf.find_model("some/model") == folder
    assert not [path for path in hub.asked if "/resolve/" in path]  # all of it is in the cache

    hub.shutdown()
    hub.server_close()
    assert train_rlhf.find_model("some/model") == folder


def test_a_model_that_the_hub_does_not_have(hub):
    with pytest.raises(train_rlhf.SettingsError) as error:
        train_rlhf.find_model("some/other")
    assert str(error.value).splitlines()[1:] == [
        "- MODEL_NAME is some/other: no folder here, and no model on the Hub that you may read"
    ]


@pytest.mark.parametrize("name", ["a/b/c", "some model", "ünknown/model", "a" * 200])
def test_a_name_that_no_model_can_have(hub, name):
    with pytest.raises(train_rlhf.SettingsError, match="no model on the Hub that you may read"):
        train_rlhf.find_model(name)
    assert hub.asked == []


def test_a_download_that_breaks_off(hub):
    hub.broken = True
    with pytest.raises(train_rlhf.SettingsError, match=r"its download broke off .*: try again"):
        train_rlhf.find_model("some/model")
    hub.broken = False
    assert (Path(train_rlhf.find_model("some/model")) / "model.safetensors").exists()


def test_half_a_download_is_no_model_while_the_hub_cannot_be_reached(hub):
    hub.broken = True
    with pytest.raises(train_rlhf.SettingsError):
        train_rlhf.find_model("some/model")
    hub.shutdown()
    hub.server_close()
    with pytest.raises(train_rlhf.SettingsError, match="the Hub can't be reached"):
        train_rlhf.find_model("some/model")
