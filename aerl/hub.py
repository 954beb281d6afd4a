"""Publish a model and fetch one: `python -m aerl.hub export RUN [--out DIR] [--push OWNER/NAME]`, `hf://OWNER/NAME`.

An export is a folder that `checkpoint=` takes like a run folder, here or from the Hugging Face hub: the weights as
safetensors, summary.json, config.yaml and a model card. Only files that cannot execute anything are fetched.
"""

import functools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import aerl
from aerl.config.names import NOT_IDENTITY
from aerl.runtime.files import atomic_write, sha256, writing
from aerl.runtime.terminal import Parser, command
from aerl.tracking.results import read_config, read_summary, write_summary
from aerl.types import UserError, eps_text, first_line

FILES = ("model.safetensors", "config.yaml", "summary.json")
_SECONDS = 10.0  # how long a hub that does not answer is waited for
# Overrides that say how a model is evaluated, not how it is trained.
_EVALUATION = ("seed", "norm", "eps", "attack", "metric", "analysis", "evaluation")
# What summary.json says of the run folder alone.
_OF_THE_FOLDER = ("folder", "wandb", "files", "inputs", "results", "trained", "evaluated", "wish")


def local(name: str, key: str = "checkpoint") -> Path:
    """The path that `name` means; a model on the hub is downloaded, or found in its cache if the hub is out of reach.

    Raises UserError about the `key` that named it.
    """
    try:
        return _fetch(name, key) if name.startswith("hf://") else Path(name).expanduser()
    except RuntimeError as error:  # no HOME and a user without a name, or ~nobody
        raise UserError(f"{key}={name}: ~ is unknown here; write the folder out, or set HOME") from error


@functools.cache  # one run asks several times, and needs the same files
def _fetch(name: str, key: str) -> Path:
    from huggingface_hub import HfApi, errors, hf_hub_download

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if match is None:
        raise UserError(f"{key}={name}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    repo, revision = match.groups()
    try:
        try:  # once: the download itself would repeat for minutes what times out
            HfApi().model_info(repo, revision=revision, timeout=_SECONDS)
            offline = False
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception:  # no network, HF_HUB_OFFLINE, a server in trouble
            offline = True
        folders = {Path(hf_hub_download(repo, f, revision=revision, local_files_only=offline)).parent for f in FILES}
    except errors.LocalEntryNotFoundError as error:
        raise UserError(f"{key}={name}: the hub cannot be reached, and the model is not in its cache") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        reason = (
            f"no such model on the hub (private: HF_TOKEN or `hf auth login`), or it lacks one of {', '.join(FILES)}"
        )
        raise UserError(f"{key}={name}: {reason}") from error
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"{key}={name}: cannot be downloaded ({first_line(error)})") from error
    if len(folders) > 1:
        raise UserError(f"{key}={name}: changed while it was downloaded; repeat the command")
    return folders.pop()


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload an exported model to `repo` (OWNER/NAME), created if there is none; returns its address.

    Raises UserError where there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push {repo}: must be OWNER/NAME")
    if get_token() is None:
        raise UserError(f"--push {repo}: no token; set HF_TOKEN or run `hf auth login`. The export is in {folder}")
    api = HfApi()
    try:
        try:
            api.model_info(repo, timeout=_SECONDS)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*FILES, "README.md"])
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"--push {repo}: {first_line(error)}. The export is in {folder}") from error
    return f"{api.endpoint}/{repo}"


def export(run: Path, out: Path | None = None, license: str | None = None) -> Path:
    """Write the model that the run folder `run` trained or evaluated to the folder `out` (`run`/export); returns it.

    Raises UserError where the run is not finished, or its model is in no file, or is not the one it evaluated any more.
    """
    from safetensors.torch import save

    from aerl.training import checkpoint

    summary = read_summary(run)
    if summary is None or summary.get("status") != "finished":
        state = f"is {summary.get('status')}" if summary else "has no summary.json"
        raise UserError(f"{run}: {state}; only a finished run can be exported")
    config = read_config(run)
    weights = checkpoint.find(_model_of(run, summary, config), f"{run}: checkpoint")
    if summary.get("weights"):
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
    exported = {key: value for key, value in summary.items() if key not in _OF_THE_FOLDER}
    if origin := exported.get("origin"):
        exported["origin"] = {key: value for key, value in origin.items() if key != "folder"}
    exported["overrides"] = _portable(summary["overrides"])
    exported["weights"] = {"file": "model.safetensors", "sha256": sha256(out / "model.safetensors")}
    exported["files"] = {"config.yaml": sha256(out / "config.yaml")}
    origin_folder = (summary["origin"] or {}).get("folder")
    runs = [read_summary(Path(origin_folder)) if origin_folder else None, summary]
    commands = [_portable(run["overrides"]) for run in runs if run and "overrides" in run]
    atomic_write(out / "README.md", card(exported, config, commands, license))
    write_summary(out, exported)
    return out


