"""Tables over many runs, from the files of their folders alone: means over the seeds, grouped by what varied.

Nothing here imports torch or Hydra.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from aerl.report.table import Grid, shown
from aerl.runtime.files import atomic_write, writing
from aerl.runtime.terminal import one_line
from aerl.tracking.results import changed_files, read_config, read_summary
from aerl.types import UserError, eps_text, first_line

CAPTION = "Accuracies in %: mean ± sample standard deviation over the n seeds."

# Settings that do not change what a number means, or that the tables show in another way: the number of samples in the
# heading, the sources of transferred examples in the attacks' names.
_NOT_COMPARED = re.compile(
    r"(seed|name|norm|eps|runs_dir|data_dir|overwrite|prepare_data_only|evaluation\.(samples|batch_size)"
    r"|trainer|model|attack)$"
    r"|(dataset|model|trainer)\.name$|attack\.\w+\.sources$|logger\.|analysis(?!\.masking\.)"
)
_COMPARABLE = ["dataset", "norm", "eps", "samples"]  # what two runs of one table share


@dataclass(frozen=True)
class Table:
    """Runs whose accuracies can be compared: a row for each setting, over its seeds."""

    heading: str
    numbers: pd.DataFrame  # in per cent: <accuracy>_mean, _sd and _n, beside what varied
    text: Grid
    runs: Sequence[tuple[str, Path]]  # a label and the folder of each run that is counted
    notes: Sequence[str]


@dataclass(frozen=True)
class Overview:
    """The tables over a set of runs; which runs are in none of them, and why; and what else to know."""

    tables: Sequence[Table]
    failed: Sequence[str]
    warnings: Sequence[str]


# ------------------------------------------------------------------------------------------ reading


def run_folders(folder: Path) -> list[Path]:
    """Every run folder in `folder`, itself included, sorted by name; UserError if there is none."""
    found = (path.parent for path in folder.rglob("summary.json"))
    if runs := sorted(run for run in found if "wandb" not in run.relative_to(folder).parts):
        return runs
    raise UserError(f"{folder}: {'holds no run' if folder.is_dir() else 'no such folder'} (no summary.json)")


def overview(folders: Iterable[Path], failed: Iterable[str] = ()) -> Overview:
    """The tables over these run folders; `failed` describes runs that have no folder, one line each."""
    failed, runs = list(failed), []
    warnings: list[str] = []
    for folder in folders:
        try:
            summary = read_summary(folder)
            if summary is None:
                raise UserError(f"{shown(folder)}: no summary.json")
            if summary.get("status") != "finished":
                reason = summary.get("error") or "its own command goes on with it"
                failed.append(one_line(f"{summary.get('status')}: {shown(folder)}: {reason}"))
                continue
            runs.append(_run(folder, summary))
            if not summary["attacks"]:
                warnings.append(f"{shown(folder)}: was attacked by nothing, so it has a clean accuracy only")
            for name in changed_files(folder, summary, ("outcomes.npz", "results.jsonl")):
                warnings.append(f"{shown(folder)}: {name} is missing or changed; its numbers are from summary.json")
        except UserError as error:
            warnings.append(str(error))
    if not runs:
        return Overview([], failed, warnings)
    _add_settings_of_origin(runs)
    # Three groups of columns, because an attack may have the name of a setting.
    parts = {part: pd.DataFrame([run[part] for run in runs]) for part in ("run", "setting", "accuracy")}
    frame = pd.concat(parts, axis=1)
    kinds = frame.groupby([("run", name) for name in _COMPARABLE])
    tables = [_table(group["run"], group["setting"], group["accuracy"]) for _, group in kinds]
    if len(tables) > 1:
        differ = [name for name in _COMPARABLE if frame["run"][name].nunique() > 1]
        warnings.append(f"the runs differ in {' and '.join(differ)}: {len(tables)} tables, not to be compared")
    return Overview(tables, failed, warnings)


def _run(folder: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A finished run; its trainer and seed are those of its model, which an evaluated model has from its own run."""
    try:
        settings = {"checkpoint": None, **_settings(folder)}
        origin = summary.get("origin") or {}
        if origin:  # trainer and seed say whose model it is; only another of its checkpoints is a setting
            file = Path(str(settings["checkpoint"])).name
            settings["checkpoint"] = file if file.endswith(".pt") and file != "best.pt" else None
        seed = int(summary["seed"] if origin.get("seed") is None else origin["seed"])
        same_seed = re.compile(rf"^(transfer_.+)_seed{seed}(?=_refined$|$)")
        attacks = {same_seed.sub(r"\1_same_seed", name): attack for name, attack in summary["attacks"].items()}
        accuracy = {name: attack["robust_accuracy"] for name, attack in attacks.items()}
        accuracy = {"clean": summary["clean_accuracy"], **accuracy, "worst case": summary["worst_case_accuracy"]}
        dataset, samples = str(summary["dataset"]), int(summary["clean_accuracy"]["n"])
        norm, eps = str(settings.get("norm", "")), float(settings.get("eps", 0.0))
        run = {
            "dataset": dataset,
            "norm": norm,
            "eps": eps,
            "samples": samples,
            "heading": f"{dataset}, {norm} eps {eps_text(eps)}, {samples} test images",
            "trainer": str(origin.get("trainer") or summary["trainer"]),
            "model": str(summary.get("model")),
            "attack": "+".join(dict.fromkeys(k.split(".")[1] for k in settings if k.startswith("attack."))) or "none",
            "seed": seed,
            "masking": str((summary.get("masking") or {}).get("verdict") or ""),
            "outside": [name for name, attack in attacks.items() if not attack.get("counts", True)],
            "folder": folder,
            "run_id": str(summary.get("run_id")),
            "origin": origin,
        }
        values = {name: float(value["value"]) for name, value in accuracy.items() if value is not None}
        return {"run": run, "setting": _compared(settings), "accuracy": values}
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{shown(folder)}: its summary.json or config.yaml is damaged ({reason})") from error


