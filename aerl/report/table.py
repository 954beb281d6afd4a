"""The closing table of a run, from its summary.json alone: a finished run is shown again in no time."""

import os
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aerl.types import eps_text

_STATUS = {"finished": "green", "failed": "bold red"}


@dataclass(frozen=True)
class Grid:
    """A table of text, for terminals, pages and files."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str]  # the columns of words, aligned to the left; the others hold numbers

    def rich(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for index, name in enumerate(self.columns):
            fold: dict[str, Any] = {"no_wrap": True} if index else {"overflow": "fold", "min_width": min(len(name), 10)}
            table.add_column(Text(name), justify="left" if name in self.words else "right", **fold)
        for row in self.rows:  # Text and not str: rich reads square brackets in a name as markup
            table.add_row(*map(Text, row), style="bold" if row[0] == "worst case" else None)
        return table


def attack_grid(summary: Mapping[str, Any]) -> Grid:
    """Clean accuracy, every attack and the worst case, as far as they were measured."""
    rows: dict[str, Mapping[str, Any]] = {"clean": {"robust_accuracy": summary.get("clean_accuracy")}}
    for name, attack in (summary.get("attacks") or {}).items():
        rows[name if attack.get("counts", True) else f"{name} *"] = attack
    if worst := summary.get("worst_case_accuracy"):
        rows["worst case"] = {"robust_accuracy": worst}
    columns = ("attack", "norm", "eps", "accuracy", "95 % interval", "n", "time")
    return Grid(columns, [_attack_row(name, attack) for name, attack in rows.items()], ("attack", "norm"))


def _attack_row(name: str, attack: Mapping[str, Any]) -> list[str]:
    accuracy = attack.get("robust_accuracy") or {}
    value, low, high, n = (accuracy.get(key) for key in ("value", "low", "high", "n"))
    return [
        name,
        str(attack.get("norm") or ""),
        eps_text(attack["eps"]) if attack.get("eps") is not None else "",
        "-" if value is None else f"{100 * value:.1f} %",
        "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %",
        "-" if n is None else f"{n:d}",
        duration(attack["seconds"]) if attack.get("seconds") is not None else "",
    ]


def comparison_grid(comparison: Mapping[str, Any]) -> Grid:
    """The paired comparison with one other run, as `aerl.analyses.compare` writes it to the summary."""
    rows = []
    for name, row in comparison["rows"].items():
        p = f"{row['p']:.3f}" if row["p"] >= 0.001 else "<0.001"
        accuracies = [f"{100 * row[key]:.1f} %" for key in ("accuracy", "other_accuracy")]
        interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} %"
        cells = [*accuracies, f"{100 * row['difference']:+.1f} %", interval, str(row["b"]), str(row["c"]), p]
        rows.append(["worst case" if name == "worst_case" else name, *cells])
    return Grid(("attack", "this", "other", "difference", "95 % interval", "b", "c", "p"), rows, ("attack",))


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a run measured and where its files are; no line with a path or a command is wrapped."""
    if console is None:
        console = Console()
        console.width = max(console.width, 72)  # a narrower window wraps the rows; rich would cut the names
    status = str(summary.get("status", "unknown"))
    console.print(Text.assemble("\n", title(summary), ": ", (status, _STATUS.get(status, "yellow"))))
    if error := summary.get("error"):
        console.print(Text(str(error), style="red"), soft_wrap=True)
    console.print("", attack_grid(summary).rich(), "", sep="\n")
    for run, comparison in (summary.get("comparisons") or {}).items():
        console.print(Text(f"compared with {run}"), soft_wrap=True)
        console.print(Text("b: samples right here only, c: there only; p: McNemar's exact test\n", style="dim"))
        console.print(comparison_grid(comparison).rich(), "", sep="\n")
    for label, text in [*notes(summary), *places(summary)]:
        console.print(Text.assemble((f"{label:<11}", "dim"), text), soft_wrap=True)


def title(summary: Mapping[str, Any]) -> str:
    """Dataset, model, trainer and seed, as far as they are known; of a judged model those of its training."""
    known = {**summary, **(summary.get("origin") or {})}
    parts = [str(known[key]) for key in ("dataset", "model", "trainer") if known.get(key) is not None]
    if known.get("seed") is not None:
        parts.append(f"seed {known['seed']}")
    if summary.get("origin"):
        parts.append("judged")
    return ", ".join(parts) or str(summary.get("run_id", "run"))


def notes(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to know about the numbers of a run: label and text."""
    attacks = summary.get("attacks") or {}
    comparisons = summary.get("comparisons") or {}
    for doubt in summary.get("doubts") or ():
        yield "warning", f"model: {doubt}"
    if outside := [name for name, attack in attacks.items() if not attack.get("counts", True)]:
        yield "*", f"outside the run's threat model (norm, eps, box), so not in the worst case: {', '.join(outside)}"
    if not all(attack.get("alone", True) for attack in attacks.values()):
        yield "survivors", "each attack got only what those before it left; its accuracy is after all of these"
    for name, attack in attacks.items():
        yield from (("warning", f"{name}: {warning}") for warning in attack.get("warnings") or ())
    for run, comparison in comparisons.items():
        yield from (("warning", f"compared with {run}: {warning}") for warning in comparison["warnings"])
    for name, reason in (summary.get("not_made") or {}).items():
        yield "not made", f"{name}: {reason}"
    masking = summary.get("masking") or {}
    if verdict := masking.get("verdict"):
        yield "masking", str(verdict)
        if verdict != "no sign":
            yield "mechanism", str(masking["mechanism"])
            yield "trust", str(masking["trust"])
        for check in masking.get("checks", ()):
            if check["name"] == "paper_formula" and check["flag"]:
                yield "pgd_paper", str(check["says"])


def places(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How long a run took and where its files are: label and text."""
    if times := time_text(summary):
        yield "time", times
    folder = summary.get("folder")
    if folder is not None:
        yield "files", str(folder)
        if (page := Path(folder) / "report.html").is_file():
            yield "page", str(page)
    wandb = summary.get("wandb") or {}
    if wandb.get("url"):
        yield "W&B", str(wandb["url"])
    if wandb.get("path") and wandb.get("mode") != "online":  # the path may be relative to the folder
        state = "offline" if wandb.get("mode") == "offline" else "incomplete"
        yield "W&B", f"{state}; to upload: wandb sync {shlex.quote(str(Path(folder or '') / wandb['path']))}"


def time_text(summary: Mapping[str, Any]) -> str:
    """How long training and the attacks took."""
    seconds = summary.get("seconds") or {}
    epochs = f" ({summary['epochs']} epochs)" if summary.get("epochs") else ""
    parts = (("train", "training {}" + epochs), ("attack", "attacks {}"))
    return ", ".join(text.format(duration(seconds[key])) for key, text in parts if seconds.get(key) is not None)


def duration(seconds: float) -> str:
    """Seconds as people read them: 1.6 s, 2 min 12 s, 2 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shown(path: Path) -> str:
    """A path as a person would type it: relative where it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
