"""Many runs at a glance: means over the seeds, grouped by what varied, from the run folders' files alone.

Nothing here imports torch or Hydra: a set of runs is told in a second.
"""

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aerl.runtime.files import atomic_write, write_csv
from aerl.tracking.results import changed_files, read_config, read_summary
from aerl.types import UserError, eps_text, first_line

CLEAN, WORST = "clean", "worst case"

# Settings that do not change what a number means, or that the table tells in another way: the number of samples
# in the heading, the sources of transferred examples in the attacks' names.
_TOLD_OTHERWISE = re.compile(
    r"(seed|name|norm|eps|runs_dir|data_dir|overwrite|prepare_data_only|evaluation\.(samples|batch_size)|trainer)$"
    r"|(dataset|model|trainer)\.name$|attack\.\w+\.sources$|logger\.|analysis(?!\.masking\.)"
)


@dataclass(frozen=True)
class Run:
    """A finished run. `trainer` and `seed` are those of the model: of a judged run its origin's, if it has one."""

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]  # the leaves of config.yaml by their dotted names, as they are compared
    trainer: str
    seed: int
    attacks: Mapping[str, Mapping[str, Any]]  # as in summary.json; a source of the same seed is called so
    accuracies: Mapping[str, float]  # clean, every attack and worst case, in [0, 1]

    @property
    def comparable(self) -> tuple[str, str, float, int]:
        """Dataset, norm, eps and number of samples: what two runs must share to stand in one table."""
        return (
            str(self.summary["dataset"]),
            str(self.settings.get("norm", "")),
            float(self.settings.get("eps", math.nan)),
            int(self.summary["clean_accuracy"]["n"]),
        )


@dataclass(frozen=True)
class Spread:
    """An accuracy over the `n` seeds that measured it: `mean` and sample standard deviation `sd`, in [0, 1]."""

    mean: float
    sd: float | None  # None of a single value
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        if not values:
            return None
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))


@dataclass(frozen=True)
class Row:
    """The runs of one setting, one for each seed."""

    told: Mapping[str, str]  # what varied
    runs: Sequence[Run]
    accuracies: Mapping[str, Spread | None]
    masking: str

    @property
    def label(self) -> str:
        return ", ".join(text for text in self.told.values() if text) or "all runs"


@dataclass(frozen=True)
class Section:
    """Runs whose accuracies can be compared."""

    dataset: str
    norm: str
    eps: float
    samples: int
    told: Sequence[str]  # the columns that say what varied
    attacks: Sequence[str]
    aside: Collection[str]  # the attacks that are in no worst case
    rows: Sequence[Row]
    notes: Sequence[str]

    @property
    def heading(self) -> str:
        threat = f", {self.norm} eps {eps_text(self.eps)}" if self.norm else ""
        return f"{self.dataset}{threat}, {self.samples} test images"

    @property
    def measured(self) -> list[str]:
        worst = any(row.accuracies[WORST] for row in self.rows)
        return [CLEAN, *self.attacks, *([WORST] if worst else [])]


@dataclass(frozen=True)
class Overview:
    """What is known of a set of runs: tables, who is in none of them and why, and what else must be said."""

    sections: Sequence[Section]
    failed: Sequence[str]
    doubts: Sequence[str] = field(default=())


# ------------------------------------------------------------------------------------------ reading


