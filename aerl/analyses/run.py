"""The analyses of a run, one after the other; if one fails, the others still run."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from aerl.analyses import AnalysisContext, NotMade
from aerl.attacks import NoGradient
from aerl.build import Parts
from aerl.config.schema import Config
from aerl.data import Split
from aerl.errors import UserError, first_line
from aerl.evaluation.evaluate import batch_size
from aerl.evaluation.outcomes import Outcomes
from aerl.runtime import ddp, signals
from aerl.runtime.device import is_out_of_memory
from aerl.runtime.files import load_arrays
from aerl.tracking.results import trainer_of
from aerl.tracking.run_folder import Record

log = logging.getLogger("aerl")


def run_analyses(parts: Parts, config: Config, record: Record, outcomes: Outcomes, split: Split) -> None:
    """Run the analyses that are not done yet, on the evaluated images `split` and their `outcomes`."""
    examples = load_arrays(record.folder / "examples.npz")
    context = AnalysisContext(
        model=parts.model, images=split.images, labels=split.labels, class_names=parts.data.class_names,
        outcomes=outcomes, adversarial={name: torch.from_numpy(images) for name, images in examples.items()},
        attacks=record.summary["attacks"], figures=record.folder / "figures", log=record.results, save=record.save,
        norm=config.norm, eps=config.eps, seed=config.seed, hardware=parts.hardware,
        trainer=trainer_of(record.summary), batch_size=batch_size(parts, config),
        specs=parts.attacks,
    )  # fmt: skip
    for name, analysis in parts.analyses.items():
        ddp.sync_stop_request()
        signals.raise_if_stopped()
        done = record.summary["analyses"]
        if done.get(name, {}).get("status") in ("made", "not made"):
            log.info("%s: already done", name)
        else:
            row = _run(name, analysis, context, record)
            record.advance(analyses=record.summary["analyses"] | {name: row})
    rows = record.summary["analyses"]
    record.save(not_made={name: row["reason"] for name, row in rows.items() if row["status"] != "made"})


def _run(name: str, analysis: Callable[..., Any], context: AnalysisContext, record: Record) -> dict[str, Any]:
    """Run one analysis, with smaller batches if it runs out of memory; returns its row in summary.json."""
    began = time.monotonic()
    while True:
        record.results.restore(record.summary["results"])  # without the lines of an earlier try
        try:
            with signals.stop_immediately():
                analysis(context)
            return {"status": "made", "seconds": time.monotonic() - began}
        except (NotMade, NoGradient) as error:
            log.warning("%s: skipped: %s", name, error)
            return {"status": "not made", "reason": str(error)}
        except Exception as error:
            if is_out_of_memory(error) and context.batch_size > 1:
                context = replace(context, batch_size=context.batch_size // 2)
                log.warning("%s: out of memory, continuing with %d images per batch", name, context.batch_size)
                continue
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s failed: %s; the same command repeats it", name, reason)
            log.debug("%s", name, exc_info=error)  # for run.log
            record.results.restore(record.summary["results"])
            return {"status": "failed", "reason": f"failed: {reason}"}
