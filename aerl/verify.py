"""Check the numbers of a finished run without attacking again: `python -m aerl.verify RUN...`."""

import html
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aerl.config.options import IN_MEMORY, check_targets
from aerl.errors import UserError
from aerl.report import page, table
from aerl.runtime.files import load_arrays
from aerl.runtime.terminal import Parser, command, eps_text
from aerl.tracking.results import changed_files, read_config, read_summary
from aerl.types import ORDERS

_TIE = 1e-5  # of the largest logit: so close, the order of two logits depends on the size of the batch


@dataclass(frozen=True)
class Check:
    """One thing that was checked; `faults` are empty if it holds."""

    name: str
    text: str
    faults: Sequence[str] = ()


def verify(run: Path, *, trust: bool = False) -> Iterator[Check]:
    """Check a run folder, from its files and the test images alone: nothing is attacked.

    - No file was changed since the run finished; weights, data and code are those that the run used.
    - The model's predictions of the clean images are those that were recorded.
    - Every image that an attack fooled has an adversarial image in evidence.npz, in the ball and in [0, 1], that the
      model misclassifies.
    - All accuracies and intervals follow from the outcomes, and report.html shows them.

    A run of `aerl.evaluate` has neither its model nor its images: only its numbers are checked against each other.
    `trust` allows that config.yaml names code that is not aerl's, which is run.
    Raises UserError if the run is not finished, or cannot be checked at all.
    """
    import torch

    from aerl.build import build_data, judged_model, judged_weights
    from aerl.config.schema import Config
    from aerl.data import subset
    from aerl.data.splits import rows as sampled
    from aerl.evaluation.evaluate import predict
    from aerl.runtime.device import set_up

    summary = read_summary(run) or {"status": "no summary.json"}
    if summary["status"] != "finished":
        raise UserError(f"{run}: expected a finished run (status: {summary['status']})")
    changed = changed_files(run, summary)
    yield Check("files", f"{len(summary['files'])} files", [f"{name} was changed or is missing" for name in changed])
    if not (run / "config.yaml").is_file():
        return
    config = Config.model_validate(read_config(run))
    if config.model.net["_target_"] == IN_MEMORY:
        yield Check("model", "not in the folder, nor are the images: the evidence is not checked")
        yield from _numbers(run, config, summary, load_arrays(run / "outcomes.npz", sealed=False))
        return
    if not trust:
        check_targets(config.model_dump(), summary.get("choices") or {}, str(run), "use --trust")
    hardware = set_up(**config.hardware.model_dump() | ({} if torch.cuda.is_available() else {"device": "cpu"}))
    data = build_data(config)
    path = judged_weights(config, run)
    weights = _weights(summary, path)
    yield weights
    if weights.faults:
        return
    model = judged_model(config, path, data, hardware)
    yield _inputs(config, summary, data.digest, model)

    split, outcomes = subset(data.test, config.evaluation.samples), load_arrays(run / "outcomes.npz", sealed=False)
    index = sampled(len(data.test), config.evaluation.samples).numpy()
    pairs = (("index", index), ("label", split.labels.numpy()))
    same = all(name in outcomes and np.array_equal(outcomes[name], values) for name, values in pairs)
    yield Check("images", f"{len(index)} test images", [] if same else ["outcomes.npz is of other images or labels"])
    if not same:
        return
    size, passes = config.evaluation.batch_size or 128, summary.get("passes") or 1
    clean = predict(model, split, hardware, size, examples=0, passes=passes)
    differ = np.flatnonzero(clean.pred != outcomes["clean_pred"])
    if passes > 1:
        yield Check("clean", f"the model draws at random: {len(differ)} of {len(index)} predictions differ this time")
    else:
        real = [row for row in differ if not _tied(model, split.images[row : row + 1], hardware)]
        faults = [
            f"image {index[row]}: predicted {clean.pred[row]}, recorded {outcomes['clean_pred'][row]}" for row in real
        ]
        yield Check("clean", f"{len(index)} predictions", _few(faults))
    if counted := _counted(summary):
        yield _evidence(run, config, model, hardware, split, outcomes, counted, size, passes)
    yield from _numbers(run, config, summary, outcomes)


