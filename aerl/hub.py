"""Publish a model and fetch one: `python -m aerl.hub export RUN [--out DIR] [--push OWNER/NAME]`, `hf://OWNER/NAME`.

An export is a folder that `checkpoint=` takes like a run folder, here or from the Hugging Face hub: the weights as
safetensors, summary.json, config.yaml and a model card; and beside them the outcomes, the evidence, model_info.json in
RobustBench's fields and samples.json. Only files that cannot execute anything are fetched.
"""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import aerl
from aerl.config.names import NOT_IDENTITY
from aerl.errors import UserError, first_line
from aerl.runtime.files import atomic_write, load_arrays, sha256, write_json, writing
from aerl.runtime.paths import FILES
from aerl.runtime.terminal import Parser, command, eps_text
from aerl.tracking.results import read_config, read_summary, write_summary

# Overrides that say how a model is evaluated, not how it is trained.
_EVALUATION = ("seed", "norm", "eps", "attack", "metric", "analysis", "evaluation")
_RESULTS = ("outcomes.npz", "evidence.npz")
# What summary.json says about the run folder alone.
_OF_THE_FOLDER = ("folder", "wandb", "files", "inputs", "results", "trained", "evaluated", "wish")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload an exported model to `repo` (OWNER/NAME), which is created if needed; returns its address."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(f"--push {repo}: no token; set HF_TOKEN or run `hf auth login`")
    try:
        address = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[*FILES, *_RESULTS, "*.json", "README.md"]
        )
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"--push {repo}: {first_line(error)}") from error
    return str(address)


def export(run: Path, out: Path | None = None, license: str | None = None) -> Path:
    """Write the model that the run folder `run` trained or evaluated to the folder `out` (`run`/export); returns it.

    Raises UserError if the run is not finished, or its model is in no file, or not the one that was evaluated.
    """
    from safetensors.torch import save

    from aerl.training import checkpoint

    summary = read_summary(run) or {"status": "no summary.json"}
    if summary["status"] != "finished":
        raise UserError(f"{run}: expected a finished run (status: {summary['status']})")
    config, origin = read_config(run), summary["origin"] or {}
    source = str(run) if summary["trainer"] != "none" else str(config["checkpoint"])
    if source == "own":
        raise UserError(f"{run}: evaluated checkpoint=own; there is no file of weights to export")
    weights = checkpoint.find(source, f"{run}: checkpoint")
    checkpoint.check(weights, summary["weights"]["sha256"], f"{run}: {weights}")
    tensors = checkpoint.tensors(weights, f"{run}: checkpoint")
    out = run / "export" if out is None else out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    # Cloned: the format knows neither shared memory nor strides.
    content = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"})
    atomic_write(out / "model.safetensors", content)
    portable = {key: value for key, value in config.items() if key not in NOT_IDENTITY}
    atomic_write(out / "config.yaml", yaml.safe_dump(portable, sort_keys=False))
    exported = {key: value for key, value in summary.items() if key not in _OF_THE_FOLDER} | {
        "origin": {key: value for key, value in origin.items() if key != "folder"} or None,
        "overrides": _portable(summary),
        "weights": {"file": "model.safetensors", "sha256": sha256(out / "model.safetensors")},
        "files": {"config.yaml": sha256(out / "config.yaml")},
    }
    training = read_summary(Path(origin["folder"])) if origin else None
    commands = [shlex.join(_portable(summary)) for summary in (training, summary) if summary]
    atomic_write(out / "README.md", _card(exported, config, commands, license))
    for name in _RESULTS:
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    write_json(out / "model_info.json", model_info(exported, config))
    write_json(out / "samples.json", per_sample(run, summary, config))
    write_summary(out, exported)
    return out


def model_info(summary: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The results in the fields of RobustBench's model_info files; accuracies are text, in per cent."""
    attacks, worst = summary["attacks"], summary["worst_case_accuracy"]
    clean = summary["clean_accuracy"]
    official = attacks.get("autoattack")
    return {
        "name": f"{summary['model']}, {(summary['origin'] or summary)['trainer']}",
        "dataset": str(summary["dataset"]),
        "architecture": str(summary["model"]),
        "threat_model": config["norm"],
        "eps": eps_text(config["eps"]),
        "number_forward_passes": summary.get("passes") or 1,
        "additional_data": False,
        "clean_acc": f"{100 * clean['value']:.2f}",
        "reported": worst and f"{100 * worst['value']:.2f}",
        # Of the samples that withstood the attacks before it, as RobustBench counts adaptive attacks, too.
        "autoattack_acc": official and f"{100 * official['robust_accuracy']['value']:.2f}",
        "n": clean["n"],
        "unreliable": not (summary.get("planted") or {}).get("trusted", True),
        "weights_sha256": summary["weights"]["sha256"],
    }


def per_sample(run: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each sample: `index` in the test set, `label`, `predicted`; the `distance` of the nearest adversarial example
    that an attack of the run found in its norm (null: none; 0: wrong when clean) and that `attack`; the `sha256` of the
    float32 pixels of its image in evidence.npz. Queries are not counted."""
    import hashlib

    import numpy as np

    outcomes, evidence = load_arrays(run / "outcomes.npz"), load_arrays(run / "evidence.npz")
    label, wrong = outcomes["label"], outcomes["clean_pred"] != outcomes["label"]
    distance, by = np.where(wrong, 0.0, np.inf), np.where(wrong, "clean", "").astype("<U100")
    for name, info in summary["attacks"].items():
        if info["counts"] and info["norm"] == config["norm"]:
            size = outcomes[f"{name}_{config['norm'].lower()}"]
            closer = (outcomes[f"{name}_pred"] != label) & (size < distance)
            distance[closer], by[closer] = size[closer], name
    images = zip(evidence.get("row", ()), evidence.get("images", ()), strict=True)
    hashes = {int(row): hashlib.sha256(image.tobytes()).hexdigest() for row, image in images}
    return [
        {
            "index": int(outcomes["index"][row]), "label": int(label[row]),
            "predicted": int(outcomes["clean_pred"][row]), "distance": float(distance[row]),
            "attack": str(by[row]) or None, "sha256": hashes.get(row),
        }
        for row in range(len(label))
    ]  # fmt: skip


def _portable(summary: Mapping[str, Any]) -> list[str]:
    """The overrides of a run without those that say where things are on this machine."""
    return [word for word in summary["overrides"] if _key(word) not in NOT_IDENTITY]


def _key(override: str) -> str:
    return re.split("[=.]", override.lstrip("+~"))[0]


def _card(summary: Mapping[str, Any], config: Mapping[str, Any], commands: Sequence[str], license: str | None) -> str:
    """The model card; `commands` are the overrides of the runs that trained and evaluated the model."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    trained, dataset, task = summary["origin"] or summary, str(summary["dataset"]), "image-classification"
    name = f"{summary['model']}-{dataset}-{trained['trainer']}-seed{trained['seed']}"
    threat = f"{config['norm']} eps {eps_text(config['eps'])}"
    measured = [("accuracy", "clean accuracy", summary["clean_accuracy"]),
                ("robust_accuracy", f"worst-case accuracy, {threat}", summary["worst_case_accuracy"])]  # fmt: skip
    results = [
        EvalResult(task, dataset, dataset, kind, accuracy["value"], dataset_split="test", metric_name=title)
        for kind, title, accuracy in measured
        if accuracy
    ]
    tags = [task, "adversarial-robustness", "aerl", str(summary["model"]), str(trained["trainer"])]
    data = ModelCardData(license=license, library_name="aerl", pipeline_tag=task, tags=tags, datasets=[dataset],
                         model_name=name, eval_results=results)  # fmt: skip
    again = ["trainer=none", "checkpoint=FOLDER", *(w for w in summary["overrides"] if _key(w) in _EVALUATION)]
    template = Path(__file__).with_name("card.md.j2")
    return str(ModelCard.from_template(
        data, str(template), name=name, summary=summary, trained=trained, config=config, threat=threat,
        version=aerl.__version__, eps_text=eps_text, again=shlex.join(again), commands=commands,
    ))  # fmt: skip


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.hub", description="Publish a model with its results and a model card.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write it (RUN/export)")
    parser.add_argument("--license", metavar="NAME", help="for the card, such as mit")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="if --push creates the repository: not public")
    given = parser.parse_args(words)
    folder = export(given.run, given.out, given.license)
    print(f"exported to {folder}; evaluate it: python launch.py trainer=none {shlex.quote(f'checkpoint={folder}')}")
    if given.push:
        address = push(folder, given.push, private=given.private)
        print(f"uploaded to {address}; evaluate it: python launch.py trainer=none checkpoint=hf://{given.push}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
