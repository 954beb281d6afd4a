"""Tables over many runs, from the files of their folders alone: means over the seeds, grouped by what varied."""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.text import Text

from aerl.config.names import leaves
from aerl.errors import UserError
from aerl.evaluation.statistics import crossed_difference, crossed_interval, holm, reward
from aerl.report import page
from aerl.report.table import Grid, shown, wide_console
from aerl.runtime.files import atomic_write, load_arrays, writing
from aerl.runtime.terminal import eps_text, one_line
from aerl.tracking.results import changed_files, find_runs, read_config, read_summary

log = logging.getLogger("aerl")

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
    differences: Grid | None  # of the worst case between settings, with at least two seeds each
    numbers: pd.DataFrame  # in per cent: <accuracy>_mean, _sd and _n, after what varied
    text: Grid
    runs: pd.DataFrame  # those that are counted: trainer, clean, worst (in per cent) and seconds of training
    folders: Sequence[Path]  # theirs
    notes: Sequence[str]


@dataclass(frozen=True)
class Overview:
    """The tables over a set of runs; `warnings` say which runs are in none of them, and what else to know."""

    tables: Sequence[Table]
    warnings: Sequence[str]


def run_folders(folder: Path) -> list[Path]:
    """Every run folder in `folder`, itself included, sorted by name; UserError if there is none."""
    if runs := find_runs(folder):
        return runs
    raise UserError(f"{folder}: {'contains no run' if folder.is_dir() else 'no such folder'} (no summary.json)")


def load_runs(folder: str | Path = "runs") -> pd.DataFrame:
    """A row for each run in a folder, at any depth, finished or not.

    Columns: `folder`, `status`, `dataset`, `model`, `trainer`, `seed` (of an evaluated model those of its training),
    `norm`, `eps`, `n` images; in [0, 1] `clean`, a column for each attack, and `worst_case`, with the ends of their
    95 % intervals in `<name>_low` and `<name>_high`; `masking` (the verdict), `planted` (the share found), `seconds`
    of training; and every setting by its dotted name. A run that cannot be read is left out, with a warning. Raises
    UserError if there is none.
    """
    rows = []
    for run in run_folders(Path(folder).expanduser()):
        try:
            rows.append(_row(run))
        except (UserError, LookupError, TypeError, ValueError) as error:
            log.warning("%s: left out (%s)", shown(run), error)
    return pd.DataFrame(rows)


def _row(run: Path) -> dict[str, Any]:
    summary = read_summary(run) or {}
    config = read_config(run, summary)
    trained = summary.get("origin") or summary
    found = {"clean": summary.get("clean_accuracy"), "worst_case": summary.get("worst_case_accuracy")}
    found |= {name: info["robust_accuracy"] for name, info in (summary.get("attacks") or {}).items()}
    accuracies: dict[str, float] = {}
    for name, accuracy in found.items():
        if accuracy:
            ends = {f"{name}_{end}": accuracy[end] for end in ("low", "high")}
            accuracies |= {name: accuracy["value"], **ends}
    return {
        "folder": str(run), "status": summary["status"], "dataset": summary["dataset"], "model": summary["model"],
        "trainer": trained["trainer"], "seed": trained["seed"], "norm": config["norm"], "eps": config["eps"],
        "n": (summary.get("clean_accuracy") or {}).get("n"), **accuracies,
        "masking": (summary.get("masking") or {}).get("verdict"),
        "planted": ((summary.get("planted") or {}).get("found") or {}).get("value"),
        "seconds": (summary.get("seconds") or {}).get("train"),
        **{key: value for key, value in leaves(config) if "." in key},
    }  # fmt: skip


