"""A run's state, on disk whole or not at all."""

import io
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from finetune.errors import SettingsError, blame, shorten
from finetune.processes import is_main_process
from finetune.settings import fixed_settings


class Checkpoint:
    """The state of a run, saved in its output folder as checkpoint/state.pt.

    model: of its weights those that are trained are saved. scaler: of the loss in
    float16, else None. files: {path: SHA-256} of the data, as hash_files returns it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        settings: Any,
        files: dict[str, str],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.settings = settings
        self.files = files

    def save(self, metrics: list[dict[str, Any]], **more: Any) -> None:
        """Replace the last checkpoint, if there was a step and its weights are finite.

        more: what else the run needs to go on. All processes have to call this together.
        """
        weights = trained_weights(self.model)
        finite = all(weight.isfinite().all() for weight in weights.values())
        if metrics and finite and is_main_process():
            # Random states are not needed: each step sets its own seed.
            state = more | {
                "files": self.files,
                "settings": self.settings.model_dump(),
                "metrics": metrics,
                "weights": weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
            }
            write_state(state, self.settings.output_dir)

        # A process that ends would end the main one, which may still be writing.
        PartialState().wait_for_everyone()

    def load(self, steps: int) -> dict[str, Any]:
        """Put all back to the last checkpoint, and return it.

        steps: how many the whole run takes. What check_resume refuses is refused too.
        """
        state = check_resume(self.settings, steps, self.files)

        # The checkpoint may be of another model that was in the same folder.
        with blame("RESUME", True, "start without it"):
            for name, weight in trained_weights(self.model).items():
                weight.copy_(state["weights"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scaler and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        return state


# -------------------------------------------------------------------------- on the disk
def state_path(folder: str) -> Path:
    """Return where the checkpoint of an output folder is."""
    return Path(folder, "checkpoint", "state.pt")


def write_state(state: dict[str, Any], folder: str) -> None:
    """Write a checkpoint beside the last one, then put it in its place."""
    # What torch.save raises for a full disk says nothing: it does not write the file.
    content = io.BytesIO()
    torch.save(state, content)

    path = state_path(folder)
    new = path.parent / "new" / path.name
    with open(new, "wb") as file:
        file.write(content.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_checkpoint(folder: str) -> dict[str, Any] | None:
    """Return the dictionary that was saved last, None where there is none."""
    path = state_path(folder)
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def trained_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: weight} of what is trained."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach()
    return weights


# -------------------------------------------------------------------- before it goes on
def check_resume(settings: Any, steps: int, files: dict[str, str]) -> dict[str, Any]:
    """Return the last checkpoint; refuse what would make the rest of the run another one.

    steps: how many the whole run takes. files: {path: SHA-256} of the data, as it is now.
    Raises SettingsError with a line for each setting and each file that differs.
    """
    # The file may be broken, or of something else.
    with blame("RESUME", True, "start without it"):
        state = read_checkpoint(settings.output_dir)
        if state is None:
            raise ValueError(f"there is no checkpoint in {settings.output_dir}")
        saved_settings = {**state["settings"]}
        done = len(state["metrics"])
        saved_files = state["files"]

    problems = []
    for name, value in fixed_settings(settings).items():
        # What an older checkpoint does not know can't differ.
        saved = saved_settings.get(name, value)
        if value != saved:
            problem = f"{name.upper()} is {shorten(value)}, but {shorten(saved)}"
            problems.append(f"{problem} in the checkpoint: give that or start anew")

    # Where the checkpoint lacks a file a setting has changed, which is told above.
    for path, content in files.items():
        if content != saved_files.get(path, content):
            remedy = "put it back or start anew"
            problems.append(f"{path} has changed since the checkpoint: {remedy}")

    # The steps depend on settings and files: they are told where these are the same.
    if not problems and done > steps:
        epochs = f"TRAINING_EPOCHS is {settings.training_epochs:g}"
        problem = f"{epochs}, which takes {steps} steps, but the checkpoint has {done}"
        problems.append(f"{problem}: give more")
    if problems:
        raise SettingsError(*problems)
    return state
