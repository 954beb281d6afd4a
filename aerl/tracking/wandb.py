"""Weights & Biases. No failure of it fails a run."""

import contextlib
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal, TypeVar

from aerl.errors import first_line
from aerl.runtime import signals
from aerl.runtime.files import atomic_write, plain, sha256
from aerl.runtime.terminal import shortened

log = logging.getLogger("aerl")
T = TypeVar("T")

Mode = Literal["auto", "online", "offline", "disabled"]

_INIT_SECONDS = 15.0  # for the server to answer, else the run is recorded offline
_CALL_SECONDS = 60.0  # for one call of W&B
_FINISH_SECONDS = 60.0  # for the upload at the end
_TEARDOWN_SECONDS = 30.0  # for its session to end, before its service is killed
_STOPPING_SECONDS = 10.0  # for any of these once the run is to end


class Tracker:
    """One W&B run. No method raises: the first failure is one warning, and ends this run's W&B record."""

    def __init__(self, wandb: Any, run: Any, folder: Path, mode: str) -> None:
        self._wandb, self._run, self._folder, self.mode = wandb, run, folder, mode
        self._path = os.path.relpath(run.settings.sync_dir, folder)
        self._url: str | None = run.url if mode == "online" else None
        # Epochs, not W&B's own count of calls, are the x axis: a resumed run continues where it was.
        self._call(lambda run: run.define_metric("epoch", hidden=True))
        self._call(lambda run: [run.define_metric(f"{split}/*", step_metric="epoch") for split in ("train", "val")])

    def where(self) -> dict[str, str | None]:
        """For summary.json: `mode` (online, offline, interrupted), `path` of W&B's files in the run folder, `url`."""
        return {"mode": self.mode, "path": self._path, "url": self._url}

    def history(self, step: int, metrics: Mapping[str, float]) -> None:
        """Values of epoch `step`."""
        self._call(lambda run: run.log({"epoch": step, **metrics}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values: the columns of W&B's table of runs."""
        self._call(lambda run: run.summary.update(plain(values)))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of numbers, text and None."""
        table = {"columns": list(columns), "data": plain(rows), "allow_mixed_types": True}
        self._call(lambda run: run.log({name: self._wandb.Table(**table)}))

    def pictures(self, name: str, pictures: Sequence[tuple[str, Any]]) -> None:
        """Captioned pictures: paths or arrays (H, W) or (H, W, 3), uint8."""
        self._call(lambda run: run.log({name: [self._wandb.Image(data, caption=text) for text, data in pictures]}))

    def artifact(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any], *, used: bool = False
    ) -> None:
        """A version of the artifact `name`: `files` by their names in it; with `used` an input of the run.

        Its metadata include the SHA-256 of each file. All but summary.json must stay unchanged until they are uploaded.
        """

        def add(run: Any) -> None:
            digests = {stored: sha256(path) for stored, path in files.items()}
            artifact = self._wandb.Artifact(name, type=kind, metadata=plain({**metadata, "sha256": digests}))
            for stored, path in files.items():
                policy = "mutable" if stored == "summary.json" else "immutable"  # whether W&B copies it
                artifact.add_file(str(path.resolve()), stored, policy=policy, skip_cache=True)
            if used:  # run.use_artifact refuses offline, and waits for the server without a limit
                run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
            else:
                run.log_artifact(artifact)

        self._call(add)

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, as failed unless `exit_code` is 0."""
        self._call(lambda run: run.finish(exit_code=exit_code), _FINISH_SECONDS + _TEARDOWN_SECONDS)
        self._run = None

    def _call(self, action: Callable[[Any], object], seconds: float = _CALL_SECONDS) -> None:
        if (run := self._run) is None:
            return
        try:
            with _environment(self._folder):
                _bounded(lambda: action(run), seconds)
        except Exception as error:
            self._run, self.mode = None, "interrupted"
            log.warning("W&B stopped (%s): results are in %s", first_line(error), self._folder / "results.jsonl")
            _teardown(self._wandb)


def open_tracker(
    mode: Mode, folder: Path, run_id: str, *, group: str, name: str, tags: Sequence[str], config: Any, **options: Any
) -> Tracker | None:
    """Open the W&B run of a run folder, or resume it; None if W&B is off or does not work.

    "auto" follows W&B's own settings (WANDB_MODE, `wandb offline`), and is offline without a key or a server; nothing
    is ever asked. Offline data stay inside the run folder. `options` are those of wandb.init.
    """
    if mode == "disabled":
        return None
    folder = Path(folder).resolve()
    wandb: Any = None
    try:
        with _environment(folder):
            import wandb

            settings = wandb.Settings(
                silent=True, console="off", save_code=False, disable_code=True, init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True,
                **({} if mode == "auto" else {"mode": mode}),
            )  # fmt: skip
            options |= {
                "id": _wandb_id(folder, run_id),
                "dir": str(folder),
                # W&B's server refuses longer names, and the run with them.
                "group": shortened(group, 128),
                "name": shortened(name, 128),
                "tags": list(dict.fromkeys(shortened(tag, 64) for tag in tags if tag)),
                "config": plain(config),
                "resume": "allow",
                "reinit": "finish_previous",  # the default would return the open run of a crashed job
                "settings": settings,
            }
            run, started = _bounded(lambda: _start(wandb, mode, options), _CALL_SECONDS + _INIT_SECONDS)
        return Tracker(wandb, run, folder, started) if run is not None else None
    except Exception as error:
        log.warning("W&B is off (%s): results are only in %s", first_line(error), folder / "results.jsonl")
        if isinstance(error, TimeoutError):
            _teardown(wandb)
        return None


def _start(wandb: Any, mode: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The started run and its mode: offline without a key, and if the server is out of reach."""
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


def _wandb_id(folder: Path, run_id: str) -> str:
    """The id of this folder's W&B run, stored in the folder. Its random tail is not that of another machine."""
    path = folder / "wandb" / "id"
    if not path.exists():
        name = shortened(re.sub(r"[^0-9A-Za-z_.-]+", "-", run_id), 64)  # of 128: names of artifacts contain it
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, f"{name}-{secrets.token_hex(3)}\n")
    return path.read_text().strip()


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What W&B reads only from environment variables: its files go to the run folder, and it prints nothing."""
    wanted = {"WANDB_DATA_DIR": f"{folder}/wandb", "WANDB_CACHE_DIR": f"{folder}/wandb/cache", "WANDB_SILENT": "true"}
    wanted["WANDB_ERROR_REPORTING"] = "false"  # with it, a server that stalls would delay the end of the process
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _bounded(action: Callable[[], T], seconds: float) -> T:
    """What `action` returns or raises; TimeoutError after `seconds`.

    In a thread: signals are handled meanwhile, and a call that hangs does not keep the process from ending.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    began = time.monotonic()
    while not future.done():
        if signals.received():
            seconds = min(seconds, _STOPPING_SECONDS)
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        wait([future], 0.5)
    return future.result()


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


def logged_in() -> bool:
    """Whether W&B finds credentials."""
    import wandb

    wandb.setup(wandb.Settings(silent=True, mode="online"))
    return bool(wandb.login(prompt=False, verify=False))
