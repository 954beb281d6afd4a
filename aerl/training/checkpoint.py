"""Save and load, atomically, without executing what a file contains."""

import hashlib
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aerl.hub import local
from aerl.runtime.files import atomic_write, inside, sha256
from aerl.tracking.results import read_summary
from aerl.types import UserError, first_line

log = logging.getLogger("aerl")

# Under which key a training script keeps the weights; a file may hold others besides, such as ema_state_dict.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
_COUNTER = "num_batches_tracked"  # of BatchNorm: torch, too, does without it
_LEVELS = 10  # of dictionaries in each other
_LARGE = 2**30  # bytes of one expanded tensor
# What a module around a network holds beside it: the statistics of its normalisation, and what its loss needs.
_BESIDE = re.compile(r"(?:^|[._])(?<!running_)(mean|mu|std|sigma)$|(?:^|\.)(criterion|loss)\w*\.")


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain containers) atomically: a killed process leaves the old file or the new.

    The archive has a checksum of each record, which `load` compares. Raises UserError where the disk refuses; the
    old file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: Path, key: str = "checkpoint") -> Any:
    """Read tensors and plain containers; `weights_only` refuses anything that would run code.

    Checksums must be right: those in the archive, and the SHA-256 of the weights in the summary.json of a run or an
    export. What cannot be read is a UserError about the `key` that named it, here and in the functions below.
    """
    what = f"{key}={path}"
    try:
        if (recorded := _recorded(path)) is not None:
            check(path, recorded, what)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what}: no such file") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror or first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{what}: holds something other than tensors and plain containers, which is not loaded; "
            "save the model's state_dict() instead"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
        raise UserError(f"{what}: damaged or not a {kind} file ({first_line(error)})") from error


def _check_archive(path: Path) -> None:
    """Compare the checksums in the archive that torch.save writes, which torch.load does not; ValueError."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # the format before torch 1.6, which has none
            return
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it states more bytes than it has; torch.save does not compress")
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
    """A UserError about `what` unless the file at `path` has the SHA-256 that was `recorded` of it."""
    actual = sha256(path)
    if actual != recorded:
        raise UserError(
            f"{what}: is not the file whose SHA-256 was recorded: that began with {recorded[:12]}, this with "
            f"{actual[:12]}; restore it, or repeat with overwrite=true the command that recorded it"
        )


def _recorded(path: Path) -> str | None:
    """The SHA-256 that the summary.json of a run or an export states for this file of weights, if it does."""
    path = path.absolute()
    in_run = path.parent.name == "checkpoints"
    if not path.is_file() or not (in_run or path.suffix == ".safetensors"):
        return None
    folder = path.parents[1] if in_run else path.parent
    weights = (_run(folder) or {}).get("weights")
    if not isinstance(weights, dict) or weights.get("file") != path.relative_to(folder).as_posix():
        return None
    return str(weights.get("sha256"))


def _run(folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder or an export; None for another folder."""
    return read_summary(folder) if (folder / "config.yaml").is_file() else None


def _unfinished(summary: Mapping[str, Any]) -> bool:
    return not summary.get("weights") and summary.get("status") != "finished"


def find(checkpoint: str, key: str = "checkpoint") -> Path:
    """The file behind `checkpoint=`: the best one of a run that has been trained, an export's, or the file itself.

    hf://OWNER/NAME is an export on the Hugging Face hub. Raises UserError for a run whose training is not
    finished, or that trained nothing, and for a folder whose file is missing or is a link out of it.
    """
    path, what = local(checkpoint, key), f"{key}={checkpoint}"
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({first_line(error)})"
        raise UserError(f"{what}: no such file or folder{reason}; give a run folder or a .pt file") from error
    if path.is_file():
        return path
    file, summary = path / "model.safetensors", _run(path)
    if summary is None and not file.is_file():
        raise UserError(f"{what}: is no run folder, which has a summary.json and a config.yaml; name a file of weights")
    if summary is not None:
        inside(path, path / "config.yaml")
        weights = summary.get("weights")
        if not isinstance(weights, dict) or weights.get("file") != file.name:
            file = path / "checkpoints/best.pt"
            if summary.get("trainer") == "none":
                raise UserError(f"{what}: trained nothing; it evaluated checkpoint={summary.get('checkpoint')}")
            if _unfinished(summary):
                raise UserError(
                    f"{what}: its training is not finished (status: {summary.get('status')}); its command goes on "
                    f"with it. {path / 'checkpoints/last.pt'} names the weights as they are"
                )
    if not file.is_file():
        raise UserError(f"{what}: {file} is missing; restore it, or repeat the run's command with overwrite=true")
    return inside(path, file)


