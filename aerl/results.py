"""Where a run's numbers go: `results.jsonl` first, Weights & Biases second.

Every number is on the disk, flushed, before W&B hears of it, and W&B never decides whether a run lives:
its first failure costs one warning and the rest of its own record, nothing else. Files that are replaced
are replaced atomically. This module imports neither torch nor, until a tracker is opened, wandb.
"""

import contextlib
import hashlib
import json
import logging
import math
import netrc
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from aerl import interrupt
from aerl.files import atomic_write, inside, read_json, read_yaml, sha256, writing
from aerl.types import UserError, first_line, shortened

log = logging.getLogger("aerl")
T = TypeVar("T")

Mode = Literal["auto", "online", "offline", "disabled"]


@dataclass(frozen=True)
class Result:
    """One measured number, one line of results.jsonl.

    `n` is the number of samples behind `value`, `step` the epoch (None for what is measured once),
    `eps` is in the [0, 1] scale of the images, `source` names the model a transferred attack was made on,
    or the run that this one is compared with.
    JSON knows no NaN and no infinity: such a value is written as null, and null is read back as NaN.
    """

    metric: str
    value: float
    n: int
    split: str
    run_id: str
    seed: int
    dataset: str
    model: str
    trainer: str
    attack: str = "none"
    norm: str = ""
    eps: float = 0.0
    source: str = ""
    step: int | None = None


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays become lists, paths text, and what is not finite null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy and torch, without importing them
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as indented JSON; a number that is not finite becomes null."""
    atomic_write(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` of a run folder atomically, with a seal over its content that `read_summary` checks."""
    plain = {key: value for key, value in _plain(summary).items() if key != "seal"}
    write_json(Path(folder) / "summary.json", {**plain, "seal": _seal(plain)})


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The `summary.json` of a run folder, or None where there is none.

    Raises UserError where it is damaged, or is not as it was written.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        return None
    summary = read_json(inside(Path(folder), path))
    if not isinstance(summary, dict):
        raise UserError(f"cannot read {path}: it holds no summary of a run")
    seal = summary.pop("seal", None)
    if (seal is not None or "analyses" in summary) and seal != _seal(summary):  # earlier versions sealed none
        raise UserError(f"{path}: is not as aerl wrote it: it was changed, or is damaged; restore it")
    return summary


def _seal(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run folder; UserError where it is damaged, or is not the one summary.json records."""
    path = Path(folder) / "config.yaml"
    config = read_yaml(inside(Path(folder), path))
    if not isinstance(config, dict):
        raise UserError(f"cannot read {path}: it holds no configuration")
    if changed_files(folder, read_summary(folder) or {}, ["config.yaml"]):
        raise UserError(f"{path}: is not as aerl wrote it: it was changed, or is damaged; restore it")
    return config


def changed_files(folder: Path, summary: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Which files of a run are missing, or are not those that its summary records; of `names`, or all."""
    recorded: Mapping[str, str] = summary.get("files") or {}
    return [name for name in names or recorded if name in recorded and not _is(folder / name, recorded[name])]


def _is(path: Path, digest: str) -> bool:
    try:
        return sha256(path) == digest
    except OSError:
        return False


# ------------------------------------------------------------------------------------------ intervals


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a proportion, within [0, 1]; (0, 1) where nothing was measured.

    Unlike value +- z * standard error it has a width at 0 and at `n` successes, where a robust accuracy
    often lies. Raises ValueError unless 0 <= successes <= n and 0 < confidence < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} samples")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The two ends that are known exactly are said exactly, whatever the rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def proportion(successes: float, n: int) -> dict[str, float]:
    """How summary.json states an accuracy: `value`, its 95 % interval `low` to `high`, and `n`.

    `successes` may be a sum of rewards in [0, 1]: the interval is then too wide if anything, since no
    variable in [0, 1] has a larger variance than the one that is only 0 or 1.
    """
    low, high = wilson(successes, n)
    return {"value": successes / n if n else math.nan, "low": low, "high": high, "n": n}


def eps_text(eps: float) -> str:
    """An eps as people write it: 0.5 as it is, 0.0313725 as 8/255."""
    levels, short = eps * 255, f"{eps:.4g}"
    return f"{levels:.0f}/255" if float(short) != eps and math.isclose(levels, round(levels)) else short


# ------------------------------------------------------------------------------------------- the record


def _line(result: Result) -> str:
    return json.dumps(_plain(asdict(result)), ensure_ascii=False, allow_nan=False) + "\n"


_FIELDS = frozenset(field.name for field in fields(Result))


def _parse(line: bytes) -> Result:
    """One line as a Result, without fields of a later version; ValueError or TypeError if it is none."""
    stored = json.loads(line)
    if not isinstance(stored, dict):
        raise ValueError("not an object")
    result = Result(**{key: value for key, value in stored.items() if key in _FIELDS})
    return result if result.value is not None else Result(**{**asdict(result), "value": math.nan})


def read_results(path: Path) -> list[Result]:
    """Every Result in `path`; a last line torn by a killed process is passed over.

    Raises UserError where the file cannot be read, or where any other line is not a Result.
    """
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(_parse(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}: line {number} is not a result ({error})") from error
    with contextlib.suppress(ValueError, TypeError):
        results.append(_parse(last))
    return results


class ResultLog:
    """The results of one run folder: every number goes to results.jsonl, then to the tracker, if any.

    `identity` gives each line its `run_id`, `seed`, `dataset`, `model` and `trainer`. Who keeps the state of a run
    keeps the `seal` of its results with it, and comes back to both by `restore`.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        tracker: "Tracker | None" = None,
        *,
        scratch: bool = False,
    ) -> None:
        """`scratch`: of a process whose results nobody reads, and which has none of the earlier starts."""
        self.path = Path(folder) / "results.jsonl"
        self.tracker, self.scratch = tracker, scratch
        self._identity = dict(identity)

    def log(
        self,
        metrics: Mapping[str, float],
        *,
        n: int,
        split: str,
        step: int | None = None,
        attack: str = "none",
        norm: str = "",
        eps: float = 0.0,
        source: str = "",
    ) -> list[Result]:
        """Store one Result per metric, measured on `n` samples of `split`; they are on the disk on return.

        With a `step` (the epoch) they also become W&B history under `split/metric`, without one a value
        of the W&B summary under `split/attack/metric`. Raises UserError where the disk refuses.
        """
        results = [
            Result(metric, float(value), n, split, **self._identity,
                   attack=attack, norm=norm, eps=float(eps), source=source, step=step)
            for metric, value in metrics.items()
        ]  # fmt: skip
        with writing(self.path), self.path.open("ab") as file:
            file.write("".join(map(_line, results)).encode())
            file.flush()
            os.fsync(file.fileno())
        if self.tracker is not None:
            prefix = split if attack == "none" else f"{split}/{attack}"
            named = {f"{prefix}/{result.metric}": result.value for result in results}
            if step is None:
                self.tracker.summary(named)
            else:
                self.tracker.history(step, named)
        return results

    def seal(self) -> dict[str, Any]:
        """What `restore` comes back to: the number of `bytes` so far, and their `sha256`."""
        return _sealed(self._read())

    def restore(self, seal: Mapping[str, Any] | None) -> None:
        """Go back to a `seal`, None being the beginning: forget what a resumed run will measure again.

        Raises UserError where what stood before it is not there any more, or was changed.
        """
        if self.scratch:
            return
        content = self._read()
        kept = content[: seal["bytes"] if seal else 0]
        if seal and _sealed(kept) != seal:
            raise UserError(
                f"{self.path}: is not as aerl wrote it: it was changed, or is damaged; restore it, or begin the run "
                "again with overwrite=true"
            )
        if kept != content:
            atomic_write(self.path, kept)

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error


def _sealed(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# ------------------------------------------------------------------------------------ Weights & Biases


# How long a call of W&B is waited for, and then for its session to end before its service is killed.
_SECONDS_OF_A_CALL, _SECONDS_TO_ABANDON = 60.0, 30.0
_SECONDS_AFTER_A_SIGNAL = 10.0  # for any of these once the run is to end


def _bounded(action: Callable[[], T], seconds: float) -> T:
    """What `action` returns or raises; TimeoutError after `seconds`.

    It has a thread of its own: signals are heard meanwhile, and one that hangs, with all threads that it has
    started, does not keep the process from ending.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    began, limit = time.monotonic(), seconds
    thread.start()
    while thread.is_alive() and time.monotonic() - began < limit:
        thread.join(0.5)
        if interrupt.heard():
            limit = min(limit, _SECONDS_AFTER_A_SIGNAL)
    if not outcome:
        raise TimeoutError(f"no answer within {limit:.0f} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _abandon(wandb: Any) -> None:
    """End W&B's session: it would be handed to the next run of this process, or keep this one from ending."""
    service: Any = None
    with contextlib.suppress(Exception):  # a detail of W&B's
        service = wandb.sdk.wandb_setup._singleton._connection._proc._process
    try:
        _bounded(lambda: wandb.teardown(exit_code=1), _SECONDS_TO_ABANDON)
    except Exception:
        if service is not None:
            service.kill()


def _count_in_epochs(run: Any) -> None:
    """Epochs, not W&B's own count of calls, are the x axis: a resumed run goes on where it was."""
    run.define_metric("epoch", hidden=True)
    for split in ("train", "val"):
        run.define_metric(f"{split}/*", step_metric="epoch")


class Tracker:
    """One W&B run. No method raises: the first failure warns once and ends this run's W&B record.

    `mode` is "online", "offline", or "interrupted" once W&B has failed.
    """

    def __init__(self, wandb: Any, run: Any, folder: Path, mode: str, finish_timeout: float = 60.0) -> None:
        self._wandb, self._run, self._folder, self._finish_timeout = wandb, run, folder, finish_timeout
        self.mode = mode
        self._path = os.path.relpath(run.settings.sync_dir, folder)
        self._url: str | None = run.url if mode == "online" else None
        self._guard(_count_in_epochs)

    def where(self) -> dict[str, str | None]:
        """For summary.json: `mode`, `path` (W&B's files, relative to the run folder), `url` (or None)."""
        return {"mode": self.mode, "path": self._path, "url": self._url}

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of epoch `step`, such as train/loss or val/accuracy."""
        self._guard(lambda run: run.log({"epoch": step, **metrics}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, the columns of W&B's table of runs; later ones replace earlier ones."""
        self._guard(lambda run: run.summary.update(_plain(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; its cells may be numbers, text and None."""
        data = [_plain(list(row)) for row in rows]
        self._guard(
            lambda run: run.log(
                {name: self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)}
            )
        )

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        """Captioned pictures: each a file's path or an array (H, W) or (H, W, 3), uint8."""

        def show(run: Any) -> None:
            images = [
                self._wandb.Image(os.fspath(data) if isinstance(data, os.PathLike) else data, caption=caption)
                for caption, data in pictures
            ]
            run.log({name: images})

        self._guard(show)

    def file(self, path: Path) -> None:
        """Keep a copy of a finished file, such as summary.json, with the W&B run."""
        path = Path(path).resolve()
        self._guard(lambda run: run.save(str(path), base_path=str(path.parent), policy="now"))

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        *,
        used: bool = False,
        changing: Collection[str] = (),
    ) -> None:
        """A version of the artifact `name`: finished `files` by their names in it; with `used` a run's input.

        Its metadata say the SHA-256 of each file beside `metadata`. Only those `changing` later are copied: the
        others must stay where they are, as they are, until the run is uploaded. The same files are the same
        version, whichever run names them.
        """

        def keep(run: Any) -> None:
            digests = {stored: sha256(path) for stored, path in files.items()}
            told = _plain({**metadata, "sha256": digests})
            artifact = self._wandb.Artifact(name, type=kind, metadata=told)
            for stored, path in files.items():
                policy = "mutable" if stored in changing else "immutable"
                artifact.add_file(str(Path(path).resolve()), stored, policy=policy, skip_cache=True)
            if used:
                # What run.use_artifact does with an artifact of ours, less its refusal to do so offline and its
                # wait, without a limit, for the server.
                run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            else:
                run.log_artifact(artifact)

        self._guard(keep)

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run, as failed unless `exit_code` is 0. Call it before `where` is written down."""
        self._guard(lambda run: run.finish(exit_code=exit_code), self._finish_timeout + _SECONDS_TO_ABANDON)
        self._run = None

    def _guard(self, action: Callable[[Any], object], seconds: float = _SECONDS_OF_A_CALL) -> None:
        if (run := self._run) is None:
            return
        try:
            with _kept_in(self._folder):
                _bounded(lambda: action(run), seconds)
        except Exception as error:
            self._run, self.mode = None, "interrupted"
            log.warning(
                "W&B stopped (%s): the results are in %s, what W&B has so far in %s",
                first_line(error), self._folder / "results.jsonl", self._folder / self._path,
            )  # fmt: skip
            _abandon(self._wandb)


def open_tracker(
    mode: Mode,
    folder: Path,
    run_id: str,
    *,
    project: str = "aerl",
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    init_timeout: float = 15.0,
    finish_timeout: float = 60.0,
) -> Tracker | None:
    """Open the W&B run of a run folder, or go on with it; None where W&B is off or does not work.

    "auto" is what WANDB_MODE or `wandb offline` says, else online where there is a key (WANDB_API_KEY, a
    netrc entry, W&B's settings file) and offline where there is none. Nothing is ever asked. Offline
    data stay inside the run folder. A server that is not reached within `init_timeout` seconds means
    offline too, and at the end W&B is waited for during `finish_timeout` seconds at the most. A service that does
    not answer at all is given up after a minute, and killed half a minute later.
    """
    if mode not in get_args(Mode):
        raise UserError(f"logger.mode={mode}: must be one of {', '.join(get_args(Mode))}")
    wanted = _from_environment() if mode == "auto" else mode
    if wanted == "disabled":
        return None
    folder = Path(folder).resolve()
    try:
        import wandb

        _without_telemetry()
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            init_timeout=init_timeout,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
        )
        options = {
            "dir": str(folder),
            "id": _wandb_id(folder, run_id),
            "project": project,
            "entity": entity,
            # W&B's server refuses longer ones, and the run with them.
            "group": group and shortened(group, 128),
            "job_type": job_type and shortened(job_type, 64),
            "name": shortened(name or run_id, 128),
            "tags": list(dict.fromkeys(shortened(tag, 64) for tag in tags if tag)),
            "config": _plain(config or {}),
            "resume": "allow",
            "reinit": "finish_previous",  # the default would hand back the open run of a crashed job
        }
        with _kept_in(folder):
            run, started = _bounded(
                lambda: _start(wandb, settings, wanted, options), _SECONDS_OF_A_CALL + init_timeout
            )
        return Tracker(wandb, run, folder, started, finish_timeout) if run is not None else None
    except Exception as error:
        if isinstance(error, TimeoutError):
            _abandon(wandb)
        log.warning("W&B is off (%s): results are in %s only", first_line(error), folder / "results.jsonl")
        return None


def _start(wandb: Any, settings: Any, wanted: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The started run and its mode: offline where nobody is logged in or the server is out of reach."""
    session = wandb.setup(settings)  # before init, so that not even the login says a word
    if wanted == "auto":
        wanted = _MODES.get(session.settings.mode, "auto")
        if wanted == "disabled":
            return None, wanted
    if wanted != "offline":
        if _logged_in(session.settings):
            try:
                return wandb.init(mode="online", settings=settings, **options), "online"
            except Exception as error:
                log.warning("W&B cannot be used online (%s): this run is recorded offline", first_line(error))
                # Only a new session starts the same run a second time.
                with contextlib.suppress(Exception):
                    wandb.teardown()
                wandb.setup(settings)
        elif wanted == "online":
            log.warning("W&B has no key (WANDB_API_KEY, or run `wandb login`): this run is recorded offline")
    return wandb.init(mode="offline", settings=settings, **options), "offline"


# "online" is W&B's default, which says nothing about what the user wants.
_MODES = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def _from_environment() -> str:
    mode = os.environ.get("WANDB_MODE", "")
    return "online" if mode in ("online", "run", "shared") else _MODES.get(mode, "auto")


def logged_in() -> bool:
    """Whether W&B will find credentials, as its settings are now."""
    import wandb

    return _logged_in(wandb.setup(wandb.Settings(silent=True)).settings)


def _logged_in(settings: Any) -> bool:
    """Whether W&B will find credentials where it looks for them; if not, it would ask, and wait."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    candidates = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    path = next((path for path in (Path(text).expanduser() for text in candidates) if path.exists()), None)
    try:
        entry = netrc.netrc(path).authenticators(urlsplit(settings.base_url).netloc) if path else None
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def _wandb_id(folder: Path, run_id: str) -> str:
    """The id of this folder's W&B run: the run's own and a random tail, drawn once and kept in the folder.

    Without the tail, the same command on another machine would write into the same W&B run.
    """
    path = folder / "wandb" / "id"
    if path.exists():
        return path.read_text().strip()
    name = shortened(re.sub(r"[^0-9A-Za-z_.-]+", "-", run_id), 64)  # of 128, since names of artifacts hold it
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, f"{name}-{secrets.token_hex(3)}\n")
    return path.read_text().strip()


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let W&B stage its uploads in the run folder, not in the home directory, and read its settings silently.

    Both are said by environment variables alone; one that the user has set stays as it is.
    """
    wanted = {"WANDB_DATA_DIR": str(folder / "wandb"), "WANDB_SILENT": "true"}
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 (Path.home may raise)
        wanted["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # else its log goes to the terminal
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _without_telemetry() -> None:
    """Keep W&B from reporting its own errors: to a server that stalls, that holds up the process's end."""
    with contextlib.suppress(ImportError, AttributeError):  # not in every version
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
