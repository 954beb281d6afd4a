"""Save and load, atomically, without executing what a file contains."""

import difflib
import hashlib
import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aerl.hub import local
from aerl.runtime.files import atomic_write, inside, sha256
from aerl.tracking.results import read_summary
from aerl.types import UserError, first_line

log = logging.getLogger("aerl")

# Under which key a training script keeps the weights; a file may hold others besides, such as ema_state_dict.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "net")
# Under which key our own files keep the digest of the rest.
_DIGEST = "aerl.sha256"
_COUNTER = "num_batches_tracked"  # of BatchNorm: torch, too, does without it
# What is more than a checkpoint is: numbers and texts, dictionaries in each other, bytes of one expanded tensor.
_VALUES = 1_000_000
_LEVELS = 10
_LARGE = 2**30
# What a module around a network holds beside it: the statistics of its normalisation, and what its loss needs.
_STATISTICS = re.compile(r"(?:^|[._])(?<!running_)(mean|mu|std|sigma)$")
_LOSS = re.compile(r"(criterion|loss)\w*\.")


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain containers) atomically: a killed process leaves the old file or the new.

    A digest of the content is written with it, which `load` compares. Raises UserError where the disk refuses;
    the old file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: torch.save({**state, _DIGEST: digest(state)}, file))


def load(path: Path, key: str = "checkpoint") -> Any:
    """Read tensors and plain containers; `weights_only` refuses anything that would run code.

    A `.safetensors` file cannot hold such a thing. What `save` wrote must have its digest, a file of
    `torch.save` from elsewhere the checksums of the archive that it is. Weights that a run or an export has left
    must be those that its summary.json records; where it records none, as runs of earlier versions did, they
    are taken as they are. What cannot be read is a UserError about the `key` that named it, here and in the
    functions below.
    """
    try:
        if (recorded := _recorded(path)) is not None:
            check(path, recorded, f"{key}={path}")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        intact = _whole_archive(path)
        if intact:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and _DIGEST in state:
                intact = state.pop(_DIGEST) == digest(state)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{key}={path}: no such file") from None
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror or first_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{key}={path}: holds something other than tensors and plain containers, which is not loaded; "
            "save the model's state_dict() instead"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise depends on where it is damaged
        kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
        raise UserError(f"{key}={path}: damaged or not a {kind} file ({first_line(error)})") from error
    if not intact:
        raise UserError(
            f"{key}={path}: is damaged, its content is not what was saved; restore it, or repeat with "
            "overwrite=true the command that wrote it"
        )
    return state