def _counted(summary: Mapping[str, Any]) -> list[str]:
    return [name for name, info in summary["attacks"].items() if info["counts"]]


def _numbers(run: Path, config: Any, summary: Mapping[str, Any], outcomes: Mapping[str, Any]) -> Iterator[Check]:
    yield _accuracies(summary, outcomes, _counted(summary), config.evaluation.policy)
    yield _results(run, summary)
    yield _report(run, summary)


def _inputs(config: Any, summary: Mapping[str, Any], digest: str, model: Any) -> Check:
    """Data, and code and files that the configuration names. Those that are gone, such as a source, change nothing."""
    from aerl.tracking import inputs

    recorded, found = summary["inputs"], inputs.read(config, digest, model)
    known = {key: value for key, value in found.items() if key != inputs.DATA_KEY and value != inputs.MISSING}
    faults = [f"{key} is not what the run used" for key, value in known.items() if recorded.get(key) != value]
    return Check("inputs", ", ".join(known), faults)


def _weights(summary: Mapping[str, Any], path: Path | None) -> Check:
    from aerl.runtime.files import sha256

    recorded = (summary.get("weights") or {}).get("sha256")
    if path is None or recorded is None:
        return Check("weights", "the network brings its own (checkpoint=own)")
    found = sha256(path)
    return Check(
        "weights", f"SHA-256 {found[:12]}", [] if found == recorded else [f"{path} is not the file of the run"]
    )


def _tied(model: Any, images: Any, hardware: Any) -> bool:
    """Whether the two largest logits of an image are equal up to rounding."""
    import torch

    from aerl.attacks import attacking
    from aerl.data import to_unit

    x = images if images.is_floating_point() else to_unit(images.to(hardware.device), hardware.memory_format)
    with attacking(model), torch.no_grad():
        logits = model(x.to(hardware.device)).float()
    top = logits.topk(2, dim=1).values
    return bool((top[:, 0] - top[:, 1] <= _TIE * logits.abs().amax(1)).all())


def _evidence(
    run: Path, config: Any, model: Any, hardware: Any, split: Any, outcomes: Mapping[str, Any], counted: Sequence[str],
    size: int, passes: int,
) -> Check:  # fmt: skip
    import torch

    from aerl.attacks import attacking, predictions
    from aerl.data import to_unit
    from aerl.evaluation.evidence import NAME, first_fooled

    rows, attacks = first_fooled(outcomes, counted)
    stored = load_arrays(run / NAME, sealed=False)
    if not len(rows) and not stored:
        return Check("evidence", "no image was fooled")
    if not stored:
        return Check(
            "evidence", f"{len(rows)} images were fooled", [f"{NAME} is missing; evaluation.evidence=true keeps it"]
        )
    if not (np.array_equal(stored["row"], rows) and np.array_equal(stored["attack"], attacks)):
        fault = (
            f"{NAME} has {len(stored['row'])} images, outcomes.npz {len(rows)} that were fooled, or by other attacks"
        )
        return Check("evidence", f"{len(rows)} images were fooled", [fault])
    faults, index = [], outcomes["index"]
    limit = config.eps * (1 + 1e-4) + 1e-6
    still = 0
    for part in torch.split(torch.arange(len(rows)), size):
        x_adv = torch.from_numpy(stored["images"][part.numpy()]).to(hardware.device)
        places = torch.from_numpy(rows[part.numpy()])
        x = to_unit(split.images[places].to(hardware.device), hardware.memory_format)
        delta = (x_adv - x).flatten(1)
        distance = delta.norm(dim=1, p=ORDERS[config.norm])
        outside = torch.maximum(-x_adv.flatten(1).amin(1), x_adv.flatten(1).amax(1) - 1)
        with attacking(model), torch.no_grad():
            pred = torch.stack([predictions(model(x_adv).float()) for _ in range(passes)]).mode(0).values
        right = (pred == split.labels[places].to(pred)).tolist()
        for number, row in enumerate(places.tolist()):
            what = f"image {index[row]} ({attacks[part[number]]})"
            if not distance[number] <= limit:
                faults.append(f"{what}: {config.norm} distance {distance[number]:.6g}, eps {config.eps:.6g}")
            if not outside[number] <= 1e-6:
                faults.append(f"{what}: a pixel is {outside[number]:.6g} outside [0, 1]")
            if right[number] and passes > 1:
                still += 1
            elif right[number] and not _tied(model, x_adv[number : number + 1], hardware):
                faults.append(f"{what}: the model classifies it correctly")
    threat = f"{config.norm} eps {eps_text(config.eps)}"
    text = f"{len(rows)} adversarial images: within {threat} and [0, 1], misclassified"
    if passes > 1:
        text += f" in most passes, but for {still}"
        faults += [f"{still} of {len(rows)} are right in most passes"] if still > 0.2 * len(rows) else []
    return Check("evidence", text, _few(faults))


