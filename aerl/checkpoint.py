"""Save and load, atomically, without executing what a file contains."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerl.files import atomic_write, sha256
from aerl.remote import local
from aerl.results import read_summary
from aerl.types import UserError, first_line

# Under which key a training script keeps the weights, and what wrappers put before the name of each tensor:
# DataParallel, torch.compile, a module that holds the network as its attribute `model`.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain containers) atomically: a killed process leaves the old file or the new.

    Raises UserError where the disk refuses; the old file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: Path, key: str = "checkpoint") -> Any:
    """Read tensors and plain containers; `weights_only` refuses anything that would run code.

    A `.safetensors` file cannot hold such a thing. Weights that a run or an export has left must be those that
    its summary.json records; where it records none, as runs of earlier versions did, they are taken as they are.
    What cannot be read is a UserError about the `key` that named it, here and in the functions below.
    """
    try:
        if (recorded := _recorded(path)) is not None:
            check(path, recorded, f"{key}={path}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{key}={path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key}={path}: holds something other than tensors and plain containers, which is not loaded; "
            "save the model's state_dict() instead"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
        raise UserError(f"{key}={path}: damaged or not a {kind} file ({first_line(error)})") from error


def check(path: Path, recorded: str, what: str) -> None:
    """A UserError about `what` unless the file at `path` has the SHA-256 that was `recorded` of it."""
    found = sha256(path)
    if found != recorded:
        raise UserError(
            f"{what}: is not the file whose SHA-256 was recorded: that began with {recorded[:12]}, this with "
            f"{found[:12]}; restore it, or repeat with overwrite=true the command that recorded it"
        )


def _recorded(path: Path) -> str | None:
    """The SHA-256 that the summary.json of a run or an export states for this file of weights, if it does."""
    path = path.absolute()
    in_run = path.parent.name == "checkpoints"
    if not path.is_file() or not (in_run or path.suffix == ".safetensors"):
        return None
    folder = path.parents[1] if in_run else path.parent
    told = (read_summary(folder) or {}).get("weights")
    if not isinstance(told, dict) or told.get("file") != path.relative_to(folder).as_posix():
        return None
    return str(told.get("sha256"))


def tensors(path: Path, key: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a file as they are named there; UserError where there are none."""
    weights = _weights(load(path, key))
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{key}={path}: is neither one of aerl's checkpoints nor a state_dict")
    return weights


def find(checkpoint: str, key: str = "checkpoint") -> Path:
    """The file behind `checkpoint=`: the best (else last) one of a run folder, an export's, or the file itself.

    hf://OWNER/NAME is an export on the Hugging Face hub.
    """
    path = local(checkpoint, key)
    if not path.exists():
        raise UserError(f"{key}={checkpoint}: no such file or folder; give a run folder or a .pt file")
    if path.is_file():
        return path
    for name in ("checkpoints/best.pt", "checkpoints/last.pt", "model.safetensors"):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{key}={checkpoint}: the folder has no checkpoints/best.pt or last.pt; is it a run folder?"
    )


def load_weights(model: nn.Module, path: Path, key: str = "checkpoint") -> bool:
    """Put the weights in `path` into `model` (a Classifier); a UserError where they do not fit.

    Takes aerl's own checkpoints, and a bare state_dict of the network alone, such as the paper's `.pth`
    files, by itself or as a training script keeps it ({"state_dict": ...}, names with "module." before them).
    Nothing else in the file is looked at. Returns whether it carried its normalisation: a bare state_dict
    does not, though the network in it may have one of its own.
    """
    net = {name.removeprefix("net.") for name in model.state_dict() if name.startswith("net.")}
    weights = _plainly_named(tensors(path, key), net | set(model.state_dict()))
    carries_normalization = "normalize.mean" in weights and set(weights) != net
    if not carries_normalization:
        weights = {f"net.{name}": tensor for name, tensor in weights.items()}
        weights |= {name: t for name, t in model.state_dict().items() if name.startswith("normalize.")}
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    if missing or surplus:
        examples = ", ".join([*missing[:1], *surplus[:1]])
        raise UserError(
            f"{key}={path}: is of another architecture ({len(missing)} of the model's tensors are missing, "
            f"{len(surplus)} are unknown: {examples}); choose the model= it was trained with"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{key}={path}: {name} is {tuple(tensor.shape)}, in the model {tuple(expected[name].shape)}; "
                "choose the model= and dataset= (classes, channels, size) it was trained with"
            )
    model.load_state_dict(weights)
    return carries_normalization


def _weights(state: Any) -> dict[str, Any]:
    """The tensors by name, out of the containers around them; empty if there is no such thing."""
    while isinstance(state, dict):
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return {}
    return state


def _plainly_named(weights: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """The tensors without what wrappers put before their names."""
    while weights and not any(name in known for name in weights):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