def run_folders(folder: Path) -> list[Path]:
    """Every run folder in `folder`, itself among them, in the order of their names; UserError if there is none."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("wandb", "checkpoints", "figures")]
        if "summary.json" in files:
            found.append(Path(place))
    if not found:
        raise UserError(f"{folder}: {'holds no run' if folder.is_dir() else 'no such folder'} (no summary.json)")
    return sorted(found)


def overview(folders: Iterable[Path], failed: Iterable[str] = ()) -> Overview:
    """The tables over these run folders; `failed` tells of runs that left no folder, one line each."""
    failed, doubts, runs = list(failed), [], []
    for folder in folders:
        try:
            summary = read_summary(folder)
            if summary is None:
                doubts.append(f"{shown(folder)}: no summary.json")
            elif summary.get("status") == "finished":
                runs.append(_run(folder, summary))
                doubts += _missing(folder, summary)
            else:
                failed.append(_unfinished(folder, summary))
        except UserError as error:
            doubts.append(str(error))
    runs = [_with_origin(run, runs) for run in runs]
    kinds = sorted({run.comparable for run in runs})
    if len(kinds) > 1:
        parts = zip(("dataset", "norm", "eps", "number of samples"), zip(*kinds, strict=True), strict=True)
        differ = [name for name, values in parts if len(set(values)) > 1]
        doubts.append(f"the runs differ in {' and '.join(differ)}: {len(kinds)} tables, not to be compared")
    sections = [_section(kind, [run for run in runs if run.comparable == kind]) for kind in kinds]
    return Overview(sections, failed, doubts)


def _run(folder: Path, summary: Mapping[str, Any]) -> Run:
    try:
        settings = _settings(folder)
        origin = summary.get("origin") or {}
        if origin:  # whose weights were judged is told by trainer and seed; which of its weights, here
            file = Path(str(settings.pop("checkpoint"))).name
            settings["checkpoint"] = file if file.endswith(".pt") and file != "best.pt" else None
        seed = int(summary["seed"] if origin.get("seed") is None else origin["seed"])
        attacks = {
            re.sub(rf"^(transfer_.+)_seed{seed}(?=_refined$|$)", r"\1_same_seed", name): told
            for name, told in summary["attacks"].items()
        }
        accuracies = {CLEAN: summary["clean_accuracy"]["value"]}
        accuracies |= {name: told["robust_accuracy"]["value"] for name, told in attacks.items()}
        if summary["worst_case_accuracy"] is not None:
            accuracies[WORST] = summary["worst_case_accuracy"]["value"]
        run = Run(
            folder,
            summary,
            settings,
            trainer=str(origin.get("trainer") or summary["trainer"]),
            seed=seed,
            attacks=attacks,
            accuracies={name: float(value) for name, value in accuracies.items()},
        )
        assert run.comparable
        return run
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{shown(folder)}: its summary.json or config.yaml is damaged ({what})") from error


def _settings(folder: Path) -> dict[str, Any]:
    return dict(leaves(read_config(folder)))


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by their dotted names."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _missing(folder: Path, summary: Mapping[str, Any]) -> Iterator[str]:
    if not summary["attacks"]:
        yield f"{shown(folder)}: was attacked by nothing, so it has a clean accuracy only"
    elif not (folder / "outcomes.npz").is_file():
        yield f"{shown(folder)}: has no outcomes.npz; its numbers are those of summary.json"
    for name in changed_files(folder, summary, ("outcomes.npz", "results.jsonl")):
        if (folder / name).is_file() or name != "outcomes.npz":
            yield f"{shown(folder)}: {name} is missing or changed; the run's numbers are those of summary.json"


def _unfinished(folder: Path, summary: Mapping[str, Any]) -> str:
    if summary.get("status") == "failed":
        return f"failed: {shown(folder)}: {one_line(summary.get('error'))}"
    return f"unfinished: {shown(folder)}: {one_line(summary.get('status'))}; its own command goes on with it"


def _with_origin(run: Run, runs: Sequence[Run]) -> Run:
    """A judged run with its origin's settings of the trainer, where those can be found."""
    origin = run.summary.get("origin")
    if not origin:
        return run
    trained = next((other for other in runs if other.summary.get("run_id") == origin.get("run_id")), None)
    try:
        settings = trained.settings if trained else _settings(Path(origin["folder"]))
    except (UserError, ValueError, KeyError, TypeError):
        return run
    theirs = {key: value for key, value in settings.items() if key.startswith("trainer.")}
    return replace(run, settings={**run.settings, **theirs})


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


# ----------------------------------------------------------------------------------------- grouping


