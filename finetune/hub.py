"""Where a model is: in a folder, in the cache or on the Hub, and what it is built on."""

# An output folder is checked against these folders before the heavy libraries are loaded,
# which takes seconds. So a function imports the library that it needs.
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import SettingsError, blame, shorten

if TYPE_CHECKING:
    import transformers

# What is fetched of a repository, whose folders hold the same weights in other formats.
NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
FOLDERS = ["*/*"]


# --------------------------------------------------------------------------- the folder
def find_model(setting: str, name: str, remedy: str = "") -> str:
    """Return a local folder with the model, fetched where the cache lacks it.

    name: a folder, or a name on the Hub. remedy: of the SettingsError that names the
    setting, where the usual one would not help.
    """
    if os.path.isdir(name):
        return name

    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(name, timeout=5)
        print(f"Fetching what the cache lacks of {name} from the Hub", flush=True)
        return download(name)
    except Exception as error:
        # The Hub gave no answer: a copy in the cache has to do.
        with suppress(Exception):
            return download(name, local_files_only=True)

        problem = f"{setting} is {shorten(name)}: there is no such folder, "
        problem += f"the cache lacks it, and the Hub does not give it ({shorten(error)})"
        usual = "check name and connection, or run: hf auth login; "
        usual += "offline there is demo_model"
        raise SettingsError(f"{problem}: {remedy or usual}") from error


def download(name: str, local_files_only: bool = False) -> str:
    """Return the folder in the cache that has a model of the Hub, or raise anything."""
    import huggingface_hub

    return huggingface_hub.snapshot_download(
        name,
        allow_patterns=NEEDED,
        ignore_patterns=FOLDERS,
        local_files_only=local_files_only,
    )


# ------------------------------------------------------------------------- the adapters
def read_adapter(path: str) -> dict[str, Any] | None:
    """Return the config of the adapter in a folder, None where there is none.

    A folder that holds a whole model counts as that, whatever else is there.
    """
    adapter = Path(path, "adapter_config.json")
    is_whole = Path(path, "config.json").exists()
    if is_whole or not adapter.exists():
        return None
    return json.loads(adapter.read_text(encoding="utf-8"))


def bases_of(model_name: str) -> list[str]:
    """Return the name of a model and, of an adapter, of all that it is built on."""
    names = [model_name]
    remedy = "correct its adapter_config.json, or name the merged model"
    with blame("MODEL_NAME", model_name, remedy):
        adapter = read_adapter(model_name)
        while adapter:
            base = adapter["base_model_name_or_path"]
            # An adapter's folder was moved aside, and the adapter itself took its place.
            if base in names:
                circle = f"{shorten(base)}, which is built on itself"
                raise ValueError(f"it is built on {circle}")
            names.append(base)
            adapter = read_adapter(base)
    return names


def base_of(path: str) -> str:
    """Return the folder of an adapter's base model; one that is no adapter's, as it is.

    Raises ValueError for an adapter that can't be used, SettingsError for a base that is
    not found.
    """
    adapter = read_adapter(path)
    if adapter is None:
        return path
    if adapter["task_type"] == "SEQ_CLS":
        raise ValueError("it is the adapter of a classifier")

    # PEFT would ask the Hub for weights that are not there.
    if not Path(path, "adapter_model.safetensors").exists():
        raise ValueError("it has no adapter_model.safetensors")

    base = adapter["base_model_name_or_path"]
    remedy = "start where that folder is, or correct base_model_name_or_path "
    remedy += "in adapter_config.json"
    return find_model("The base of MODEL_NAME", base, remedy)


# -------------------------------------------------------------------------- the configs
def config_of(path: str) -> "transformers.PreTrainedConfig":
    """Return the config of a model, or of the one that an adapter is for."""
    import transformers

    base = base_of(path)
    if base != path:
        return config_of(base)
    return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)


def context_of(path: str) -> float:
    """Return how many tokens a model takes, infinity where it has no limit."""
    # The text part of a model that takes pictures too has a config of its own.
    config = config_of(path).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf
