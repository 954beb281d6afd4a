"""Hand a model on: `python -m aerl.hub export RUN [--out DIR] [--push OWNER/NAME]`.

An export is a folder that `checkpoint=` takes like a run folder, here or from the Hugging Face hub: the weights
as safetensors, which execute nothing when they are loaded, what the run was, and a model card with its verdict.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import aerl
from aerl.config.compose import origin
from aerl.config.names import NOT_IDENTITY
from aerl.remote import local, push
from aerl.runtime.files import atomic_write, sha256, writing
from aerl.runtime.terminal import Parser, command
from aerl.tracking.results import read_config, read_summary, write_summary
from aerl.types import UserError, eps_text

# Which overrides say how a model is judged, and not how it is made.
_JUDGING = ("seed", "norm", "eps", "attack", "metric", "analysis", "evaluation")


# What summary.json says of the run folder and its files alone.
_OF_THE_FOLDER = ("folder", "wandb", "files", "inputs", "results", "trained", "evaluated", "wish")


def export(run: Path, out: Path | None = None, license: str | None = None) -> Path:
    """Write the model that the run folder `run` trained or judged, with its verdict, into a folder of its own.

    The folder is `out`, or `export` in the run folder. Raises UserError where the run is not finished, or its
    model is not in a file, or is no longer the one it judged.
    """
    from safetensors.torch import save

    from aerl.training import checkpoint

    summary = read_summary(run)
    if summary is None:
        raise UserError(f"{run}: is no run folder; there is no summary.json")
    if summary.get("status") != "finished":
        raise UserError(f"{run}: is {summary.get('status')}; only a finished run has a verdict to hand on")
    config = read_config(run)
    weights = checkpoint.find(_judged(run, summary, config), f"{run}: checkpoint")
    if summary.get("weights"):
        checkpoint.check(weights, summary["weights"]["sha256"], f"{run}: {weights}")
    tensors = checkpoint.tensors(weights, f"{run}: checkpoint")
    out = run / "export" if out is None else out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    # Each tensor by itself: the format knows neither shared memory nor strides.
    content = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"})
    atomic_write(out / "model.safetensors", content)
    told = {key: value for key, value in summary.items() if key not in _OF_THE_FOLDER}
    if told.get("origin"):
        told["origin"] = {key: value for key, value in told["origin"].items() if key != "folder"}
    told["overrides"] = _identifying(summary["overrides"])
    told["weights"] = {"file": "model.safetensors", "sha256": sha256(out / "model.safetensors")}
    kept = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    atomic_write(out / "config.yaml", yaml.safe_dump(kept, sort_keys=False))
    told["files"] = {"config.yaml": sha256(out / "config.yaml")}
    atomic_write(out / "README.md", card(told, config, _made_by(summary), license))
    write_summary(out, told)
    return out


def _judged(run: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Where the weights are that this run trained, or judged."""
    if summary["trainer"] != "none":
        return str(run)
    taken = str(config["checkpoint"])
    if taken == "own":
        raise UserError(f"{run}: judged the weights that came with the code (checkpoint=own), not a file")
    now = origin(taken)
    if summary["origin"] is not None and (now or {}).get("run_id") != summary["origin"]["run_id"]:
        raise UserError(
            f"{run}: judged run {summary['origin']['run_id']}, which is not (or no longer) in {taken}; "
            "call this from the folder where the run was started"
        )
    return taken


def _made_by(summary: Mapping[str, Any]) -> list[str] | None:
    """The overrides of the run that trained the model, where they are known."""
    told: Mapping[str, Any] | None = summary
    if summary["trainer"] == "none":
        told = read_summary(Path(summary["origin"]["folder"])) if summary["origin"] else None
    if told is None or told["trainer"] == "none" or "overrides" not in told:
        return None
    return _identifying(told["overrides"])


def _identifying(overrides: Sequence[str]) -> list[str]:
    """Without those that say where things lie on this machine."""
    return [word for word in overrides if _key(word) not in NOT_IDENTITY]


def card(
    summary: Mapping[str, Any], config: Mapping[str, Any], made_by: Sequence[str] | None, license: str | None
) -> str:
    """The model card, as the Hugging Face hub reads it: YAML metadata, then Markdown.

    `made_by` are the overrides of the run that trained the model, if they are known.
    """
    trained = summary["origin"] or summary
    name = f"{summary['model']}-{summary['dataset']}-{trained['trainer']}-seed{trained['seed']}"
    metadata = {
        **({"license": license} if license else {}),
        "library_name": "aerl",
        "pipeline_tag": "image-classification",
        "tags": [
            *("image-classification", "adversarial-robustness", "aerl"),
            *dict.fromkeys([str(summary["model"]), str(trained["trainer"])]),
        ],
        "datasets": [_dataset(config)],
        "model-index": [{"name": name, "results": [_result(summary, config)]}],
    }
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {name}\n\n" + "\n\n".join(_body(summary, config, made_by)) + "\n"


def _dataset(config: Mapping[str, Any]) -> str:
    """Its name; for one of the hub, where it is there."""
    dataset = config["dataset"]
    path = str(dataset["path"] or "")
    on_hub = "huggingface" in dataset["source"]["_target_"] and path.count("/") == 1 and path[0].isalnum()
    return path if on_hub and not Path(path).exists() else str(dataset["name"])


