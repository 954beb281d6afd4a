"""Save and load, atomically, without executing what a file contains."""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerl.files import atomic_write
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

    What cannot be read is a UserError about the `key` that named it, here and in the functions below.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{key}={path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key}={path}: holds something other than tensors and plain containers, which is not loaded; "
            "save the model's state_dict() instead"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        raise UserError(f"{key}={path}: damaged or not a PyTorch file ({first_line(error)})") from error


def find(checkpoint: str, key: str = "checkpoint") -> Path:
    """The file behind `checkpoint=`: a run folder's best (else last) checkpoint, or the file itself."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise UserError(f"{key}={checkpoint}: no such file or folder; give a run folder or a .pt file")
    if path.is_file():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
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
    weights = _unwrapped(load(path, key), net | set(model.state_dict()))
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{key}={path}: is neither one of aerl's checkpoints nor a state_dict")
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


def _unwrapped(state: Any, known: Collection[str]) -> dict[str, Any]:
    """The tensors by name, out of the wrappers around them; empty if there is no such thing."""
    while isinstance(state, dict):
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return {}
    weights: dict[str, Any] = state
    while weights and not any(name in known for name in weights):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)
        if prefix is None:
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights
