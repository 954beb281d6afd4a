"""The only wiring: one configuration becomes one run folder: train -> attack -> analyse -> report."""

import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from aerl import config as schema
from aerl.config import Config
from aerl.files import atomic_write
from aerl.report.progress import progress
from aerl.report.table import show
from aerl.results import ResultLog, Tracker, open_tracker, read_summary, write_summary
from aerl.types import UserError

if TYPE_CHECKING:  # torch takes seconds to import: a finished run or a wrong key is answered without it
    from aerl.build import Parts
    from aerl.data import Split
    from aerl.evaluate import Outcomes

log = logging.getLogger("aerl")


def run(cfg: DictConfig) -> float | None:
    """Do what the configuration says, or what is left of it; returns the worst-case accuracy.

    The same command is the same run: an unfinished one goes on, a finished one is shown again.
    """
    _log_to_stderr()
    overrides = list(HydraConfig.get().overrides.task)
    config = schema.read(schema.adopt(cfg, overrides))
    folder = Path(config.runs_dir).expanduser() / schema.run_name(config, overrides)
    summary = _earlier(folder, config)
    if summary.get("status") == "finished":
        show(summary)
        log.info("This run was finished before; nothing was done. overwrite=true does it again.")
        return _headline(summary)

    from aerl.build import build, build_data

    if config.prepare_data_only:
        data = build_data(config)
        log.info("%s: %d train, %d val and %d test images of %s are ready in %s", config.dataset.name,
                 len(data.train), len(data.val), len(data.test), "x".join(map(str, data.image_shape)),
                 config.data_dir)  # fmt: skip
        return None
    parts = build(config)  # whatever is wrong is found here, before the run folder is touched
    with _recorded(folder, config, parts, summary, overrides) as record:
        if parts.recipe is not None:
            _train(parts, config, record)
        outcomes, split = _attack(parts, config, record)
        _analyse(parts, config, record, outcomes, split)
    show(record.summary)
    return _headline(record.summary)


def _log_to_stderr() -> None:
    """Plain lines, and none of them through the root logger, which Hydra has pointed at standard output."""
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger().setLevel(logging.WARNING)  # nor other libraries' chatter
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def _headline(summary: Mapping[str, Any]) -> float | None:
    accuracy = summary.get("worst_case_accuracy")
    return None if accuracy is None else accuracy["value"]


def _earlier(folder: Path, config: Config) -> dict[str, Any]:
    """What `folder` knows of an earlier start of this very run; UserError if it holds another one."""
    summary = None if config.overwrite else read_summary(folder)
    if summary is None:
        return {}
    if summary.get("config_hash") != schema.config_hash(config):
        raise UserError(
            f"run folder {folder}: holds another configuration ({schema.difference(config, folder)}); "
            "name=NAME keeps both, overwrite=true discards it"
        )
    return summary


@dataclass(frozen=True)
class Record:
    """What a run writes: its folder, its results, and a summary that is never behind."""

    folder: Path
    summary: dict[str, Any]
    results: ResultLog
    tracker: Tracker | None

    def save(self, **news: Any) -> None:
        self.summary.update(news)
        write_summary(self.folder, self.summary)

    def close(self, **news: Any) -> None:
        """Say how the run ended; W&B first, so that the summary knows where W&B's files are."""
        self.summary.update(news)
        if self.tracker is not None:
            self.tracker.summary({"status": self.summary["status"], "error": self.summary["error"]})
            self.tracker.finish(0 if self.summary["status"] == "finished" else 1)
            self.summary["wandb"] = self.tracker.where()
        self.save()


