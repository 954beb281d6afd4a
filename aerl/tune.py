"""python -m aerl.tune: Optuna searches settings of a training; the validation accuracy under attack decides.

Every trial is a run of launch.py without attacks on test images, in `runs/tune/NAME/NUMBER`. The study is a file beside
them, so the same command goes on where it was stopped.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aerl.config.multirun import Space, search_space
from aerl.errors import UserError
from aerl.report.table import Grid, wide_console
from aerl.runtime.terminal import Parser, command
from aerl.tracking.results import read_results

_SECONDS_BETWEEN_LOOKS = 0.5
_OURS = ("name", "attack", "analysis", "runs_dir", "overwrite")


def tune(words: Sequence[str], *, name: str, trials: int, metric: str, runs_dir: Path) -> Any:
    """Run trials until `trials` of them have ended, and return Optuna's study.

    words: launch.py's. Searched are `key=choice(a,b)`, `key=interval(a,b)`, `key=range(a,b)` and, for a logarithmic
        scale, `key=tag(log,interval(a,b))`.
    metric: `split/metric` of results.jsonl by epoch; one that ends in `loss` is minimised.

    Raises UserError for a wrong command line, for a trial that fails, and if no trial measures the metric.
    """
    fixed, space = search_space(words)
    folder = runs_dir / "tune" / name
    study = _study(folder, name, metric)
    for left in study.get_trials(states=[_state("RUNNING")]):  # of a process that was killed
        study.tell(left.number, state=_state("FAIL"))
        study.enqueue_trial(left.params)
    while len(study.get_trials(states=[_state("COMPLETE"), _state("PRUNED")])) < trials:
        trial = study.ask()
        chosen = [f"{key}={_suggest(trial, key, values)}" for key, values in space.items()]
        print(f"trial {trial.number}: {' '.join(chosen)}", flush=True)
        place = f"tune/{name}/{trial.number}"
        command = [*fixed, *chosen, "attack=none", "analysis=none", f"runs_dir={runs_dir}", f"name={place}"]
        value, pruned = _run(command, runs_dir / place, trial, metric, study.direction.name == "MAXIMIZE")
        study.tell(trial, None if pruned else value, state=_state("PRUNED") if pruned else None)
        print(f"trial {trial.number}: {metric} {value:.4g}{', pruned' * pruned}", flush=True)
    return study


def _study(folder: Path, name: str, metric: str) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("aerl.tune needs the package optuna: pip install 'aerl[tune]'") from error
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "study.log")))
    direction: Any = "minimize" if metric.endswith("loss") else "maximize"
    study = optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    study.pruner = optuna.pruners.MedianPruner()
    return study


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _suggest(trial: Any, key: str, space: Space) -> Any:
    if space.choices:
        return trial.suggest_categorical(key, space.choices)
    if space.step is not None:
        return trial.suggest_int(key, int(space.low), int(space.high), step=space.step)
    return trial.suggest_float(key, space.low, space.high, log=space.log)


def _run(words: Sequence[str], folder: Path, trial: Any, metric: str, maximise: bool) -> tuple[float, bool]:
    """Run one trial; its best value, and whether it was ended early. UserError if it fails or measures nothing."""
    launch = str(Path(__file__).resolve().parent.parent / "launch.py")
    process = subprocess.Popen([sys.executable, launch, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen: dict[int, float] = {}
    try:
        while process.poll() is None:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for epoch, value in _values(folder, metric).items():
                if epoch not in seen:
                    trial.report(value, epoch)
                    seen[epoch] = value
            if trial.should_prune():
                break
    finally:  # also after Ctrl-C
        pruned = process.poll() is None
        if pruned:
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    seen |= _values(folder, metric)
    if process.returncode and not pruned:
        raise UserError(f"{folder}: {errors.decode().strip().splitlines()[-1].removeprefix('error: ')}")
    if not seen:
        raise UserError(f"{metric}: this trainer does not measure it; use a trainer with an adversary, or --metric")
    return (max if maximise else min)(seen.values()), pruned


def _values(folder: Path, metric: str) -> Mapping[int, float]:
    path = folder / "results.jsonl"
    results = read_results(path) if path.is_file() else []
    return {r.step: r.value for r in results if r.step is not None and f"{r.split}/{r.metric}" == metric}


def show(study: Any) -> None:
    """Print the trials, the best first, and the command of the best."""
    done = study.get_trials(states=[_state("COMPLETE")])
    done.sort(key=lambda trial: trial.value, reverse=study.direction.name == "MAXIMIZE")
    keys = list(done[0].params) if done else []
    rows = [
        [
            str(t.number),
            f"{t.value:.4g}",
            *(f"{t.params[key]:.4g}" if isinstance(t.params[key], float) else str(t.params[key]) for key in keys),
        ]
        for t in done[:10]
    ]
    wide_console().print(Grid(["trial", "value", *keys], rows, ()).rich())


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m aerl.tune",
        description=(
            "Search settings of a training with Optuna: launch.py's words, in which key=interval(a,b), key=range(a,b), "
            "key=choice(a,b) and key=tag(log,interval(a,b)) are searched. No attack sees a test image."
        ),
    )
    parser.add_argument("--trials", type=int, default=20, help="how many, with those of earlier starts (20)")
    parser.add_argument("--name", default="study", help="of the study: runs/tune/NAME (study)")
    parser.add_argument("--metric", default="val/adversarial_accuracy", help="(val/adversarial_accuracy)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("words", nargs="+", metavar="KEY=VALUE")
    given = parser.parse_args(words)
    for word in given.words:
        if (key := word.lstrip("+").partition("=")[0]) in _OURS:
            raise UserError(f"{word}: aerl.tune sets {key} itself; see --help")
    show(tune(given.words, name=given.name, trials=given.trials, metric=given.metric, runs_dir=given.runs_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