def _whole_archive(path: Path) -> bool:
    """Whether the archive that torch.save writes has the checksums in it, which torch does not compare."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # the format before torch 1.6, which has none
            return True
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it states more bytes than it has; torch.save does not compress")
        # torch.serialization.set_crc32_options(False) writes zeros.
        return not any(member.CRC for member in members) or archive.testzip() is None


def digest(state: Any) -> str:
    """The SHA-256 of containers, numbers, texts and tensors, in the order in which they are kept.

    Raises ValueError for what does not end, such as a dictionary that holds itself, or is larger than its storage.
    """
    digest, rest, count = hashlib.sha256(), [state], 0
    while rest:
        node = rest.pop()
        count += 1
        if count > _VALUES:
            raise ValueError(f"more than {_VALUES:,} values: does it hold itself?")
        if isinstance(node, dict):
            digest.update(f"dict {len(node)}\n".encode())
            rest += [part for item in reversed(node.items()) for part in reversed(item)]
        elif isinstance(node, list | tuple):
            digest.update(f"{'list' if isinstance(node, list) else 'tuple'} {len(node)}\n".encode())
            rest += reversed(node)
        elif isinstance(node, Tensor):
            tensor = node.detach().cpu()
            tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
            if not _is_plain(tensor):
                raise ValueError(f"a tensor of {tuple(tensor.shape)} in {tensor.untyped_storage().nbytes()} bytes")
            digest.update(f"tensor {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{type(node).__name__} {node!r}\n".encode())
    return digest.hexdigest()


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
    weights = (_run(folder) or {}).get("weights")
    if not isinstance(weights, dict) or weights.get("file") != path.relative_to(folder).as_posix():
        return None
    return str(weights.get("sha256"))


def _run(folder: Path) -> dict[str, Any] | None:
    """The summary of a run folder or an export; None for another folder."""
    return read_summary(folder) if (folder / "config.yaml").is_file() else None


def _unfinished(summary: Mapping[str, Any]) -> bool:
    """Whether the training of a run has not come to its end, which is when its weights are recorded."""
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
    if summary is None:
        if not file.is_file():
            raise UserError(
                f"{what}: is no run folder, which has a summary.json and a config.yaml; name a file of weights"
            )
        return inside(path, file)
    inside(path, path / "config.yaml")
    weights = summary.get("weights")
    if not isinstance(weights, dict) or weights.get("file") != file.name:
        file = path / "checkpoints/best.pt"
        if summary.get("trainer") == "none":
            raise UserError(
                f"{what}: trained nothing and has no weights of its own; it judged those of "
                f"checkpoint={summary.get('checkpoint')}"
            )
        if _unfinished(summary):
            raise UserError(
                f"{what}: its training is not finished (status: {summary.get('status')}); the command that began it "
                f"goes on with it. {path / 'checkpoints/last.pt'} names the weights as they are"
            )
    if not file.is_file():
        raise UserError(
            f"{what}: {file} is missing; restore it, or repeat with overwrite=true the command that made it"
        )
    return inside(path, file)


@dataclass(frozen=True, eq=False)
class _Place:
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
    return _chosen(_places(load(path, key), f"{key}={path}"), f"{key}={path}").tensors


def load_weights(model: nn.Module, path: Path, key: str = "checkpoint") -> bool:
    """Put the weights in `path` into `model` (a Classifier); a UserError where they do not fit.

    Takes aerl's own checkpoints, and state_dicts of the network alone as training scripts keep them: under some
    key ({"state_dict": ...}), and with one prefix before all names ("module.", "model.", "1."). All tensors of
    the network must be there, of its shapes, and finite; only num_batches_tracked may be missing. What else the
    file holds is left out, tensors of another precision are converted, and a line of the log says so. Returns
    whether the file carries its normalisation: a bare state_dict does not, though the network in it may have
    one of its own.
    """
    what, expected = f"{key}={path}", model.state_dict()
    _log_unfinished(path, what)
    net = {name.removeprefix("net."): t for name, t in expected.items() if name.startswith("net.")}
    place = _fitting(_places(load(path, key), what), net, what)
    taken = {f"net.{name}": place.prefix + name for name in net if place.prefix + name in place.tensors}
    around = place.prefix.removesuffix("net.")
    normalization = {f"normalize.{name}": f"{around}normalize.{name}" for name in ("mean", "std")}
    carries_normalization = around != place.prefix and place.tensors.keys() >= set(normalization.values())
    if carries_normalization:
        taken |= normalization
    weights = {n: _converted(place.tensors[there], expected[n], f"{what}: {there}") for n, there in taken.items()}
    if carries_normalization and (weights["normalize.std"] <= 0).any():
        raise UserError(f"{what}: {taken['normalize.std']} is not greater than 0")
    kinds = {str(place.tensors[there].dtype).removeprefix("torch.") for n, there in taken.items()
             if place.tensors[there].dtype != expected[n].dtype and not n.endswith(_COUNTER)}  # fmt: skip
    if kinds:
        log.warning("%s: holds %s, converted to the precision of the model", what, ", ".join(sorted(kinds)))
    weights = expected | weights
    _log_left_out({n: t for n, t in place.tensors.items() if n not in taken.values()}, weights, what)
    model.load_state_dict(weights)
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
    wrong = ~converted.isfinite()
    if wrong.any() and (wrong & expected.isfinite().cpu()).any():  # a mask may be made of infinities
        raise UserError(f"{what} has {int(wrong.sum())} values that are not finite; these weights are of no use")
    return converted


def _places(state: Any, what: str) -> list[_Place]:
    """Every dictionary with tensors by name in what a file holds; UserError where there is none."""
    places, seen = [], set()
    queue: list[tuple[tuple[str, ...], Any]] = [((), state)]
    for keys, node in queue:
        if not isinstance(node, dict) or id(node) in seen or len(keys) > _LEVELS:
            continue
        seen.add(id(node))
        named = {name: value for name, value in node.items() if isinstance(name, str)}
        found = {name: t.detach() for name, t in named.items() if isinstance(t, Tensor) and _is_plain(t)}
        if found:
            places.append(_Place(keys, found))
        queue += [((*keys, name), value) for name, value in named.items()]
    if not places:
        raise UserError(f"{what}: is neither one of aerl's checkpoints nor a state_dict")
    return places


def _is_plain(tensor: Tensor) -> bool:
    """Whether it has values, densely kept: of an expanded tensor a few bytes can declare any number."""
    dense = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return dense and (tensor.nbytes <= _LARGE or tensor.nbytes <= tensor.untyped_storage().nbytes())


def _chosen(places: list[_Place], what: str) -> _Place:
    """The one of several that a training script means as its result; UserError where that is not clear."""
    usual = [place for place in places if place.keys and all(key in _WRAPPERS for key in place.keys)]
    usual = usual or [place for place in places if not place.keys] or places
    first, *others = usual
    mine = first.bare()
    for other in others:
        theirs = other.bare()
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise UserError(f"{what}: holds several sets of weights ({', '.join(map(str, usual))}); save one alone")
    if left := [str(place) for place in places if place not in usual]:
        log.warning("%s: the weights are taken from %s, not from %s", what, first, ", ".join(left))
    return first


def _fitting(places: list[_Place], net: Mapping[str, Tensor], what: str) -> _Place:
    """The place and the prefix under which the names of the network occur, all of them and no others."""
    needed = {name for name in net if not name.endswith(_COUNTER)}
    counted = []
    for place in places:
        parts = [(name[:at], name[at:]) for name in place.tensors for at in _starts(name)]
        counts = Counter(prefix for prefix, name in parts if name in needed)
        counted += [(count, replace(place, prefix=prefix)) for prefix, count in (counts or {"": 0}).items()]
    fitting = [place for count, place in counted if count == len(needed) and not _unknown(place, net)]
    same = [p for p in fitting if all(p.tensors[p.prefix + n].shape == net[n].shape for n in needed)]
    if fitting:
        return _chosen(same or fitting, what)
    nearest = max(counted, key=lambda pair: pair[0])[1]
    missing = [name for name in net if name in needed and nearest.prefix + name not in nearest.tensors]
    unknown = _unknown(nearest, net)
    faults = []
    if missing:
        near = difflib.get_close_matches(missing[0], list(nearest.tensors)[:1000], n=1, cutoff=0)
        faults.append(
            f"{len(missing)} of the network's {len(net)} tensors are missing (the first is {missing[0]}; the nearest "
            f"name in the file is {near[0]})"
        )
    if unknown:
        faults.append(f"{len(unknown)} of the file's {len(nearest.tensors)} are unknown ({unknown[0]})")
    raise UserError(f"{what}: is of another architecture: {', '.join(faults)}; choose the model= it was trained with")


def _starts(name: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer(r"\.", name))]


def _unknown(place: _Place, net: Mapping[str, Tensor]) -> list[str]:
    """The names behind the prefix that the network lacks, but for what a module around it may hold beside it."""
    return [
        place.prefix + name
        for name in place.bare()
        if name not in net and not _STATISTICS.search(name) and not _LOSS.match(name)
    ]


def _log_left_out(left: Mapping[str, Tensor], model: Mapping[str, Tensor], what: str) -> None:
    """Say which tensors of a file are not taken, and of a normalisation that the model's is not, which it is."""
    channels, statistics = model["normalize.mean"].numel(), {}
    for name, tensor in left.items():
        if (match := _STATISTICS.search(name)) and tensor.numel() in (1, channels):
            kind = "mean" if match[1] in ("mean", "mu") else "std"
            values = tensor.reshape(-1).float()
            if not torch.allclose(values, model[f"normalize.{kind}"].reshape(-1).cpu(), atol=1e-4):
                text = ",".join(f"{value:.6g}" for value in values.tolist())
                statistics[name] = f"model.{kind}=[{text}]"
    if statistics:
        log.warning("%s: the file also holds %s: if that is its normalisation, state %s", what,
                    ", ".join(statistics), " ".join(statistics.values()))  # fmt: skip
    if others := [name for name in left if name not in statistics]:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        log.warning("%s: left out, as not of the network: %s%s", what, ", ".join(others[:3]), more)


def _log_unfinished(path: Path, what: str) -> None:
    path = path.absolute()
    summary = _run(path.parents[1]) if path.parent.name == "checkpoints" else None
    if summary is not None and _unfinished(summary):
        log.warning("%s: is of a run whose training is not finished (status: %s)", what, summary.get("status"))