@contextmanager
def _recorded(
    folder: Path, config: Config, parts: "Parts", earlier: Mapping[str, Any], overrides: list[str]
) -> Iterator[Record]:
    """Open the run folder and W&B; on the way out say how it ended, whatever happened."""
    from aerl.hardware import describe

    if config.overwrite and folder.exists():
        shutil.rmtree(folder)
    choices = HydraConfig.get().runtime.choices
    run_id = earlier.get("run_id") or secrets.token_hex(4)
    identity = {
        "run_id": run_id,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "model": config.model.name,
        "trainer": config.trainer_name,
    }
    summary: dict[str, Any] = {"attacks": {}, "seconds": {}, "best_epoch": None, **earlier}
    summary |= {
        "status": "running",
        "error": None,
        **identity,
        "folder": str(folder),
        "config_hash": schema.config_hash(config),
        "choices": {group: choices[group] for group in ("dataset", "model")},
        "environment": describe(parts.hardware),
        "masking": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    told = [
        word
        for word in overrides
        if not word.startswith(("dataset=", "model=", "trainer=", "seed=", "logger"))
    ]
    tracker = open_tracker(
        folder=folder,
        run_id=run_id,
        job_type=config.trainer_name,
        name=" ".join([config.trainer_name, *told, f"seed={config.seed}"]),
        tags=[
            config.dataset.name,
            config.model.name,
            config.trainer_name,
            *config.attack,
            *config.logger.tags,
        ],
        config=config.model_dump(),
        **config.logger.model_dump(exclude={"tags"}),
    )
    record = Record(folder, summary, ResultLog(folder, identity, tracker), tracker)
    began = time.monotonic()
    try:
        record.save()
        atomic_write(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
        with _log_file(folder / "run.log"):
            yield record
        total = summary["seconds"].get("total", 0.0) + time.monotonic() - began
        record.close(status="finished", seconds=summary["seconds"] | {"total": total})
    except BaseException as error:
        record.close(status="failed", error=schema.explain(error) or f"{type(error).__name__}: {error}")
        raise


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything logged also goes to run.log, and how the run failed, which the command line says by itself."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        expected = isinstance(error, UserError)
        trace = None if expected else (type(error), error, error.__traceback__)
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, str(error), (), trace))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()


def _train(parts: "Parts", config: Config, record: Record) -> None:
    """Train, or go on training, and leave `parts.model` with the weights that the recipe selects."""
    from aerl import checkpoint
    from aerl.train import fit

    assert parts.recipe is not None
    folder = record.folder / "checkpoints"
    if "train" not in record.summary["seconds"]:
        began = time.monotonic()
        best_epoch = fit(
            parts.model, parts.data, parts.recipe, parts.hardware,
            seed=config.seed, folder=folder, results=record.results,
        )  # fmt: skip
        seconds = record.summary["seconds"] | {"train": time.monotonic() - began}
        record.save(best_epoch=best_epoch, seconds=seconds)
    checkpoint.load_weights(parts.model, folder / "best.pt")


def _attack(parts: "Parts", config: Config, record: Record) -> tuple["Outcomes", "Split"]:
    """Predict the test images, attack them, and write down every sample's outcome after each attack."""
    from aerl import evaluate

    split = evaluate.subset(parts.data.test, config.evaluation.samples)
    batch_size = config.evaluation.batch_size or (512 if parts.hardware.device.type == "cuda" else 128)
    record.results.rewind(config.trainer.epochs if config.trainer else 0)  # the test results come once more
    outcomes, done = _resume_outcomes(record)
    if not done:
        clean_pred = evaluate.predictions(parts.model, split, parts.hardware, batch_size)
        outcomes = {"label": split.labels.numpy(), "clean_pred": clean_pred}
        record.summary["attacks"] = {}
    clean = evaluate.accuracy(outcomes)
    record.results.log({"clean_accuracy": clean["value"]}, n=len(split), split="test")
    record.save(clean_accuracy=clean)

    for name, attack in parts.attacks.items():
        if name in done:
            log.info("%s: done before", name)
        else:
            outcomes |= _attack_once(name, attack, parts, config, record, split, outcomes, batch_size)
        for part, told in record.summary["attacks"].items():
            if told["of"] == name:
                _log_attack(record, outcomes, part, told)

    worst = evaluate.accuracy(outcomes, list(record.summary["attacks"]))
    if record.summary["attacks"]:
        record.results.log({"worst_case_accuracy": worst["value"]}, n=len(split), split="test")
    robust = {part: told["robust_accuracy"]["value"] for part, told in record.summary["attacks"].items()}
    seconds = sum(told["seconds"] for told in record.summary["attacks"].values())
    record.save(
        robust_accuracy=robust,
        worst_case_accuracy=worst if robust else None,
        seconds=record.summary["seconds"] | {"attack": seconds},
    )
    return outcomes, split


def _resume_outcomes(record: Record) -> tuple["Outcomes", set[str]]:
    """What an earlier start of this run has found already: outcomes, and the attacks they are of."""
    import numpy as np

    path = record.folder / "outcomes.npz"
    attacks = record.summary["attacks"]
    if not attacks or not path.exists():
        return {}, set()
    with np.load(path, allow_pickle=False) as file:
        outcomes = {name: file[name] for name in file.files}
    return outcomes, {told["of"] for told in attacks.values()}


