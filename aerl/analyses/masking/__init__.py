"""The gradient-masking audit: whether this model's gradients mislead attacks, by what mechanism, whom to trust."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from aerl.analyses import AnalysisContext
from aerl.analyses.masking.checks import Audit, Check, Finding
from aerl.tracking.results import Result
from aerl.types import Count, Probability

_ATHALYE = "Athalye et al. 2018, section 3.1"
_CARLINI = "Carlini & Wagner 2017, sections V and VIII"
_LEE = "Lee et al. 2020"
_PINTOR = "Pintor et al. 2022"
_PINTOR_FIRST = "Pintor et al. 2021, arXiv:2106.09947v1"

Found = Mapping[str, Mapping[str, Any]]  # the checks by name


def masking(
    context: AnalysisContext,
    *,
    samples: Count = 100,
    steps: Count = 40,
    queries: Count = 1000,
    gain: Probability = 0.12,
    significance: Probability = 0.01,
    unbounded: Probability = 0.05,
    monotone: Probability = 0.05,
    deterministic: Probability = 0.05,
    probabilities: Probability = 0.5,
    saturated: Probability = 0.05,
    zero_gradient: Probability = 0.05,
    float64: Probability = 0.05,
    step_length: Probability = 0.95,
    paper_step_length: Probability = 0.1,
    paper_formula: Probability = 0.05,
    consistency: Probability = 0.5,
    slope: Probability = 0.15,
    silent_success: Probability = 0.05,
    incomplete: Probability = 0.25,
    break_point: Probability = 0.95,
    increasing_loss: Probability = 0.2,
) -> list[Result]:
    """Audit the run's model in the run's threat model; `masking` of summary.json says what was found.

    Plain PGD on cross-entropy (from a random start, `steps` steps of eps / 10) runs on `samples` test images
    that are classified rightly, always the same ones. Then three kinds of checks, after Athalye et al. 2018
    (section 3.1), Carlini et al. 2019 and Pintor et al. 2022. An *effect* is an attack that fools samples which plain
    PGD leaves: flagged if they are more than `gain` of all, and more than a second start of plain PGD finds
    (exact one-sided McNemar test on what the first one leaves, p < `significance`). A *symptom* is what may
    cause one: no gradient, a saturated softmax, noise. *Formula* checks show what the paper's own attack makes
    of this model; they tell of that attack, and leave the verdict alone. One flagged effect makes the verdict
    "masked", flagged symptoms alone "suspicious", none of either "no sign"; where plain PGD cannot run at all
    it is "not measured". A check that has nothing to measure (no source of transfer, another norm) has the value
    None and says why; one that fails does so too, and is named in the verdict: "no sign (square failed)".

    Every other setting is the threshold of the check of its name. `queries` are Square's. Costs are told
    in forward and backward passes per sample, in which a forward pass alone counts a third; together they
    stay under about 800. The outcome does not depend on `context.batch_size`. Returns each value as a
    Result with attack="masking".
    """
    audit = Audit(context, samples, steps, queries, gain, significance)
    effects: dict[str, tuple[str, Callable[[float], Finding]]] = {
        "restarts": (_ATHALYE, audit.restarts),
        "more_steps": (_ATHALYE, audit.more_steps),
        "log_odds": (_CARLINI, partial(audit.loss, "log_odds")),
        "margin": (_CARLINI, partial(audit.loss, "margin")),
        "logit_scale": ("Croce & Hein 2020, section 4", audit.logit_scale),
        "float64": (_LEE, audit.float64),
        "fgsm": (_ATHALYE, audit.fgsm),
        "noise": (_ATHALYE, audit.noise),
        "square": (_ATHALYE, audit.square),
        "transfer": (_ATHALYE, audit.transfer),
        "eot": ("Athalye et al. 2018, section 4.2", audit.eot),
    }
    symptoms: dict[str, tuple[float, str, Callable[[float], Finding]]] = {
        "silent_success": (silent_success, _PINTOR, audit.silent_success),
        "deterministic": (deterministic, "Athalye et al. 2018, section 3", audit.deterministic),
        "probabilities": (probabilities, _CARLINI, audit.probabilities),
        "saturated": (saturated, _CARLINI, audit.saturated),
        "zero_ce_gradient": (zero_gradient, _CARLINI, audit.zero_ce_gradient),
        "zero_gradient": (zero_gradient, "Athalye et al. 2018, section 3", audit.zero_gradient),
        "float64_gradient": (float64, _LEE, audit.float64_gradient),
        "step_length": (step_length, _LEE, audit.step_length),
        "consistency": (consistency, "Athalye et al. 2018, section 3", audit.consistency),
        "slope": (slope, "Uesato et al. 2018", audit.slope),
        "monotone": (monotone, _ATHALYE, audit.monotone),
        "incomplete": (incomplete, _PINTOR, audit.incomplete),
        "break_point": (break_point, _PINTOR_FIRST, audit.break_point),
        "increasing_loss": (increasing_loss, _PINTOR_FIRST, audit.increasing_loss),
        "zero_on_path": (zero_gradient, _PINTOR_FIRST, audit.zero_on_path),
    }
    plan = [Check(name, "symptom", *rest) for name, rest in symptoms.items()]
    plan.append(Check("paper_step_length", "formula", paper_step_length, _LEE, audit.paper_step_length))
    plan.append(Check("paper_formula", "formula", paper_formula, _LEE, audit.paper_formula))
    plan += [Check(name, "effect", gain, source, run) for name, (source, run) in effects.items()]
    plan.append(Check("unbounded", "effect", unbounded, _ATHALYE, audit.unbounded))

    began = time.monotonic()
    checks = audit.make(plan)
    found = {check["name"]: check for check in checks}
    verdict = _verdict(checks, audit.reason)
    saved = {
        "verdict": verdict + _without(audit.failed),
        "mechanism": "; ".join(
            [
                _mechanism(verdict, found, audit.reason),
                *(f"{name} {found[name]['says']}" for name in audit.failed),
            ]
        ),
        "trust": _trust(verdict, found, audit.n),
        "n": audit.n,
        "seconds": time.monotonic() - began,
        "passes": sum(check["passes"] for check in checks),
        "checks": checks,
    }
    context.save(masking=saved)
    if context.log.tracker is not None:
        columns = ["name", "role", "value", "threshold", "flag", "says", "source", "seconds", "passes"]
        context.log.tracker.table("tables/masking", columns, [[row[key] for key in columns] for row in checks])
        told = {f"masking/{key}": saved[key] for key in ("verdict", "mechanism", "trust")}
        context.log.tracker.summary(told)
    values = {check["name"]: check["value"] for check in checks if check["value"] is not None}
    return context.log.log(values, n=audit.n, split="test", attack="masking", norm=context.norm, eps=context.eps)


# ---------------------------------------------------------------------------------------- the verdict


def _verdict(checks: Sequence[Mapping[str, Any]], reason: str) -> str:
    if reason:
        return "not measured"
    flagged = {check["role"] for check in checks if check["flag"]}
    return "masked" if "effect" in flagged else "suspicious" if "symptom" in flagged else "no sign"


def _without(failed: Sequence[str]) -> str:
    """What to add to a verdict that was reached without some of the checks."""
    if not failed:
        return ""
    return f" ({', '.join(failed) if len(failed) <= 3 else f'{len(failed)} checks'} failed)"


# Which check is evidence for which mechanism, the surest first: a softmax inside the model, for instance,
# makes the gradients of all losses vanish as well.
_MECHANISMS = {
    "deterministic": "randomised model",
    "probabilities": "probabilities in place of logits",
    "zero_gradient": "an operation without gradient",
    "zero_ce_gradient": "saturated softmax",
    "saturated": "saturated softmax",
    "float64_gradient": "saturated softmax",
    "consistency": "shattered gradients",
    "slope": "shattered gradients",
    "increasing_loss": "shattered gradients",
    "log_odds": "saturated softmax",
    "more_steps": "attack too weak",
    "restarts": "attack too weak",
}

# Those that a user can run, with what to say on the command line.
_ALTERNATIVES = {
    "restarts": "PGD with restarts (attack=pgd attack.pgd.restarts=5)",
    "more_steps": "PGD with more steps (attack=pgd attack.pgd.steps=500)",
    "log_odds": "PGD on the log-odds (attack=pgd)",
    "margin": "PGD on the margin (attack=pgd_margin)",
    "logit_scale": "PGD on rescaled logits (attack=pgd_rescaled)",
    "fgsm": "FGSM (attack=fgsm)",
    "noise": "random noise (attack=noise)",
    "square": "Square (attack=square)",
    "transfer": "transferred examples (attack=transfer)",
    "eot": "PGD averaged over passes (attack=pgd attack.pgd.eot=8)",
}
_BLACK_BOX = f"{_ALTERNATIVES['square']} and {_ALTERNATIVES['transfer']}"
_REMEDIES = {
    "randomised model": _ALTERNATIVES["eot"],
    "probabilities in place of logits": "attacks on the logits, once the softmax is taken out of the model",
    "saturated softmax": _ALTERNATIVES["log_odds"],
    "attack too weak": _ALTERNATIVES["more_steps"],
}


def _evidence(found: Found) -> str | None:
    """The check that tells the mechanism: the first one flagged in the order of `_MECHANISMS`."""
    return next((name for name in _MECHANISMS if found[name]["flag"]), None)


def _mechanism(verdict: str, found: Found, reason: str) -> str:
    """One sentence: what masks the gradients, and the number that shows it."""
    if verdict == "not measured":
        return reason
    effects = {name: row for name, row in found.items() if row["role"] == "effect"}
    if verdict == "no sign":
        return f"none found; the nearest to one: {_largest(effects)['says']}"
    if evidence := _evidence(found):
        return f"{_MECHANISMS[evidence]}: {found[evidence]['says']}"
    flagged = {name: row for name, row in found.items() if row["flag"]}
    return f"unexplained: {_largest(effects if verdict == 'masked' else flagged)['says']}"


def _largest(found: Found) -> Mapping[str, Any]:
    return max(found.values(), key=lambda row: -1 if row["value"] is None else row["value"])


def _trust(verdict: str, found: Found, n: int) -> str:
    """One sentence: which attack to believe, with the number of samples that it alone has fooled."""
    if verdict == "not measured":
        return "nothing was measured, so no attack is to be trusted more than another"
    if verdict == "no sign":
        best = max(_ALTERNATIVES, key=lambda name: found[name]["value"] or 0)
        gained = round((found[best]["value"] or 0) * n)
        return (
            f"PGD, beyond which no alternative fools more than {gained} of {n} samples ({_ALTERNATIVES[best]}); "
            "AutoAttack has the last word"
        )
    mechanism = _MECHANISMS.get(_evidence(found) or "", "")
    flagged = [name for name in _ALTERNATIVES if found[name]["flag"]]
    # What beats plain PGD on a randomised model may have had luck, not better gradients.
    if not flagged or mechanism == "randomised model":
        return f"{_REMEDIES.get(mechanism, _BLACK_BOX)}, beside plain PGD on cross-entropy: take the worst case"
    best, *others = sorted(flagged, key=lambda name: -found[name]["value"])
    told = (
        f"{_ALTERNATIVES[best]}, not plain PGD on cross-entropy, which misses {round(found[best]['value'] * n)} of "
        f"{n} samples that it fools"
    )
    return f"{told}; next {_ALTERNATIVES[others[0]]}, {round(found[others[0]]['value'] * n)}" if others else told
