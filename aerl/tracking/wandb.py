"""Weights & Biases, which never decides whether a run lives."""

import contextlib
import logging
import netrc
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

from aerl.runtime import signals
from aerl.runtime.files import atomic_write, sha256
from aerl.tracking.results import plain
from aerl.types import UserError, first_line, shortened

log = logging.getLogger("aerl")
T = TypeVar("T")


Mode = Literal["auto", "online", "offline", "disabled"]


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
        if signals.received():
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
        self._guard(lambda run: run.summary.update(plain(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; its cells may be numbers, text and None."""
        data = [plain(list(row)) for row in rows]
        self._guard(
            lambda run: run.log({name: self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})
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
            told = plain({**metadata, "sha256": digests})
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
            "config": plain(config or {}),
            "resume": "allow",
            "reinit": "finish_previous",  # the default would hand back the open run of a crashed job
        }
        with _kept_in(folder):
            run, started = _bounded(lambda: _start(wandb, settings, wanted, options), _SECONDS_OF_A_CALL + init_timeout)
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


def log_accuracies(tracker: Tracker, summary: Mapping[str, Any]) -> None:
    """The closing table of a run, and the numbers by which W&B sorts and plots runs."""
    attacks = summary["attacks"]
    accuracies = {"clean": summary["clean_accuracy"]}
    accuracies |= {name: info["robust_accuracy"] for name, info in attacks.items()}
    if summary["worst_case_accuracy"] is not None:
        accuracies["worst case"] = summary["worst_case_accuracy"]
    tracker.summary({f"accuracy/{name.replace(' ', '_')}": value["value"] for name, value in accuracies.items()})
    columns = ["attack", "norm", "eps", "seconds", "accuracy", "low", "high", "n"]
    rows = [
        [name, *(attacks.get(name, {}).get(key) for key in columns[1:4]), *(value[k] for k in ("value", *columns[5:]))]
        for name, value in accuracies.items()
    ]
    tracker.table("tables/attacks", columns, rows)