def _section(kind: tuple[str, str, float, int], runs: Sequence[Run]) -> Section:
    told = ["trainer"]
    told += ["model"] if len({_model(run) for run in runs}) > 1 else []
    told += ["attack"] if len({_attacks(run) for run in runs}) > 1 else []
    told += _varied(runs)
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        names = {"trainer": run.trainer, "model": _model(run), "attack": _attacks(run)}
        texts = (names[key] if key in names else _text(key, run.settings.get(key, "")) for key in told)
        groups.setdefault(tuple(texts), []).append(run)
    attacks = list(dict.fromkeys(name for run in runs for name in run.attacks))
    aside = [name for name in attacks if any(not run.attacks.get(name, {}).get("counts", True) for run in runs)]
    rows, notes = [], []
    for words, members in groups.items():
        of_seed: dict[int, Run] = {}
        for run in members:
            if (counted := of_seed.setdefault(run.seed, run)) is not run:
                notes.append(f"not counted: {shown(run.folder)}: seed {run.seed} of its row is {shown(counted.folder)}")
        seeds = [of_seed[seed] for seed in sorted(of_seed)]
        rows.append(_row(dict(zip(told, words, strict=True)), seeds, [CLEAN, *attacks, WORST]))
    if aside:
        notes.append(f"* not in the worst case, being outside the threat model: {', '.join(aside)}")
    return Section(*kind, told, attacks, aside, rows, notes)


def _row(told: Mapping[str, str], runs: Sequence[Run], measured: Sequence[str]) -> Row:
    accuracies = {
        name: Spread.of([run.accuracies[name] for run in runs if name in run.accuracies]) for name in measured
    }
    audits = [run.summary.get("masking") or {} for run in runs]
    verdicts = Counter(str(audit["verdict"]) for audit in audits if audit.get("verdict"))
    masking = ", ".join(f"{verdict} {n}/{verdicts.total()}" for verdict, n in verdicts.most_common())
    return Row(told, runs, accuracies, masking)