def _model_of(run: Path, summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The run folder or file with the weights that this run trained or evaluated."""
    from aerl.config.compose import origin

    if summary["trainer"] != "none":
        return str(run)
    source = str(config["checkpoint"])
    if source == "own":
        raise UserError(f"{run}: checkpoint=own, the weights came with the code and are in no file")
    if summary["origin"] is not None and (origin(source) or {}).get("run_id") != summary["origin"]["run_id"]:
        raise UserError(
            f"{run}: evaluated run {summary['origin']['run_id']}, which is not (or no longer) in {source}; "
            "call this from the folder where the run was started"
        )
    return source


def _portable(overrides: Sequence[str]) -> list[str]:
    """Without those that say where things are on this machine."""
    return [word for word in overrides if _key(word) not in NOT_IDENTITY]


def _key(override: str) -> str:
    return re.split("[=.]", override.lstrip("+~"))[0]


def card(
    summary: Mapping[str, Any], config: Mapping[str, Any], commands: Sequence[Sequence[str]], license: str | None
) -> str:
    """The model card; `commands` are the overrides of the runs that led to the summary, as far as they are known."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    trained, dataset = summary["origin"] or summary, str(summary["dataset"])
    name = f"{summary['model']}-{dataset}-{trained['trainer']}-seed{trained['seed']}"
    threat = f"{config['norm']} eps {eps_text(config['eps'])}"
    tags = ["image-classification", "adversarial-robustness", "aerl", str(summary["model"]), str(trained["trainer"])]

    def result(kind: str, title: str, accuracy: Mapping[str, Any]) -> EvalResult:
        value = accuracy["value"]
        return EvalResult(tags[0], dataset, dataset, kind, value, dataset_split="test", metric_name=title)

    results = [result("accuracy", "clean accuracy", summary["clean_accuracy"])]
    if worst := summary["worst_case_accuracy"]:
        results.append(result("robust_accuracy", f"worst-case accuracy, {threat}", worst))
    data = ModelCardData(license=license, library_name="aerl", pipeline_tag=tags[0], tags=tags, datasets=[dataset],
                         model_name=name, eval_results=results)  # fmt: skip
    evaluation = [word for word in summary["overrides"] if _key(word) in _EVALUATION]
    text = ModelCard.from_template(
        data, str(Path(__file__).with_name("card.md.j2")), name=name, summary=summary, trained=trained,
        config=config, threat=threat, version=aerl.__version__, percent=_percent, eps_text=eps_text,
        again=shlex.join(["trainer=none", "checkpoint=FOLDER", *evaluation]), commands=list(map(shlex.join, commands)),
    )  # fmt: skip
    return str(text)


def _percent(accuracy: Mapping[str, Any]) -> str:
    value, low, high = (100 * accuracy[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f} %)"


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.hub", description="Publish a model.")
    commands = parser.add_subparsers(required=True, metavar="export")
    exporting = commands.add_parser("export", help="write a run's model, its results and a model card")
    exporting.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    exporting.add_argument("--out", type=Path, metavar="DIR", help="where to write it (RUN/export)")
    exporting.add_argument("--license", metavar="NAME", help="for the card, such as mit")
    exporting.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub")
    exporting.add_argument("--private", action="store_true", help="if --push creates the repository: not public")
    given = parser.parse_args(words)
    folder = export(local(str(given.run), "RUN"), given.out and local(str(given.out), "--out"), given.license)
    print(f"exported to {folder}; evaluate it: python launch.py trainer=none {shlex.quote(f'checkpoint={folder}')}")
    if given.push:
        address = push(folder, given.push, private=given.private)
        print(f"uploaded to {address}; evaluate it: python launch.py trainer=none checkpoint=hf://{given.push}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