def _attack_once(
    name: str, attack: Any, parts: "Parts", config: Config, record: Record,
    split: "Split", outcomes: "Outcomes", batch_size: int,
) -> "Outcomes":  # fmt: skip
    """Run one attack; its outcomes are on the disk before its summary says that it is done."""
    import numpy as np

    from aerl import evaluate
    from aerl.attacks import collect_warnings
    from aerl.build import named

    norm, eps = (evaluate.setting(attack, key, getattr(config, key)) for key in ("norm", "eps"))
    to_attack = int(evaluate.right(outcomes, []).sum())
    counts = {"attacked": 0, "robust": 0}
    with (
        named(f"attack.{name}"),
        progress(name, total=to_attack, unit="samples") as bar,
        collect_warnings() as warnings,
    ):

        def count(attacked: int, robust: int) -> None:
            counts["attacked"] += attacked
            counts["robust"] += robust
            bar.update(attacked, acc=counts["robust"] / counts["attacked"] * to_attack / len(split))

        attacked = evaluate.run_attack(
            attack, parts.model, split, outcomes["clean_pred"], parts.hardware,
            name=name, seed=config.seed, batch_size=batch_size, progress=count,
        )  # fmt: skip
    found: Outcomes = {}
    news = {}
    for part, outcome in attacked.items():
        evaluate.check_within(part, outcome, norm, eps)
        found |= {f"{part}_pred": outcome.pred, f"{part}_l2": outcome.l2, f"{part}_linf": outcome.linf}
        news[part] = {
            "of": name,
            "norm": norm,
            "eps": eps,
            "robust_accuracy": evaluate.accuracy({**outcomes, **found}, [part]),
            "seconds": outcome.seconds,
            "warnings": list(warnings),
        }
    examples = _load_examples(record.folder) | {part: outcome.examples for part, outcome in attacked.items()}
    together: dict[str, Any] = {**outcomes, **found}
    atomic_write(record.folder / "examples.npz", lambda file: np.savez(file, **examples))
    atomic_write(record.folder / "outcomes.npz", lambda file: np.savez(file, **together))
    record.save(attacks=record.summary["attacks"] | news)
    return found


def _load_examples(folder: Path) -> dict[str, Any]:
    """The first adversarial images of each attack, float32 (k, C, H, W), kept for figures."""
    import numpy as np

    path = folder / "examples.npz"
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _log_attack(record: Record, outcomes: "Outcomes", part: str, told: Mapping[str, Any]) -> None:
    n = told["robust_accuracy"]["n"]
    metrics = {
        "robust_accuracy": told["robust_accuracy"]["value"],
        "mean_l2": float(outcomes[f"{part}_l2"].mean()),
        "mean_linf": float(outcomes[f"{part}_linf"].mean()),
        "seconds": told["seconds"],
    }
    record.results.log(metrics, n=n, split="test", attack=part, norm=told["norm"], eps=told["eps"])


def _analyse(parts: "Parts", config: Config, record: Record, outcomes: "Outcomes", split: "Split") -> None:
    """Run the analyses, and show W&B what is worth seeing."""
    import torch

    from aerl.analyses import AnalysisContext

    context = AnalysisContext(
        model=parts.model,
        images=split.images,
        labels=split.labels,
        class_names=parts.data.class_names,
        outcomes=outcomes,
        adversarial={part: torch.from_numpy(kept) for part, kept in _load_examples(record.folder).items()},
        attacks=record.summary["attacks"],
        figures=record.folder / "figures",
        log=record.results,
    )
    for analysis in parts.analyses.values():
        analysis(context)
    if record.tracker is not None:
        _show_wandb(record.tracker, record.summary)


def _show_wandb(tracker: Tracker, summary: Mapping[str, Any]) -> None:
    """The closing table once more, and the numbers by which W&B sorts and plots runs."""
    accuracies = {"clean": summary["clean_accuracy"]}
    accuracies |= {name: told["robust_accuracy"] for name, told in summary["attacks"].items()}
    if summary["worst_case_accuracy"] is not None:
        accuracies["worst case"] = summary["worst_case_accuracy"]
    rows = []
    for name, accuracy in accuracies.items():
        told = summary["attacks"].get(name, {})
        row = [name, *(told.get(key) for key in ("norm", "eps", "seconds"))]
        rows.append(row + [accuracy[key] for key in ("value", "low", "high", "n")])
        tracker.summary({f"accuracy/{name.replace(' ', '_')}": accuracy["value"]})
    tracker.table("attacks", ["attack", "norm", "eps", "seconds", "accuracy", "low", "high", "n"], rows)