def _accuracies(summary: Mapping[str, Any], outcomes: Mapping[str, Any], counted: Sequence[str], policy: Any) -> Check:
    from aerl.evaluation.outcomes import accuracy, within_eps

    stated = {"clean": summary["clean_accuracy"], "worst case": summary["worst_case_accuracy"]}
    found = {"clean": accuracy(outcomes, [], policy), "worst case": accuracy(outcomes, counted, policy)}
    if not counted:
        del stated["worst case"], found["worst case"]
    for row in summary.get("worst_case_by_eps") or ():
        name, weaker = f"worst case at eps {row['eps']:g}", within_eps(summary["attacks"], counted, row["eps"])
        stated[name], found[name] = row, accuracy(outcomes, weaker, policy)
    for name, info in summary["attacks"].items():
        stated[name], found[name] = info["robust_accuracy"], accuracy(outcomes, [name], policy)
    faults = [
        f"{name}: {key} is {stated[name][key]} in summary.json, {value} from the outcomes"
        for name, row in found.items()
        for key, value in row.items()
        if abs(stated[name][key] - value) > 1e-9
    ]
    return Check("accuracies", f"{len(found)} accuracies with intervals", _few(faults))


def _results(run: Path, summary: Mapping[str, Any]) -> Check:
    """results.jsonl states the same accuracies."""
    stated = {("clean_accuracy", "none"): summary["clean_accuracy"]["value"]}
    if worst := summary["worst_case_accuracy"]:
        stated["worst_case_accuracy", "none"] = worst["value"]
    for row in summary.get("worst_case_by_eps") or ():
        stated["worst_case_accuracy", f"worst_eps{row['eps']:.6g}"] = row["value"]
    for name, info in summary["attacks"].items():
        stated["robust_accuracy", name] = info["robust_accuracy"]["value"]
    found = {}
    for line in (run / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "test":
            found[row["metric"], row["attack"]] = row["value"]
    faults = [f"{' '.join(key).strip()}: {value} in summary.json, {found.get(key)} in results.jsonl"
              for key, value in stated.items() if found.get(key) != value]  # fmt: skip
    return Check("results", f"{len(stated)} values", _few(faults))


def _report(run: Path, summary: Mapping[str, Any]) -> Check:
    """Every row of the table of attacks stands in report.html."""
    path = run / page.NAME
    if not path.is_file():
        return Check("report", "no report.html")
    words = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", path.read_text(errors="replace"))).split())
    rows = [" ".join(" ".join(row).split()) for row in table.attack_grid(summary).rows]
    return Check(
        "report", f"{len(rows)} rows", [f"report.html does not show: {row}" for row in rows if row not in words]
    )


def _few(faults: list[str]) -> list[str]:
    return faults[:5] + ([f"and {len(faults) - 5} more"] if len(faults) > 5 else [])


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.verify", description="Check the numbers of finished runs without attacking.")
    parser.add_argument("--trust", action="store_true", help="run code that config.yaml names and that is not aerl's")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    wrong = 0
    given = parser.parse_args(words)
    for run in given.runs:
        checks = list(verify(run, trust=given.trust))
        faults = [(check.name, fault) for check in checks for fault in check.faults]
        wrong += bool(faults)
        print(f"{run}: {'NOT verified' if faults else 'verified'}")
        for check in checks:
            if not check.faults:
                print(f"  {check.name:<11}{check.text}")
        for name, fault in faults:
            print(f"  {name:<11}{fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