def _varied(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ that have the same trainer and model, and the attack, if it is one of its."""
    varied: list[str] = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        if _TOLD_OTHERWISE.match(key) or key == "attack":
            continue
        if any(all(run.settings.get(key) == run.settings.get(other) for run in runs) for other in varied):
            continue  # a copy, by interpolation
        values: dict[str, set[str]] = {}
        for run in runs:
            if (owner := _owner(key, run)) is not None:
                values.setdefault(owner, set()).add(json.dumps(run.settings.get(key), sort_keys=True, default=str))
        if any(len(different) > 1 for different in values.values()):
            varied.append(key)
    return varied


def _owner(key: str, run: Run) -> str | None:
    """Within what this setting of the run is compared; None where it has no say."""
    group, _, rest = key.partition(".")
    if group == "trainer":
        return run.trainer if any(name.startswith("trainer.") for name in run.settings) else None
    if group == "model":
        return _model(run)
    if group in ("attack", "analysis"):
        prefix = f"{group}.{rest.partition('.')[0]}."
        return prefix if any(name.startswith(prefix) for name in run.settings) else None
    return ""


def _model(run: Run) -> str:
    return str(run.summary.get("model"))


def _attacks(run: Run) -> str:
    names = dict.fromkeys(key.split(".")[1] for key in run.settings if key.startswith("attack."))
    return "+".join(names) or "none"


def _text(key: str, value: Any) -> str:
    if key.endswith(".eps") and isinstance(value, float):
        return eps_text(value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ------------------------------------------------------------------------------------------ writing


def percent(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    deviation = "" if spread.sd is None else f" ± {100 * spread.sd:.1f}"
    return f"{100 * spread.mean:.1f}{deviation}"


def cells(section: Section, row: Row) -> list[str]:
    """The row under `header(section)`; an accuracy that fewer seeds have than the row says of how many it is."""
    n = len(row.runs)
    accuracies = []
    for name in section.measured:
        spread = row.accuracies[name]
        fewer = f" (n={spread.n})" if spread and spread.n < n else ""
        accuracies.append(percent(spread) + fewer)
    return [*row.told.values(), str(n), *accuracies, row.masking or "-"]


def header(section: Section) -> list[str]:
    names = [f"{name} *" if name in section.aside else name for name in section.measured]
    return [*section.told, "n", *names, "masking"]


CAPTION = "Accuracies in %: mean ± sample standard deviation over the n seeds."


def show(overview: Overview, console: Console | None = None) -> None:
    """Print the tables and what is in none of them; no line of a path is wrapped."""
    console = console or Console()
    for section in overview.sections:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for name in header(section):
            words = name in (*section.told, "masking")
            table.add_column(Text(name), no_wrap=True, justify="left" if words else "right")
        for row in section.rows:
            table.add_row(*map(Text, cells(section, row)))
        unlimited = console.options.update(max_width=10_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
        console.print()
        console.print(Text(section.heading, style="bold"), soft_wrap=True)
        console.print()
        console.print(table)
        for note in section.notes:
            console.print(Text(note), soft_wrap=True)
    if overview.sections:
        console.print()
        console.print(Text(CAPTION, style="dim"), soft_wrap=True)
    if overview.failed:
        console.print()
    for line in overview.failed:
        console.print(Text(line, style="red"), soft_wrap=True)


def write_tables(overview: Overview, out: Path) -> None:
    """Write table.md, table.csv and table.tex to the folder `out`, which is made; UserError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    atomic_write(out / "table.md", _markdown(overview))
    atomic_write(out / "table.tex", _latex(overview))
    write_csv(out / "table.csv", *_tidy(overview))


def _markdown(overview: Overview) -> str:
    lines = []
    for section in overview.sections:
        lines += [f"## {_md(section.heading)}", ""]
        numbers = len(section.measured) + 1
        rule = ["---"] * len(section.told) + ["--:"] * numbers + ["---"]
        rows = [header(section), rule, *(cells(section, row) for row in section.rows)]
        lines += [f"| {' | '.join(map(_md, row))} |" for row in rows]
        lines += ["", *(f"- {_md(note)}" for note in section.notes), *([""] if section.notes else [])]
    if overview.sections:
        lines += [CAPTION, ""]
    told = [*overview.failed, *overview.doubts]
    return "\n".join([*lines, *(f"- {_md(line)}" for line in told)]).rstrip("\n") + "\n"


def _md(text: str) -> str:
    return re.sub(r"([\\|*_`<>\[\]])", r"\\\1", text)


_TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _latex(overview: Overview) -> str:
    """One booktabs table for each section; what is in no table stands beside it as comments."""
    lines = ["% needs \\usepackage{booktabs}"]
    for section in overview.sections:
        columns = "l" * len(section.told) + "r" * (len(section.measured) + 1) + "l"
        lines += ["", f"% {section.heading}", f"\\begin{{tabular}}{{{columns}}}", r"\toprule"]
        lines += [f"{' & '.join(map(_tex, header(section)))} \\\\", r"\midrule"]
        for row in section.rows:
            lines.append(f"{' & '.join(map(_tex, cells(section, row)))} \\\\")
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in section.notes)]
    return "\n".join([*lines, "", *(f"% {line}" for line in [*overview.failed, *overview.doubts])]) + "\n"


def _tidy(overview: Overview) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of one table over all sections, in per cent and unrounded."""
    told = list(dict.fromkeys(name for section in overview.sections for name in section.told))
    measured = list(dict.fromkeys(name for section in overview.sections for name in section.measured))
    kinds = [f"{name.replace(' ', '_')}_{kind}" for name in measured for kind in ("mean", "sd", "n")]
    rows = []
    for section in overview.sections:
        for row in section.rows:
            numbers: list[Any] = []
            for name in measured:
                spread = row.accuracies.get(name)
                sd = None if spread is None or spread.sd is None else 100 * spread.sd
                numbers += [100 * spread.mean, sd, spread.n] if spread else [None, None, 0]
            place = [section.dataset, section.norm, section.eps, section.samples]
            rows.append([*place, *(row.told.get(name) for name in told), len(row.runs), *numbers, row.masking])
    return ["dataset", "norm", "eps", "samples", *told, "n", *kinds, "masking"], rows