def _add_settings_of_origin(runs: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Give evaluated models the settings of the trainer of their origin, where those can be read."""
    known = {run["run"]["run_id"]: run["setting"] for run in runs}
    for run in runs:
        if origin := run["run"]["origin"]:
            with contextlib.suppress(UserError):
                settings = known.get(str(origin.get("run_id"))) or _compared(_settings(Path(str(origin.get("folder")))))
                run["setting"] |= {key: text for key, text in settings.items() if key.startswith("trainer.")}


def _settings(folder: Path) -> dict[str, Any]:
    """The leaves of config.yaml by their dotted names."""
    return dict(pd.json_normalize([read_config(folder)]).to_dict("records")[0])


def _compared(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: _text(key, value) for key, value in settings.items() if not _NOT_COMPARED.match(key)}


def _text(key: str, value: Any) -> str:
    if key.endswith(".eps") and isinstance(value, float):
        return eps_text(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ----------------------------------------------------------------------------------------- grouping


def _table(runs: pd.DataFrame, settings: pd.DataFrame, accuracy: pd.DataFrame) -> Table:
    columns = ["trainer", *(name for name in ("model", "attack") if runs[name].nunique() > 1)]
    varied = pd.concat([runs[columns], settings[_varied(runs, settings)]], axis=1).fillna("")
    names = sorted(accuracy.columns[accuracy.notna().any()], key=lambda name: name == "worst case")
    again = varied.assign(seed=runs["seed"]).duplicated()
    notes = [f"not counted: {shown(run)}: another run has its seed and settings" for run in runs.loc[again, "folder"]]
    rows, texts, counted = [], [], []
    once = runs[~again].sort_values("seed", kind="stable")
    for words, group in once.groupby([varied[name] for name in varied], sort=False):
        values = 100 * accuracy.loc[group.index, names]
        stats = pd.DataFrame({"mean": values.mean(), "sd": values.std(), "n": values.count()})
        verdicts = group.loc[group["masking"] != "", "masking"].value_counts()
        masking = ", ".join(f"{verdict} {n}/{verdicts.sum()}" for verdict, n in verdicts.items())
        numbers = {f"{name.replace(' ', '_')}_{part}": stats.at[name, part] for name in names for part in stats}
        place = {name: group[name].iloc[0] for name in _COMPARABLE}
        setting = dict(zip(varied, words, strict=True))
        rows.append({**place, **setting, "n": len(group), **numbers, "masking": masking})
        cells = [_cell(stats.loc[name], len(group)) for name in names]
        texts.append([*words, str(len(group)), *cells, masking or "-"])
        label = ", ".join(filter(None, words))
        counted += [(f"{label}, seed {run.seed}", run.folder) for run in group.itertuples()]
    outside = [name for name in names if any(name in attacks for attacks in runs["outside"])]
    if outside:
        notes.append(f"* outside the threat model, so not in the worst case: {', '.join(outside)}")
    header = [*varied, "n", *(f"{name} *" if name in outside else name for name in names), "masking"]
    text = Grid(header, texts, [*varied, "masking"])
    return Table(runs["heading"].iloc[0], pd.DataFrame(rows), text, counted, notes)


def _varied(runs: pd.DataFrame, settings: pd.DataFrame) -> list[str]:
    """The settings that differ between runs of the same trainer, model or attack, if it is a setting of these."""
    varied: list[str] = []
    for key in settings:
        if any(settings[key].equals(settings[other]) for other in varied):
            continue  # a copy, by interpolation
        group, _, rest = key.partition(".")
        owner, values = pd.Series("", runs.index), settings[key].fillna("null")
        if group in ("trainer", "model"):
            owner, prefix = runs[group], f"{group}."
        elif group in ("attack", "analysis"):
            prefix = f"{group}.{rest.partition('.')[0]}."
        else:
            prefix = ""
        has_owner = settings[[name for name in settings if name.startswith(prefix)]].notna().any(axis=1)
        if (values[has_owner].groupby(owner).nunique() > 1).any():
            varied.append(key)
    return varied


def _cell(stats: "pd.Series[float]", seeds: int) -> str:
    """An accuracy as text; where fewer than all `seeds` have it, with their number."""
    mean, sd, n = stats["mean"], stats["sd"], int(stats["n"])
    if n == 0:
        return "-"
    return f"{mean:.1f}" + (f" ± {sd:.1f}" if n > 1 else "") + (f" (n={n})" if n < seeds else "")


# ------------------------------------------------------------------------------------------ writing


def show(overview: Overview) -> None:
    """Print the tables, and what is in none of them; no line with a path is wrapped."""
    console = Console()
    unlimited = console.options.update(max_width=10_000)
    for table in overview.tables:
        grid = table.text.rich()
        console.width = max(console.width, console.measure(grid, options=unlimited).maximum)
        console.print(Text(f"\n{table.heading}\n", style="bold"), soft_wrap=True)
        console.print(grid)
        for note in table.notes:
            console.print(Text(note), soft_wrap=True)
    if overview.tables:
        console.print(Text(f"\n{CAPTION}", style="dim"), soft_wrap=True)
    if overview.failed:
        console.print()
    for line in overview.failed:
        console.print(Text(line, style="red"), soft_wrap=True)


def write_tables(overview: Overview, out: Path) -> None:
    """Write table.md, table.csv and table.tex to the folder `out`, which is created; UserError if that fails."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "table.md", _markdown(overview))
    atomic_write(out / "table.tex", _latex(overview))
    numbers = pd.concat([table.numbers for table in overview.tables] or [pd.DataFrame()])
    atomic_write(out / "table.csv", numbers.to_csv(index=False, lineterminator="\n"))


def _markdown(overview: Overview) -> str:
    lines = []
    for table in overview.tables:
        grid = table.text
        rule = ["---" if name in grid.words else "--:" for name in grid.columns]
        rows = [map(_md, grid.columns), rule, *(map(_md, row) for row in grid.rows)]
        lines += [f"## {_md(table.heading)}", "", *(f"| {' | '.join(row)} |" for row in rows), "", CAPTION, ""]
        lines += [*(f"- {_md(note)}" for note in table.notes), ""]
    lines += [f"- {_md(line)}" for line in (*overview.failed, *overview.warnings)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


def _latex(overview: Overview) -> str:
    """One booktabs table for each set of comparable runs; headings and notes are comments."""
    lines = ["% needs \\usepackage{booktabs}"]
    for table in overview.tables:
        grid = table.text
        style = pd.DataFrame(grid.rows, columns=list(grid.columns)).style.hide(axis="index")
        style = style.format(escape="latex").format_index(escape="latex", axis="columns")
        alignment = "".join("l" if name in grid.words else "r" for name in grid.columns)
        text = style.to_latex(hrules=True, column_format=alignment).replace("±", r"$\pm$")
        lines += ["", f"% {table.heading}", text.rstrip("\n"), *(f"% {note}" for note in table.notes)]
    return "\n".join([*lines, *(f"% {line}" for line in (*overview.failed, *overview.warnings))]) + "\n"