class _Weights(NamedTuple):
    """Tensors by name, and where in the file they are: under these keys, and behind this prefix of their names."""

    keys: tuple[str, ...]
    tensors: dict[str, Tensor]
    prefix: str = ""

    def __str__(self) -> str:
        return ".".join(self.keys + ((f"{self.prefix}*",) if self.prefix else ())) or "the file itself"

    def bare(self) -> dict[str, Tensor]:
        start = len(self.prefix)
        return {name[start:]: t for name, t in self.tensors.items() if name.startswith(self.prefix)}


def tensors(path: Path, key: str = "checkpoint") -> dict[str, Tensor]:
    """The weights in a file as they are named there; UserError where there are none, or several sets of them."""
    return _choose(_candidates(load(path, key), f"{key}={path}"), f"{key}={path}").tensors


def load_weights(model: nn.Module, path: Path, key: str = "checkpoint") -> bool:
    """Put the weights in `path` into `model` (a Classifier); a UserError where they do not fit.

    Takes aerl's own checkpoints, and state_dicts of the network alone as training scripts keep them: under some
    key ({"state_dict": ...}), and with one prefix before all names ("module.", "model.", "1."). All tensors of
    the network must be there, of its shapes, and finite; only num_batches_tracked may be missing. What else the
    file holds is not loaded, tensors of another precision are converted, and the log has a line about it. Returns
    whether the file carries its normalisation: a bare state_dict does not, though the network in it may have
    one of its own.
    """
    what, expected = f"{key}={path}", model.state_dict()
    in_run = path.absolute().parent.name == "checkpoints"
    if in_run and (summary := _run(path.absolute().parents[1])) is not None and _unfinished(summary):
        log.warning("%s: is of a run whose training is not finished (status: %s)", what, summary.get("status"))
    net = {name.removeprefix("net."): t for name, t in expected.items() if name.startswith("net.")}
    source = _fitting(_candidates(load(path, key), what), net, what)
    names = {f"net.{name}": source.prefix + name for name in net if source.prefix + name in source.tensors}
    around = source.prefix.removesuffix("net.")
    normalization = {f"normalize.{name}": f"{around}normalize.{name}" for name in ("mean", "std")}
    carries_normalization = around != source.prefix and source.tensors.keys() >= set(normalization.values())
    if carries_normalization:
        names |= normalization
    weights = {name: _converted(source.tensors[own], expected[name], f"{what}: {own}") for name, own in names.items()}
    if carries_normalization and (weights["normalize.std"] <= 0).any():
        raise UserError(f"{what}: {names['normalize.std']} is not greater than 0")
    converted = {str(source.tensors[own].dtype) for name, own in names.items()
                 if source.tensors[own].dtype != expected[name].dtype and not name.endswith(_COUNTER)}  # fmt: skip
    if converted:
        log.warning("%s: %s is converted to the precision of the model", what, ", ".join(sorted(converted)))
    if left_out := sorted(source.tensors.keys() - set(names.values())):
        log.warning("%s: not loaded, %d tensors beside the network: %s", what, len(left_out), ", ".join(left_out[:3]))
    model.load_state_dict(expected | weights)
    return carries_normalization


