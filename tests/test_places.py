"""Files, folders and the Hub: whatever is wrong with them, the run ends with a message and changes nothing."""

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
from safetensors.torch import load_file, save_file

import train_rlhf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
    }


@pytest.fixture
def refused(call_main, tmp_path, capsys):
    """Call main beside an earlier run; return its message, after a look at whether the run is untouched."""
    earlier = tmp_path / "trained_model"
    earlier.mkdir()
    for name in ("metrics.jsonl", "report.json", "model.safetensors"):
        (earlier / name).write_text(name)

    def call(*flags):
        before = contents(tmp_path)
        status = call_main("--device", "cpu", *flags)
        output, message = capsys.readouterr()
        assert status == 2
        assert message.startswith("Nothing was started or changed:\n- ")
        assert "Traceback" not in message
        assert output == ""
        assert contents(tmp_path) == before
        return message.split("\n", 1)[1]

    return call


# ------------------------------------------------------------------------------------------------------- MODEL_NAME
@pytest.mark.parametrize("name", ["./no_such_model", "/no/such/model", "../no_such_model", "~/no_such_model"])
def test_a_model_folder_that_does_not_exist(refused, name):
    message = refused("--model-name", name)
    assert message.startswith("- MODEL_NAME is ") and name.removeprefix("./") in message
    assert "there is no such folder" in message


def test_a_file_in_the_place_of_the_model(refused, tmp_path):
    (tmp_path / "model").write_text("")
    assert refused("--model-name", "model").startswith("- MODEL_NAME is model: ")


def config_is_empty(folder):
    (folder / "config.json").write_text("")


def config_is_broken(folder):
    (folder / "config.json").write_text("{ broken")


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def config_is_missing(folder):
    (folder / "config.json").unlink()


def config_of_an_unknown_kind(folder):
    (folder / "config.json").write_text('{"model_type": "no_such_kind"}')


def config_of_no_language_model(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')


def config_of_another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))


def tokenizer_is_missing(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def tokenizer_is_broken(folder):
    (folder / "tokenizer.json").write_text("{}")


def weights_are_missing(folder):
    (folder / "model.safetensors").unlink()


def weights_are_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def weights_are_cut_off(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def weights_lack_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (config_is_empty, "config"),
        (config_is_broken, "config"),
        (config_is_a_list, ""),
        (config_is_missing, ""),
        (config_of_an_unknown_kind, "no_such_kind"),
        (config_of_no_language_model, ""),
        (config_of_another_width, ""),
        (tokenizer_is_missing, "tokenizer"),
        (tokenizer_is_broken, ""),
        (weights_are_missing, "model.safetensors"),
        (weights_are_pickled, "model.safetensors"),
        (weights_are_cut_off, ""),
        (weights_lack_a_tensor, "model.layers.1.mlp.up_proj.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_loaded(refused, copy_of_demo_model, spoil, hint):
    spoil(copy_of_demo_model)
    message = refused("--model-name", copy_of_demo_model)
    problem, _, remedy = message.removeprefix(f"- MODEL_NAME is {copy_of_demo_model}: ").rpartition(": ")
    assert hint in problem
    assert problem.strip()
    assert remedy == "name a causal language model with config.json, *.safetensors and a tokenizer\n"
    assert message.count("\n") == 1


def test_a_prompt_too_long_for_the_model(refused, demo_model):
    message = refused("--model-name", demo_model, "--prompts", "very " * 300)
    assert message.startswith("- PROMPTS has 'very very")
    assert "lower MAX_NEW_TOKENS" in message


def test_layers_to_adapt_that_the_model_lacks(refused, demo_model):
    assert refused("--model-name", demo_model, "--lora-targets", "x_proj").startswith("- LORA_TARGETS is ['x_proj']: ")


def test_code_in_a_model_folder_is_never_run(refused, copy_of_demo_model, tmp_path, monkeypatch):
    config = json.loads((copy_of_demo_model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (copy_of_demo_model / "config.json").write_text(json.dumps(config))
    (copy_of_demo_model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers may ask
    assert refused("--model-name", copy_of_demo_model).startswith(f"- MODEL_NAME is {copy_of_demo_model}"[:40])
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------- OUTPUT_DIR
def test_a_file_in_the_place_of_the_output(refused, demo_model, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        message = refused("--model-name", demo_model, "--output-dir", place)
        assert message.startswith(f"- OUTPUT_DIR is {place}: ")
        assert "name another folder" in message


def test_an_output_that_cannot_be_written(refused, demo_model):
    for place in ("/proc/trained_model", "/proc/1/below/trained_model"):
        message = refused("--model-name", demo_model, "--output-dir", place)
        assert message.startswith(f"- OUTPUT_DIR is {place}: ")
        assert "name another folder" in message


def test_an_output_with_files_that_are_not_a_runs(refused, demo_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    message = refused("--model-name", demo_model, "--output-dir", "photos")
    assert message == "- OUTPUT_DIR is photos: it holds files that are not a run's: name another folder\n"


@pytest.mark.parametrize("output", ["copy", ".", "copy/../copy"])
def test_an_output_that_holds_the_model(refused, copy_of_demo_model, output):
    (copy_of_demo_model / "metrics.jsonl").write_text("")  # it was left by an earlier run
    message = refused("--model-name", "copy", "--output-dir", output)
    assert "OUTPUT_DIR is" in message and "name another folder" in message


def test_an_earlier_run_that_cannot_be_moved_aside(refused, demo_model, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "OUTPUT_DIR is ." in refused("--model-name", demo_model, "--output-dir", ".")


def test_nothing_to_resume(refused, demo_model):
    message = refused("--model-name", demo_model, "--resume")
    assert message == "- RESUME is True: there is no checkpoint in trained_model: start without it\n"


def test_a_run_without_an_output_folder_is_looked_for_and_not_made(refused, demo_model):
    assert "there is no checkpoint in new" in refused("--model-name", demo_model, "--resume", "--output-dir", "new")


def test_a_reward_that_is_not_there(refused, demo_model):
    assert refused("--model-name", demo_model, "--reward", "mine.py:score").startswith("- REWARD is mine.py:score: ")


# ---------------------------------------------------------------------------------------------------------- the Hub
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
            self.answer(200, json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/api/models/some/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
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
    for name in ("pytorch_model.bin", "modeling_own.py", "onnx/model.safetensors", "README.md", "pickle.pkl"):
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
    assert sorted(path.name for path in Path(folder).rglob("*") if path.is_file()) == sorted(hub.wanted)
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