def _result(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    metrics = [{"type": "accuracy", "name": "clean accuracy", "value": summary["clean_accuracy"]["value"]}]
    if worst := summary["worst_case_accuracy"]:
        title = f"worst-case accuracy, {config['norm']} eps {eps_text(config['eps'])}"
        metrics.append({"type": "robust_accuracy", "name": title, "value": worst["value"]})
    return {
        "task": {"type": "image-classification"},
        "dataset": {"name": summary["dataset"], "type": _dataset(config), "split": "test"},
        "metrics": metrics,
    }


def _body(summary: Mapping[str, Any], config: Mapping[str, Any], made_by: Sequence[str] | None) -> Iterator[str]:
    """The paragraphs of the card."""
    trained, software = summary["origin"] or summary, summary["environment"]
    yield (
        f"{summary['model']} on {summary['dataset']}, trained by `{trained['trainer']}`, seed {trained['seed']}, "
        f"run {trained['run_id']}; exported by aerl {aerl.__version__}."
    )
    clean, worst = summary["clean_accuracy"], summary["worst_case_accuracy"]
    threat = f"{config['norm']} eps {eps_text(config['eps'])}, pixels in [0, 1]"
    headline = f"**Accuracy on {clean['n']} test images: {_percent(clean)} clean"
    yield headline + (f", {_percent(worst)} in the worst case.**" if worst else ".**")
    policy = {"argmax": "the likeliest class", "sample": "a class drawn from the softmax"}
    yield (
        f"Threat model: {threat}; white-box; what is deployed is {policy[config['evaluation']['policy']]}. "
        "The worst case is taken image by image over the attacks that count. Intervals: 95 %, over the images."
    )
    yield _table(summary)
    if masking := summary["masking"]:
        told = [f"Masking audit: **{masking['verdict']}**."]
        if masking["verdict"] != "no sign":
            told += [f"Mechanism: {masking['mechanism']}.", f"To trust: {masking['trust']}."]
        yield " ".join(told)
    warnings = [f"model: {doubt}" for doubt in summary["doubts"]]
    warnings += [f"{name}: {said}" for name, attack in summary["attacks"].items() for said in attack["warnings"]]
    if warnings:
        yield "Warnings:\n\n" + "\n".join(f"- {warning}" for warning in warnings)
    yield "## Load it, judge it again"
    judging = [word for word in summary["overrides"] if _key(word) in _JUDGING]
    again = shlex.join(["trainer=none", "checkpoint=FOLDER", *judging])
    yield _shell(f"python launch.py {again}")
    yield "`FOLDER` is this folder, or `hf://OWNER/NAME` where it is on the hub."
    yield "## Reproduce it"
    commands = [] if made_by is None else [made_by]
    commands += [summary["overrides"]] if summary["trainer"] == "none" else []
    yield _shell("\n".join(shlex.join(["python", "launch.py", *words]) for words in commands))
    commit = f", commit {software['commit']}" if "commit" in software else ""
    yield (
        f"aerl {software['aerl']}{commit}, torch {software['torch']}, {software['device']}, seed {summary['seed']}. "
        f"SHA-256 of `model.safetensors`: `{summary['weights']['sha256']}`."
    )


def _table(summary: Mapping[str, Any]) -> str:
    lines = ["| attack | norm | eps | accuracy, 95 % interval | counts |", "|---|---|---|---|---|"]
    lines.append(f"| clean | | | {_percent(summary['clean_accuracy'])} | |")
    for name, told in summary["attacks"].items():
        counts = "yes" if told["counts"] else "no: outside the threat model"
        accuracy = _percent(told["robust_accuracy"])
        lines.append(f"| {name} | {told['norm']} | {eps_text(told['eps'])} | {accuracy} | {counts} |")
    if worst := summary["worst_case_accuracy"]:
        lines.append(f"| **worst case** | | | **{_percent(worst)}** | |")
    return "\n".join(lines)


def _percent(accuracy: Mapping[str, Any]) -> str:
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f} %)"


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0]


def _shell(lines: str) -> str:
    return f"```\n{lines}\n```"


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.hub", description="Hand a model on.")
    commands = parser.add_subparsers(required=True, metavar="export")
    exporting = commands.add_parser("export", help="write a run's model, its verdict and a model card")
    exporting.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    exporting.add_argument("--out", type=Path, metavar="DIR", help="where to write it (RUN/export)")
    exporting.add_argument("--license", metavar="NAME", help="what the card says, such as mit")
    exporting.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub")
    exporting.add_argument("--private", action="store_true", help="if --push makes the repository: not public")
    given = parser.parse_args(words)
    folder = export(local(str(given.run), "RUN"), given.out and local(str(given.out), "--out"), given.license)
    print(f"exported to {folder}; judge it: python launch.py trainer=none {shlex.quote(f'checkpoint={folder}')}")
    if given.push:
        address = push(folder, given.push, private=given.private)
        print(f"uploaded to {address}; judge it: python launch.py trainer=none checkpoint=hf://{given.push}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