def overview(folders: Iterable[Path], warnings: Iterable[str] = ()) -> Overview:
    """The tables over these run folders; `warnings` are about runs that have no folder."""
    warnings, runs = list(warnings), []
    for folder in folders:
        try:
            if (summary := read_summary(folder)) is None:
                raise UserError(f"{shown(folder)}: no summary.json")
            if summary["status"] != "finished":
                reason = summary.get("error") or "the same command resumes"
                raise UserError(f"{summary['status']}: {shown(folder)}: {reason}")
            runs.append(_read(folder, summary))
            for name in changed_files(folder, summary, ("outcomes.npz", "results.jsonl")):
                warnings.append(f"{shown(folder)}: {name} is missing or changed; its numbers are from summary.json")
        except UserError as error:
            warnings.append(one_line(str(error)))
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            warnings.append(f"{shown(folder)}: summary.json or config.yaml is damaged ({reason})")
    _add_settings_of_origin(runs)
    frames = {part: pd.DataFrame([run[part] for run in runs]) for part in ("about", "settings", "accuracy")}
    groups = frames["about"].groupby(_COMPARABLE) if runs else ()
    return Overview([_table(*(frame.loc[group.index] for frame in frames.values())) for _, group in groups], warnings)


def _read(folder: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A finished run; an evaluated model has the trainer and the seed of its own run, its origin."""
    config, origin = read_config(folder), summary["origin"] or {}
    seed = int(summary["seed"] if origin.get("seed") is None else origin["seed"])
    same_seed = re.compile(rf"^(transfer_.+)_seed{seed}(?=_refined$|$)")
    attacks = {same_seed.sub(r"\1_same_seed", name): attack for name, attack in summary["attacks"].items()}
    accuracy = {"clean": summary["clean_accuracy"]}
    accuracy |= {name: attack["robust_accuracy"] for name, attack in attacks.items()}
    accuracy |= {f"worst case at {eps_text(row['eps'])}": row for row in (summary.get("worst_case_by_eps") or ())[:-1]}
    accuracy |= {"worst case": summary["worst_case_accuracy"]}
    about = {
        "dataset": str(summary["dataset"]),
        "norm": str(config["norm"]),
        "eps": float(config["eps"]),
        "samples": int(summary["clean_accuracy"]["n"]),
        "trainer": str(origin.get("trainer") or summary["trainer"]),
        "model": str(summary["model"]),
        "attack": "+".join(config["attack"]) or "none",
        "seed": seed,
        "seconds": (summary.get("seconds") or {}).get("train"),
        "masking": (summary.get("masking") or {}).get("verdict", ""),
        "outside": [name for name, attack in attacks.items() if not attack["counts"]],
        "folder": folder,
        "run_id": summary["run_id"],
        "withheld": summary.get("normalization") == "withheld",
        "origin": origin,
    }
    settings = _settings(config)
    if origin:  # its trainer and seed say whose model it is; only another of its checkpoints is a setting
        file = Path(config["checkpoint"]).name
        settings["checkpoint"] = file if file.endswith(".pt") and file != "best.pt" else "null"
    values = {name: 100 * float(value["value"]) for name, value in accuracy.items() if value is not None}
    about["rewards"] = _rewards(
        folder, config, [name for name, attack in summary["attacks"].items() if attack["counts"]]
    )
    return {"about": about, "settings": settings, "accuracy": values}


def _rewards(folder: Path, config: Mapping[str, Any], counted: Sequence[str]) -> np.ndarray | None:
    """The worst-case reward (n,) of each sample, from outcomes.npz; None if the run has none."""
    try:
        outcomes = load_arrays(folder / "outcomes.npz")
        return reward(outcomes, counted, config["evaluation"]["policy"]) if counted else None
    except (UserError, LookupError):
        return None


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that are compared, by dotted names."""
    leaves = pd.json_normalize([dict(config)]).to_dict("records")[0]
    return {key: _text(key, value) for key, value in leaves.items() if not _NOT_COMPARED.match(key)}


def _text(key: str, value: Any) -> str:
    if key.endswith(".eps") and isinstance(value, float):
        return eps_text(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _add_settings_of_origin(runs: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Give evaluated models the settings of their training: without them, two models of one seed look the same."""
    known = {run["about"]["run_id"]: run["settings"] for run in runs}
    for run in runs:
        if origin := run["about"]["origin"]:
            with contextlib.suppress(UserError):
                settings = known.get(origin["run_id"]) or _settings(read_config(Path(origin["folder"])))
                run["settings"] |= {key: text for key, text in settings.items() if key.startswith("trainer.")}


def _table(runs: pd.DataFrame, settings: pd.DataFrame, accuracy: pd.DataFrame) -> Table:
    """The table over comparable runs, which are the rows of the three frames."""
    columns = ["trainer", *(name for name in ("model", "attack") if runs[name].nunique() > 1)]
    varied = runs[columns].join(settings[_varied(runs, settings)]).fillna("")
    again = varied.assign(seed=runs["seed"]).duplicated()
    notes = [f"not counted: {shown(run)}: same settings and seed as another run" for run in runs.loc[again, "folder"]]
    names = sorted(accuracy.columns[accuracy.notna().any()], key=lambda name: name.startswith("worst case"))
    outside = [name for name in names if any(name in attacks for attacks in runs["outside"])]
    if outside:
        notes.append(f"{' *, '.join(outside)} *: outside the threat model, not in the worst case")

    if withheld := int(runs.loc[~again, "withheld"].sum()):
        notes.append(f"{withheld} of {(~again).sum()} runs were judged without the normalisation of their training")

    rows, texts = [], []
    rewards: dict[str, np.ndarray] = {}  # of each setting, (seeds, n)
    for words, group in runs[~again].groupby([varied[name] for name in varied], sort=False):
        values = accuracy.loc[group.index, names]
        stats = pd.DataFrame({"mean": values.mean(), "sd": values.std(), "n": values.count()})
        verdicts = group.loc[group["masking"] != "", "masking"].value_counts()
        masking = ", ".join(f"{verdict} {n}/{verdicts.sum()}" for verdict, n in verdicts.items())
        numbers = {f"{name}_{part}".replace(" ", "_"): stats.at[name, part] for name in names for part in stats}
        if all(each is not None for each in group["rewards"]):
            rewards[" ".join(filter(None, words))] = np.stack(list(group["rewards"]))
            low, high = (100 * end for end in crossed_interval(np.stack(list(group["rewards"]))))
            numbers |= {"worst_case_low": low, "worst_case_high": high}
        setting = {**group[_COMPARABLE].iloc[0], **dict(zip(varied, words, strict=True))}
        rows.append({**setting, "n": len(group), **numbers, "masking": masking})
        cells = [_cell(*stats.loc[name], seeds=len(group)) for name in names]
        interval = f"{low:.1f} to {high:.1f}" if "worst_case_low" in numbers else "-"
        texts.append([*words, str(len(group)), *cells, interval, masking or "-"])
    header = [*varied, "n", *(f"{name} *" if name in outside else name for name in names), "95 % interval", "masking"]
    first = runs.iloc[0]
    heading = f"{first['dataset']}, {first['norm']} eps {eps_text(first['eps'])}, {first['samples']} test images"
    grid = Grid(header, texts, [*varied, "masking"])
    each = runs.loc[~again, ["trainer", "seconds"]].join(accuracy.rename(columns={"worst case": "worst"}))
    each = each.reindex(columns=["trainer", "clean", "worst", "seconds"])
    return Table(
        heading, _differences(rewards), pd.DataFrame(rows), grid, each, list(runs.loc[~again, "folder"]), notes
    )


def _differences(rewards: Mapping[str, np.ndarray]) -> Grid | None:
    """Every pair of at most six settings, over the same samples and independent seeds; p is corrected by Holm."""
    able = {name: each for name, each in rewards.items() if len(each) > 1}
    pairs = list(itertools.combinations(able, 2)) if len(able) <= 6 else []
    if not pairs:
        return None
    found = [crossed_difference(able[first], able[second]) for first, second in pairs]
    corrected = holm([p for *_, p in found])
    rows = [
        [
            first,
            second,
            f"{100 * value:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{p:.3f}" if p >= 0.001 else "<0.001",
        ]
        for (first, second), (value, low, high, _), p in zip(pairs, found, corrected, strict=True)
    ]
    return Grid(("setting", "other", "difference", "95 % interval", "p (Holm)"), rows, ("setting", "other"))


def _cell(mean: float, sd: float, n: float, *, seeds: int) -> str:
    """An accuracy as text; with the number of seeds that have one, if not all do."""
    if n == 0:
        return "-"
    return f"{mean:.1f}" + (f" ± {sd:.1f}" if n > 1 else "") + (f" (n={n:.0f})" if n < seeds else "")


def _varied(runs: pd.DataFrame, settings: pd.DataFrame) -> list[str]:
    """The settings that differ between runs of the same trainer or model, or with the same attack or analysis."""
    varied: list[str] = []
    for key in settings:
        group, _, rest = key.partition(".")
        owner = f"{group}.{rest.partition('.')[0]}" if group in ("attack", "analysis") else group
        has_owner = settings.filter(regex=rf"^{re.escape(owner)}(\.|$)").notna().any(axis=1)
        values = settings.loc[has_owner, key].fillna("null")
        same = runs[group if group in ("trainer", "model") else "dataset"]  # the dataset is the same in all of them
        copy = any(settings[key].equals(settings[other]) for other in varied)  # by interpolation
        if not copy and (values.groupby(same).nunique() > 1).any():
            varied.append(key)
    return varied


def publish(overview: Overview, out: Path) -> None:
    """Print the tables, and write them to the folder `out`: report.html, table.md, table.csv and table.tex."""
    console = wide_console()
    for table in overview.tables:
        console.print(Text(f"\n{table.heading}\n", style="bold"), table.text.rich(), *map(Text, table.notes), sep="\n")
        if table.differences:
            console.print("", Text("Differences of the worst case, in points"), table.differences.rich(), sep="\n")
    if overview.tables:
        console.print(Text(f"\n{page.CAPTION}", style="dim"))
    if overview.warnings:
        console.print("", *(Text(line, style="red") for line in overview.warnings), sep="\n")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "table.md", _document(overview, _markdown, ""))
    atomic_write(out / "table.tex", _document(overview, _latex, "% "))
    numbers = pd.concat([table.numbers for table in overview.tables] or [pd.DataFrame()])
    atomic_write(out / "table.csv", numbers.to_csv(index=False, lineterminator="\n"))
    page.write_set(overview, out)
    print(f"\nwritten: {shown(out / page.NAME)}, and next to it table.md, table.csv, table.tex")


def _document(overview: Overview, render: Callable[[Grid], str], comment: str) -> str:
    """All tables as `render` writes them; headings and notes are comments."""
    parts = []
    for table in overview.tables:
        about = (f"{comment}{line}" for line in (page.CAPTION, *table.notes))
        parts += [f"{comment}{table.heading}", render(table.text), *about]
        if table.differences:
            parts += [f"{comment}Differences of the worst case, in points", render(table.differences)]
    return "\n\n".join([*parts, *(f"{comment}{line}" for line in overview.warnings)]) + "\n"


def _markdown(grid: Grid) -> str:
    rule = ["---" if name in grid.words else "--:" for name in grid.columns]
    rows = [[re.sub(r"([\\|*_`<>\[\]])", r"\\\1", cell) for cell in row] for row in (grid.columns, *grid.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _latex(grid: Grid) -> str:
    """A table for the package booktabs."""
    style = pd.DataFrame(grid.rows, columns=list(grid.columns)).style.hide(axis="index")
    style = style.format(escape="latex").format_index(escape="latex", axis="columns")
    alignment = "".join("l" if name in grid.words else "r" for name in grid.columns)
    return str(style.to_latex(hrules=True, column_format=alignment)).replace("±", r"$\pm$").rstrip("\n")
