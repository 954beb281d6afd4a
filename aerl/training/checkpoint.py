"""Save and load checkpoints: atomically, verified, and without executing what a file contains."""

import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerl.errors import UserError, first_line
from aerl.runtime.files import atomic_write, inside, sha256
from aerl.runtime.paths import local
from aerl.tracking.results import read_summary

log = logging.getLogger("aerl")

# Keys under which a training script keeps its weights. A file may have others, too, such as ema_state_dict.
_WRAPPERS = {"model", "state_dict", "model_state_dict", "net"}
_COUNTER = "num_batches_tracked"  # of BatchNorm, which works without it
_LEVELS = 5  # of nested dictionaries
_LARGE = 1 << 30  # bytes up to which a tensor may be larger than its storage


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain containers) atomically; UserError if the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: Path, key: str = "checkpoint") -> Any:
    """Tensors and plain containers; `weights_only` refuses anything that would run code.

    UserError about `key` for what cannot be read, and where a checksum of the archive or the SHA-256 that the
    summary.json of its run or export records is wrong.
    """
    what, safetensors = f"{key}={path}", path.suffix == ".safetensors"
    try:
        if (recorded := _recorded(path)) is not None:
            check(path, recorded, what)
        if safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: holds something other than tensors and plain containers; save a state_dict"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        kind = "safetensors" if safetensors else "PyTorch"
        raise UserError(f"{what}: damaged or not a {kind} file ({first_line(error)})") from error


def _check_archive(path: Path) -> None:
    """Compare the checksums in the archive that torch.save writes, which torch.load does not; ValueError."""
    if not zipfile.is_zipfile(path):  # as written before torch 1.6
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("more bytes than the file has; torch.save does not compress")
        # torch.serialization.set_crc32_options(False) writes zeros.
        if any(member.CRC for member in members) and (name := archive.testzip()) is not None:
            raise ValueError(f"wrong checksum of {name}")


