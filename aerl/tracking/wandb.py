"""Weights & Biases. It never decides whether a run lives."""

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from aerl.config.names import shortened
from aerl.runtime import signals
from aerl.runtime.files import atomic_write, sha256
from aerl.tracking.results import plain
from aerl.types import first_line

log = logging.getLogger("aerl")
T = TypeVar("T")

Mode = Literal["auto", "online", "offline", "disabled"]

_CALL_SECONDS = 60.0  # for one call of W&B
_TEARDOWN_SECONDS = 30.0  # for its session to end, before its service is killed
_STOPPING_SECONDS = 10.0  # for either once the run is to end


def _bounded(action: Callable[[], T], seconds: float) -> T:
    """What `action` returns or raises; TimeoutError after `seconds`.

    In a thread: signals are handled meanwhile, and a call that hangs does not keep the process from ending.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    began = time.monotonic()
    thread.start()
    while thread.is_alive() and time.monotonic() - began < seconds:
        thread.join(0.5)
        if signals.received():
            seconds = min(seconds, _STOPPING_SECONDS)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _teardown(wandb: Any) -> None:
    """End W&B's session: the next run of this process would get it, or it would keep this one from ending."""
    service: Any = None
    with contextlib.suppress(Exception):  # private to W&B
        service = wandb.sdk.wandb_setup._singleton._connection._proc._process
    try:
        _bounded(lambda: wandb.teardown(exit_code=1), _TEARDOWN_SECONDS)
    except Exception:
        if service is not None:
            service.kill()


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What W&B reads from environment variables alone: it stages uploads in the run folder, and is silent.

    Its reports of its own errors are off: a server that stalls would hold up the end of the process.
    """
    wanted = {"WANDB_DATA_DIR": str(folder / "wandb"), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    if not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 (Path.home may raise)
        wanted["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")  # W&B would log to the terminal
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class Tracker:
    """One W&B run. No method raises: the first failure warns once and ends this run's W&B record.

    `mode` is "online", "offline", or "interrupted" once W&B has failed.
    """

    def __init__(self, wandb: Any, run: Any, folder: Path, mode: str, finish_timeout: float = 60.0) -> None:
        self._wandb, self._run, self._folder, self._finish_timeout = wandb, run, folder, finish_timeout
        self.mode = mode
        self._path = os.path.relpath(run.settings.sync_dir, folder)
        self._url: str | None = run.url if mode == "online" else None
        # Epochs, not W&B's own count of calls, are the x axis: a resumed run continues where it was.
        self._call(lambda run: run.define_metric("epoch", hidden=True))
        self._call(lambda run: run.define_metric("train/*", step_metric="epoch"))
        self._call(lambda run: run.define_metric("val/*", step_metric="epoch"))

    def where(self) -> dict[str, str | None]:
        """For summary.json: `mode`, `path` (W&B's files, relative to the run folder), `url` (or None)."""
        return {"mode": self.mode, "path": self._path, "url": self._url}

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of epoch `step`, such as train/loss or val/accuracy."""
        self._call(lambda run: run.log({"epoch": step, **metrics}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values, the columns of W&B's table of runs; later ones replace earlier ones."""
        self._call(lambda run: run.summary.update(plain(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; its cells may be numbers, text and None."""
        data = [plain(list(row)) for row in rows]
        self._call(
            lambda run: run.log({name: self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})
        )

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        """Captioned pictures: each a file's path or an array (H, W) or (H, W, 3), uint8."""
        self._call(lambda run: run.log({name: [self._wandb.Image(data, caption=text) for text, data in pictures]}))

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

        Its metadata include the SHA-256 of each file. Only those `changing` later are copied: the others must stay
        as they are until the run is uploaded.
        """

        def add(run: Any) -> None:
            digests = {stored: sha256(path) for stored, path in files.items()}
            artifact = self._wandb.Artifact(name, type=kind, metadata=plain({**metadata, "sha256": digests}))
            for stored, path in files.items():
                policy = "mutable" if stored in changing else "immutable"
                artifact.add_file(str(Path(path).resolve()), stored, policy=policy, skip_cache=True)
            if used:  # run.use_artifact refuses offline, and waits for the server without a limit
                run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            else:
                run.log_artifact(artifact)

        self._call(add)

    def finish(self, exit_code: int = 0) -> None:
        """Close the W&B run, as failed unless `exit_code` is 0. Call it before `where` is written down."""
        self._call(lambda run: run.finish(exit_code=exit_code), self._finish_timeout + _TEARDOWN_SECONDS)
        self._run = None

    def _call(self, action: Callable[[Any], object], seconds: float = _CALL_SECONDS) -> None:
        if (run := self._run) is None:
            return
        try:
            with _environment(self._folder):
                _bounded(lambda: action(run), seconds)
        except Exception as error:
            self._run, self.mode = None, "interrupted"
            log.warning(
                "W&B stopped (%s): the results are in %s, what W&B has so far in %s",
                first_line(error), self._folder / "results.jsonl", self._folder / self._path,
            )  # fmt: skip
            _teardown(self._wandb)


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
    """Open the W&B run of a run folder, or resume it; None where W&B is off or does not work.

    "auto" is what W&B's own settings say (WANDB_MODE, `wandb offline`), and offline where W&B finds no key. Nothing is
    ever asked. Offline data stay inside the run folder. A server that is not reached within `init_timeout` seconds
    means offline too, and at the end W&B is waited for during at most `finish_timeout` seconds.
    """
    if mode == "disabled":
        return None
    folder = Path(folder).resolve()
    options = {
        "dir": str(folder),
        "project": project,
        "entity": entity,
        # W&B's server refuses longer ones, and the run with them.
        "group": group and shortened(group, 128),
        "job_type": job_type and shortened(job_type, 64),
        "name": shortened(name or run_id, 128),
        "tags": list(dict.fromkeys(shortened(tag, 64) for tag in tags if tag)),
        "config": plain(config or {}),
        "resume": "allow",
        "reinit": "finish_previous",  # the default would return the open run of a crashed job
    }
    wandb: Any = None
    try:
        with _environment(folder):
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                init_timeout=init_timeout,
                finish_timeout=finish_timeout,
                finish_timeout_raises=True,
                **({} if mode == "auto" else {"mode": mode}),
            )
            options |= {"id": _wandb_id(folder, run_id), "settings": settings}
            run, started = _bounded(lambda: _start(wandb, mode, options), _CALL_SECONDS + init_timeout)
        return Tracker(wandb, run, folder, started, finish_timeout) if run is not None else None
    except Exception as error:
        if isinstance(error, TimeoutError):
            _teardown(wandb)
        log.warning("W&B is off (%s): results are in %s only", first_line(error), folder / "results.jsonl")
        return None


def _start(wandb: Any, mode: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The started run and its mode: offline where nobody is logged in or the server is out of reach."""
    session = wandb.setup(options["settings"]).settings
    if session._noop:
        return None, "disabled"
    if not session._offline:
        try:
            if wandb.login(prompt=False, verify=False):
                return wandb.init(mode="online", **options), "online"
            if mode == "online":
                log.warning("W&B has no key (WANDB_API_KEY, or run `wandb login`): this run is recorded offline")
        except Exception as error:
            log.warning("W&B cannot be used online (%s): this run is recorded offline", first_line(error))
            with contextlib.suppress(Exception):  # only a new session starts the same run a second time
                wandb.teardown()
            wandb.setup(options["settings"])
    return wandb.init(mode="offline", **options), "offline"


def logged_in() -> bool:
    """Whether W&B finds credentials."""
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return bool(wandb.login(prompt=False, verify=False))


def _wandb_id(folder: Path, run_id: str) -> str:
    """The id of this folder's W&B run: the run's own and a random tail, drawn once and stored in the folder.

    Without the tail, the same command on another machine would write into the same W&B run.
    """
    path = folder / "wandb" / "id"
    if not path.exists():
        name = shortened(re.sub(r"[^0-9A-Za-z_.-]+", "-", run_id), 64)  # of 128: names of artifacts contain it
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, f"{name}-{secrets.token_hex(3)}\n")
    return path.read_text().strip()


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