def _converted(tensor: Tensor, expected: Tensor, what: str) -> Tensor:
    """A tensor of a file as the model needs it; UserError where it is no such tensor."""
    if tensor.shape != expected.shape:
        raise UserError(
            f"{what} is {tuple(tensor.shape)}, in the model {tuple(expected.shape)}; "
            "choose the model= and dataset= (classes, channels, size) it was trained with"
        )
    if tensor.is_floating_point() != expected.is_floating_point() and not what.endswith(_COUNTER):
        raise UserError(f"{what} is {tensor.dtype}, in the model {expected.dtype}; save it as that")
    converted = tensor.to(expected.dtype)
    wrong = ~converted.isfinite() & expected.isfinite().cpu()  # a mask may be made of infinities
    if wrong.any():
        raise UserError(f"{what} has {int(wrong.sum())} values that are not finite; these weights are of no use")
    return converted


def _candidates(state: Any, what: str) -> list[_Weights]:
    """Every dictionary with tensors by name in what a file holds; UserError where there is none."""
    candidates, seen = [], set()
    queue: list[tuple[tuple[str, ...], Any]] = [((), state)]
    for keys, node in queue:
        if not isinstance(node, dict) or id(node) in seen or len(keys) > _LEVELS:
            continue
        seen.add(id(node))
        named = {name: value for name, value in node.items() if isinstance(name, str)}
        if own := {name: t.detach() for name, t in named.items() if isinstance(t, Tensor) and _is_plain(t)}:
            candidates.append(_Weights(keys, own))
        queue += [((*keys, name), value) for name, value in named.items()]
    if not candidates:
        raise UserError(f"{what}: is neither one of aerl's checkpoints nor a state_dict")
    return candidates


def _is_plain(tensor: Tensor) -> bool:
    """Dense, and not an expanded tensor of which a few bytes declare any number of values."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and (tensor.nbytes <= _LARGE or tensor.nbytes <= tensor.untyped_storage().nbytes())


def _choose(candidates: list[_Weights], what: str) -> _Weights:
    """The one of several that a training script means as its result; UserError where that is not clear."""
    usual = [candidate for candidate in candidates if candidate.keys and set(candidate.keys) <= set(_WRAPPERS)]
    usual = usual or [candidate for candidate in candidates if not candidate.keys] or candidates
    first, *others = usual
    mine = first.bare()
    for other in others:
        theirs = other.bare()
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise UserError(f"{what}: holds several sets of weights ({', '.join(map(str, usual))}); save one alone")
    if ignored := [str(candidate) for candidate in candidates if candidate not in usual]:
        log.warning("%s: the weights are taken from %s, not from %s", what, first, ", ".join(ignored))
    return first


def _fitting(candidates: list[_Weights], net: Mapping[str, Tensor], what: str) -> _Weights:
    """Where, and behind which prefix, the file has the network's names: all of them and no others."""
    needed = [name for name in net if not name.endswith(_COUNTER)]
    anchor = next(iter(needed), "")
    fitting, nearest = [], (len(needed) + 1, "", 0, "")
    for candidate in candidates:
        starts = {name.removesuffix(anchor) for name in candidate.tensors if f".{name}".endswith(f".{anchor}")}
        for prefix in sorted(starts) or [""]:
            weights = candidate._replace(prefix=prefix)
            names = weights.bare().keys()
            missing = [name for name in needed if name not in names]
            unknown = sorted(name for name in names - net.keys() if not _BESIDE.search(name))
            if missing or unknown:
                faults = (len(missing), missing[0] if missing else "", len(unknown), unknown[0] if unknown else "")
                nearest = min(nearest, faults)
            else:
                fitting.append(weights)
    same = [w for w in fitting if all(w.tensors[w.prefix + name].shape == net[name].shape for name in needed)]
    if fitting:
        return _choose(same or fitting, what)
    parts = [f"{nearest[0]} of the network's {len(net)} tensors are missing ({nearest[1]})"] if nearest[0] else []
    parts += [f"{nearest[2]} of the file's are unknown ({nearest[3]})"] if nearest[2] else []
    raise UserError(f"{what}: is of another architecture: {', '.join(parts)}; choose the model= it was trained with")
