"""The gradient-masking audit: whether gradients mislead attacks, by what mechanism, and which attack to trust."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from aerl.analyses import AnalysisContext
from aerl.analyses.masking import effects, symptoms
from aerl.analyses.masking.audit import Audit, Finding, NotMeasured
from aerl.analyses.masking.effects import EFFECTS
from aerl.analyses.others import FinishedRun, saved, tabulate
from aerl.attacks import attacking, collect_warnings
from aerl.errors import first_line
from aerl.report import figures
from aerl.runtime.device import is_out_of_memory, seed_from
from aerl.runtime.progress import progress
from aerl.tracking.results import Result
from aerl.types import Count, Probability

_ATHALYE, _ATHALYE_ATTACKS = "Athalye et al. 2018, section 3", "Athalye et al. 2018, section 3.1"
_CARLINI = "Carlini & Wagner 2017, sections V and VIII"
_LEE = "Lee et al. 2020"

T = TypeVar("T")
Row = Mapping[str, Any]  # of `checks` in summary.json


class Check(NamedTuple):
    name: str
    role: Literal["symptom", "formula", "effect"]
    threshold: float
    source: str
    measure: Callable[[Audit], Finding]


def masking(
    context: AnalysisContext,
    *,
    samples: Count = 100,
    steps: Count = 40,
    queries: Count = 1000,
    gain: Probability = 0.12,
    significance: Probability = 0.01,
    unbounded: Probability = 0.05,
    deterministic: Probability = 0.05,
    probabilities: Probability = 0.5,
    saturated: Probability = 0.05,
    zero_gradient: Probability = 0.05,
    paper_formula: Probability = 0.05,
    consistency: Probability = 0.5,
    slope: Probability = 0.15,
    runs: Sequence[FinishedRun] = (),
) -> list[Result]:
    """Audit the run's model in the run's threat model; the report is `masking` in summary.json.

    Plain PGD on cross-entropy (random start, `steps` steps of eps / 10) attacks `samples` correctly classified test
    images, the same ones in every run. An effect is an attack that fools samples which plain PGD misses: flagged if
    they are more than `gain` of all, and more than a second start of plain PGD fools (exact one-sided McNemar test,
    p < `significance`). A symptom can cause an effect. Formula checks show what the paper's own attack makes of this
    model, and have no part in the verdict. `queries` are Square's; the other settings are thresholds.

    A check that does not apply has the value None; one that fails is named in the verdict: "no sign (square failed)".
    `passes` are forward and backward passes per sample (a forward pass alone counts 1/3): below 600, and below 2,000 if
    finite differences are needed. The
    result does not depend on `context.batch_size`. Returns the values as Results with attack="masking".

    `runs` are other finished runs with this analysis: tables/masking.csv has their checks, too, and figures/masking.png
    shows the values of all.
    """
    others = saved(runs, "masking")
    table = [
        (symptoms.deterministic, deterministic, _ATHALYE),
        (symptoms.probabilities, probabilities, _CARLINI),
        (symptoms.saturated, saturated, _CARLINI),
        (symptoms.zero_gradient, zero_gradient, _ATHALYE),
        (symptoms.consistency, consistency, _ATHALYE),
        (symptoms.slope, slope, "Uesato et al. 2018"),
    ]
    checks = [Check(check.__name__, "symptom", threshold, source, check) for check, threshold, source in table]
    checks += [
        Check("paper_formula", "formula", paper_formula, _LEE, symptoms.paper_formula),
        *(Check(name, "effect", gain, effect.source, effect) for name, effect in EFFECTS.items()),
        Check("unbounded", "effect", unbounded, _ATHALYE_ATTACKS, effects.unbounded),
    ]
    audit, began = Audit(context, samples, steps, queries), time.monotonic()
    rows, obstacle = _run(audit, checks, significance)
    report = _verdict(rows, obstacle, audit.n)
    totals = {"n": audit.n, "seconds": time.monotonic() - began, "passes": sum(row["passes"] for row in rows)}
    context.save(masking={**report, **totals, "checks": rows})
    shown = {context.this_run: rows, **{name: each["checks"] for name, each in others.items()}}
    lines = {run: [[row[key] for key in rows[0]] for row in each] for run, each in shown.items()}
    tabulate(context, "masking", list(rows[0]), lines)
    if runs:
        context.draw("masking", _draw(shown), "value of each check, in %; ! marks those beyond their thresholds")
    if context.log.logger is not None:
        context.log.logger.summary({f"masking/{key}": text for key, text in report.items()})
    values = {row["name"]: row["value"] for row in rows if row["value"] is not None}
    return context.log.log(values, n=audit.n, split="test", attack="masking", norm=context.norm, eps=context.eps)


def _draw(shown: Mapping[str, Sequence[Row]]) -> Any:
    """A row for each run, a column for each check; white where it was not measured."""
    names = list(dict.fromkeys(row["name"] for rows in shown.values() for row in rows))
    values = [dict.fromkeys(names) | {row["name"]: row["value"] for row in rows} for rows in shown.values()]
    percent = [[math.nan if value is None else 100 * value for value in each.values()] for each in values]
    flagged = [{row["name"] for row in rows if row["flag"]} for rows in shown.values()]

    def text(row: int, column: int) -> str:
        value = percent[row][column]
        return "" if math.isnan(value) else f"{value:.0f}{'!' * (names[column] in flagged[row])}"

    figure, ((axis,),) = figures.subplots(figsize=(2.5 + 0.7 * len(names), 1.8 + 0.4 * len(shown)))
    image = figures.heatmap(axis, percent, list(shown), names, text, rotation=40)
    figure.colorbar(image, ax=axis, label="%")
    return figure


def _run(audit: Audit, checks: Sequence[Check], significance: float) -> tuple[list[dict[str, Any]], str]:
    """A row of summary.json for each check, and what prevents them all. Restores model and global random state."""
    rows = []
    with (
        attacking(audit.model),
        torch.no_grad(),
        torch.random.fork_rng([audit.x.device] if audit.x.is_cuda else []),
        collect_warnings(),
        progress("masking", len(checks), "checks") as bar,
    ):
        torch.manual_seed(seed_from(audit.context.seed, "masking"))  # a randomised model draws from the global state
        began = time.monotonic()
        _, obstacle = _attempt(lambda: audit.plain)
        obstacle = f"plain PGD {obstacle}" if obstacle.startswith("failed") else obstacle.removeprefix("not measured: ")
        for name, role, threshold, source, measure in checks:
            value, flag, text = None, False, f"not measured: {obstacle}"
            if not obstacle:
                finding, text = _attempt(partial(measure, audit))
                if finding is not None:
                    value, text = finding.value, finding.text
                    beyond = value < threshold if finding.below else value > threshold
                    flag = beyond and (finding.p is None or finding.p < significance)
            row = {"name": name, "value": value, "threshold": threshold, "flag": flag, "role": role, "says": text}
            passes = audit.model.passes / max(audit.n, 1)
            rows.append({**row, "source": source, "seconds": time.monotonic() - began, "passes": passes})
            began, audit.model.passes = time.monotonic(), 0.0
            bar.update(1)
    return rows, obstacle


def _attempt(measure: Callable[[], T]) -> tuple[T | None, str]:
    """The result, or why there is none. Raises only if memory runs out: the run then tries smaller batches."""
    try:
        return measure(), ""
    except NotMeasured as error:
        return None, f"not measured: {error}"
    except Exception as error:  # a foreign model may raise anything
        if is_out_of_memory(error):
            raise
        return None, f"failed: {first_line(error)}"


# --- the verdict -------------------------------------------------------------------------------------------

# The evidence for each mechanism, the most specific first: a softmax inside the model, for instance, makes the
# gradients of all losses vanish as well.
_MECHANISMS = {
    "deterministic": "randomised model",
    "probabilities": "probabilities in place of logits",
    "zero_gradient": "an operation without gradient",
    "saturated": "saturated softmax",
    "consistency": "shattered gradients",
    "slope": "shattered gradients",
    "log_odds": "saturated softmax",
    "adaptive": "misleading gradients",
    "more_steps": "attack too weak",
    "restarts": "attack too weak",
}
_OPTIONS = {name: f"{effect.name} ({effect.option})" for name, effect in EFFECTS.items() if effect.option}
_REMEDIES = {
    "saturated softmax": _OPTIONS["log_odds"],
    "attack too weak": _OPTIONS["more_steps"],
    **dict.fromkeys(
        (
            "randomised model",
            "probabilities in place of logits",
            "an operation without gradient",
            "shattered gradients",
        ),
        _OPTIONS["adaptive"],
    ),
}
_BLACK_BOX = f"{_OPTIONS['square']}, {_OPTIONS['transfer']}"


def _verdict(rows: Sequence[Row], obstacle: str, n: int) -> dict[str, str]:
    """The verdict; the mechanism with the sentence that shows it; the attack to trust."""
    if obstacle:
        return {"verdict": "not measured", "mechanism": obstacle, "trust": "no attack was measured"}
    found = {row["name"]: row for row in rows}
    flagged = {row["role"] for row in rows if row["flag"]}
    verdict = "masked" if "effect" in flagged else "suspicious" if "symptom" in flagged else "no sign"
    evidence = next((name for name in _MECHANISMS if found[name]["flag"]), None)
    if evidence:
        mechanism = _MECHANISMS[evidence]
    else:
        mechanism = "none found; the largest effect" if verdict == "no sign" else "unexplained"
        role = "symptom" if verdict == "suspicious" else "effect"
        shown = [row for row in rows if row["role"] == role and (row["flag"] or verdict == "no sign")]
        evidence = max(shown, key=lambda row: -1 if row["value"] is None else row["value"])["name"]
    failed = [row for row in rows if row["says"].startswith("failed: ")]
    names = ", ".join(row["name"] for row in failed) if len(failed) <= 3 else f"{len(failed)} checks"
    sentences = [f"{mechanism}: {found[evidence]['says']}", *(f"{row['name']} {row['says']}" for row in failed)]
    return {
        "verdict": f"{verdict} ({names} failed)" if failed else verdict,
        "mechanism": "; ".join(sentences),
        "trust": _trust(verdict, mechanism, found, n),
    }


def _trust(verdict: str, mechanism: str, found: Mapping[str, Row], n: int) -> str:
    """The attack to trust, with the number of samples that it fools and plain PGD misses."""
    gains = {name: round((found[name]["value"] or 0) * n) for name in _OPTIONS}
    best, second = sorted(_OPTIONS, key=lambda name: (not found[name]["flag"], -gains[name]))[:2]
    if verdict == "no sign":
        text = f"PGD: no other attack fools more than {gains[best]} of {n} further samples ({_OPTIONS[best]})"
        return f"{text}; confirm with AutoAttack"
    # An attack that beats plain PGD on a randomised model may have had luck instead of better gradients.
    if not found[best]["flag"] or mechanism == "randomised model":
        return f"the worst case of {_REMEDIES.get(mechanism, _BLACK_BOX)} and plain PGD on cross-entropy"
    text = f"{_OPTIONS[best]}: it fools {gains[best]} of {n} samples that plain PGD on cross-entropy misses"
    return f"{text}; next {_OPTIONS[second]}: {gains[second]}" if found[second]["flag"] else text