def digest(state: Mapping[str, Tensor]) -> str:
    """The SHA-256 of a state_dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check(path: Path, recorded: str, what: str) -> None:
    """UserError about `what` unless the file has the SHA-256 that was `recorded`."""
    if (actual := sha256(path)) != recorded:
        raise UserError(
            f"{what}: SHA-256 is {actual[:12]}..., expected {recorded[:12]}...; restore the file, or repeat the "
            "command that wrote it with overwrite=true"
        )


def _recorded(path: Path) -> str | None:
    """The SHA-256 of a file of weights in the summary.json of its run or export, if there is one."""
    path = path.absolute()
    in_run = path.parent.name == "checkpoints"
    folder = path.parents[1] if in_run else path.parent
    if not path.is_file() or not (in_run or path.suffix == ".safetensors"):
        return None
    weights = (_summary(folder) or {}).get("weights") or {}
    return str(weights["sha256"]) if weights.get("file") == path.relative_to(folder).as_posix() else None


def _summary(folder: Path) -> dict[str, Any] | None:
    """Of a run folder or an export; None for another folder."""
    return read_summary(folder) if (folder / "config.yaml").is_file() else None


def find(checkpoint: str, key: str = "checkpoint") -> Path:
    """The file behind `checkpoint=`: best.pt of a trained run, the weights of an export (a folder or hf://OWNER/NAME),
    or the file itself. UserError if the training is not finished, nothing was trained, or the file is missing or a
    link out of its folder."""
    path, what = local(checkpoint, key), f"{key}={checkpoint}"
    if not os.path.exists(path):  # noqa: PTH110  (pathlib raises for a name that is too long)
        raise UserError(f"{what}: no such file or folder; expected a run folder or a .pt file")
    if path.is_file():
        return path
    file, summary = path / "model.safetensors", _summary(path)
    if summary is None and not file.is_file():
        raise UserError(f"{what}: not a run folder (no summary.json and config.yaml); name a file of weights")
    if summary is not None:
        inside(path, path / "config.yaml")
        if (summary.get("weights") or {}).get("file") != file.name:
            file = path / "checkpoints/best.pt"
            if summary.get("trainer") == "none":
                raise UserError(
                    f"{what}: has no weights; use checkpoint={summary.get('checkpoint')}, which it evaluated"
                )
            if not summary.get("weights") and summary.get("status") != "finished":
                last = path / "checkpoints/last.pt"
                raise UserError(
                    f"{what}: training is not finished (status: {summary.get('status')}); resume it, or use {last} "
                    "for the current weights"
                )
    if not file.is_file():
        raise UserError(f"{what}: {file} is missing; restore it, or repeat the run's command with overwrite=true")
    return inside(path, file)


def tensors(path: Path, key: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a file, as they are named there; UserError if there are none, or several sets of them."""
    return _choose([(keys, found, "") for keys, found in _state_dicts(load(path, key))], f"{key}={path}")[0]


def load_weights(model: nn.Module, path: Path, key: str = "checkpoint") -> bool:
    """Load the weights in `path` into `model`, a Classifier; returns whether the file has its normalisation, too.

    Takes aerl's checkpoints and bare state_dicts as training scripts keep them: under some key ({"state_dict": ...}),
    and with one prefix of all names ("module.", "model.", "1."). UserError unless all tensors of the network are there,
    finite, of its shapes and kinds of numbers, no others under that prefix; only num_batches_tracked may be missing.
    """
    what, expected = f"{key}={path}", model.state_dict()
    net = {name.removeprefix("net."): tensor for name, tensor in expected.items() if name.startswith("net.")}
    found, prefix = _fitting(load(path, key), net, what)
    names = {f"net.{name}": prefix + name for name in net if prefix + name in found}
    normalization = {name: prefix.removesuffix("net.") + name for name in ("normalize.mean", "normalize.std")}
    carries_normalization = prefix.endswith("net.") and found.keys() >= set(normalization.values())
    if carries_normalization:
        names |= normalization
    weights = {name: _fitted(found[theirs], expected[name], f"{what}: {theirs}") for name, theirs in names.items()}
    if carries_normalization and (weights["normalize.std"] <= 0).any():
        raise UserError(f"{what}: {normalization['normalize.std']} must be greater than 0")
    if left_out := sorted(found.keys() - set(names.values())):
        log.warning(
            "%s: %d tensors outside the network are not loaded: %s", what, len(left_out), ", ".join(left_out[:3])
        )
    model.load_state_dict(expected | weights)
    return carries_normalization


def _fitted(tensor: Tensor, expected: Tensor, what: str) -> Tensor:
    """A tensor of a file in the precision of the model's; UserError unless it has its shape, kind and finite values."""
    if tensor.shape != expected.shape:
        raise UserError(
            f"{what} is {tuple(tensor.shape)}, in the model {tuple(expected.shape)}; choose the model= and dataset= "
            "(classes, channels, size) it was trained with"
        )
    if tensor.is_floating_point() != expected.is_floating_point() and not what.endswith(_COUNTER):
        raise UserError(f"{what} is {tensor.dtype}, in the model {expected.dtype}")
    tensor = tensor.to(expected.dtype)
    wrong = ~tensor.isfinite() & expected.isfinite().cpu()  # a mask may have infinities
    if wrong.any():
        raise UserError(f"{what} has {int(wrong.sum())} values that are not finite")
    return tensor


_Candidate = tuple[tuple[str, ...], dict[str, Tensor], str]  # keys in the file, tensors by name, prefix of the names


def _state_dicts(state: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary with tensors in what a file holds, and the keys under which it is."""
    queue: list[tuple[tuple[str, ...], Any]] = [((), state)]
    seen = set()  # a dictionary may hold itself, and many times
    for keys, node in queue:
        if not isinstance(node, dict) or id(node) in seen or len(keys) > _LEVELS:
            continue
        seen.add(id(node))
        named = {name: value for name, value in node.items() if isinstance(name, str)}
        if found := {name: value for name, value in named.items() if isinstance(value, Tensor) and _is_plain(value)}:
            yield keys, found
        queue += [((*keys, name), value) for name, value in named.items()]


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has dense values on the CPU; an expanded tensor declares more values than the file has bytes."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and (tensor.nbytes <= _LARGE or tensor.nbytes <= tensor.untyped_storage().nbytes())


def _choose(candidates: list[_Candidate], what: str) -> tuple[dict[str, Tensor], str]:
    """The tensors and prefix that a training script means as its result; UserError if that is not clear."""
    if not candidates:
        raise UserError(f"{what}: is neither one of aerl's checkpoints nor a state_dict")
    usual = [candidate for candidate in candidates if set(candidate[0]) <= _WRAPPERS] or candidates
    first, *others = [{name[len(prefix):]: tensor for name, tensor in found.items() if name.startswith(prefix)}
                      for _, found, prefix in usual]  # fmt: skip
    for other in others:
        if first.keys() != other.keys() or not all(torch.equal(first[name], other[name]) for name in first):
            keys = ", ".join(".".join(candidate[0]) or "the file itself" for candidate in usual)
            raise UserError(f"{what}: holds several sets of weights ({keys}); save one alone")
    return usual[0][1:]


def _fitting(state: Any, net: Mapping[str, Tensor], what: str) -> tuple[dict[str, Tensor], str]:
    """The tensors in a file, and the prefix behind which they have the network's names, all of them and no others."""
    needed = [name for name in net if not name.endswith(_COUNTER)]
    first = next(iter(needed), "")
    fitting, misfits = [], []
    for keys, found in _state_dicts(state):
        for prefix in sorted({name.removesuffix(first) for name in found if name.endswith(first)} or {""}):
            names = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
            missing, unknown = [name for name in needed if name not in names], sorted(names - net.keys())
            if missing or unknown:
                misfits.append((len(missing) + len(unknown), missing[:1], unknown[:1]))
            else:
                fitting.append((keys, found, prefix))
    if not fitting and misfits:
        number, missing, unknown = min(misfits)
        faults = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unknown]
        raise UserError(
            f"{what}: is of another architecture ({number} tensors: {', '.join(faults)}); choose the model= it was "
            "trained with"
        )
    return _choose(fitting, what)
