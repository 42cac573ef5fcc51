"""Datasets of the Hub, and the library that reads them."""

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from finetune.errors import shorten


def quiet_datasets() -> Any:
    """Return the library datasets, which logs nothing and draws no bars."""
    import datasets

    # It would also use the network to count how often a file is read.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


@functools.cache  # a run reads its data twice: for its check, and where it begins
def fetch_rows(entry: str) -> list[dict[str, Any]]:
    """Return the rows of a dataset of the Hub, OWNER/NAME, of the split behind a colon or train.

    Raises ValueError where neither the Hub nor the cache has it.
    """
    name, _, split = entry.partition(":")
    problem = is_out_of_reach(name)
    datasets = quiet_datasets()
    split = split or "train"
    if problem:
        # A copy in the cache will do.
        with offline(), suppress(Exception):
            return datasets.load_dataset(name, split=split).to_list()
        raise ValueError(f"there is no such file, and {problem}")
    return datasets.load_dataset(name, split=split).to_list()


@contextmanager
def offline() -> Iterator[None]:
    """Keep the libraries from asking the Hub, which they would try for half a minute."""
    import datasets
    import huggingface_hub

    settings: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before):
            module.HF_HUB_OFFLINE = value


@functools.cache
def fetch_file(entry: str) -> str:
    """Return where the copy is of a file of the Hub, hf://datasets/OWNER/NAME[@REVISION]/PATH."""
    import huggingface_hub

    form = r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)"
    match = re.fullmatch(form, entry)
    if match is None:
        raise ValueError("it has not the form hf://datasets/OWNER/NAME/PATH-OF-A-FILE")
    name, revision, path = match.groups()
    options: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    problem = is_out_of_reach(name)
    if problem:
        with suppress(Exception):
            return huggingface_hub.hf_hub_download(name, path, local_files_only=True, **options)
        raise ValueError(problem)
    return huggingface_hub.hf_hub_download(name, path, **options)


def is_out_of_reach(name: str) -> str:
    """Return why the Hub does not give a dataset, an empty text where it does, which is told."""
    import huggingface_hub

    # datasets would try for half a minute where there is no network.
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=5)
    except Exception as error:
        remedy = "check name and connection, or run: hf auth login"
        return f"the Hub does not give {name} ({shorten(error)}): {remedy}"
    print(f"Fetching what the cache lacks of {name} from the Hub", flush=True)
    return ""
