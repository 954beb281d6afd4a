"""Save and load, atomically, without executing what a file contains."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerl.files import atomic_write
from aerl.types import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain containers) atomically: a killed process leaves the old file or the new.

    Raises UserError where the disk refuses; the old file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: Path) -> Any:
    """Read tensors and plain containers; `weights_only` refuses anything that would run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint={path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint={path}: holds something other than tensors and plain containers, which is not loaded; "
            "save the model's state_dict() instead"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        raise UserError(f"checkpoint={path}: damaged or not a PyTorch file ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def find(checkpoint: str) -> Path:
    """The file behind `checkpoint=`: a run folder's best (else last) checkpoint, or the file itself."""
    path = Path(checkpoint).expanduser()
    if not path.exists():
        raise UserError(f"checkpoint={checkpoint}: no such file or folder; give a run folder or a .pt file")
    if path.is_file():
        return path
    for name in ("best.pt", "last.pt"):
        if (path / "checkpoints" / name).is_file():
            return path / "checkpoints" / name
    raise UserError(
        f"checkpoint={checkpoint}: the folder has no checkpoints/best.pt or last.pt; is it a run folder?"
    )


def load_weights(model: nn.Module, path: Path) -> bool:
    """Put the weights in `path` into `model` (a Classifier); a UserError where they do not fit.

    Takes aerl's own checkpoints, and a bare state_dict of the network alone, such as the paper's `.pth`
    files. Returns whether the file carried its normalisation: a bare state_dict does not.
    """
    state = load(path)
    weights = state.get("model", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint={path}: is neither one of aerl's checkpoints nor a state_dict")
    carries_normalization = "normalize.mean" in weights
    if not carries_normalization:
        weights = {f"net.{name}": tensor for name, tensor in weights.items()}
        weights |= {name: t for name, t in model.state_dict().items() if name.startswith("normalize.")}
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    surplus = [name for name in weights if name not in expected]
    if missing or surplus:
        examples = ", ".join([*missing[:1], *surplus[:1]])
        raise UserError(
            f"checkpoint={path}: is of another architecture ({len(missing)} of the model's tensors are missing, "
            f"{len(surplus)} are unknown: {examples}); choose the model= it was trained with"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"checkpoint={path}: {name} is {tuple(tensor.shape)}, in the model {tuple(expected[name].shape)}; "
                "choose the model= and dataset= (classes, channels, size) it was trained with"
            )
    model.load_state_dict(weights)
    return carries_normalization
