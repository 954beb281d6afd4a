"""The closing table of a run, from its summary.json alone: a finished run is shown again in no time."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aerl.types import eps_text

_STATUS = {"finished": "green", "failed": "bold red"}


def results_table(summary: Mapping[str, Any]) -> Table:
    """Clean accuracy, every attack and the worst case; what was not measured is shown as a dash."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("attack", overflow="fold", min_width=10)
    table.add_column("norm", no_wrap=True)
    for name in ("eps", "accuracy", "95 % interval", "n", "time"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_row(*_cells("clean", {}, summary.get("clean_accuracy")))
    for name, attack in (summary.get("attacks") or {}).items():
        shown = name if attack.get("counts", True) else f"{name} *"
        table.add_row(*_cells(shown, attack, attack.get("robust_accuracy")))
    if worst := summary.get("worst_case_accuracy"):
        table.add_section()
        table.add_row(*_cells("worst case", {}, worst), style="bold")
    return table


def comparison_table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The paired comparison with one other run, as `aerl.analyses.compare` leaves it in the summary."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("attack", overflow="fold", min_width=10)
    for name in ("this", "other", "difference", "95 % interval", "b", "c", "p"):
        table.add_column(name, no_wrap=True, justify="right")
    for name, row in rows.items():
        cells = [
            name.replace("_", " ") if name == "worst_case" else name,
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['other_accuracy']:.1f} %",
            f"{100 * row['difference']:+.1f} %",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} %",
            str(row["b"]),
            str(row["c"]),
            f"{row['p']:.3f}" if row["p"] >= 0.001 else "<0.001",
        ]
        table.add_row(*map(Text, cells))
    return table


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a run found and where its files are, on standard output unless told otherwise.

    `folder` is the run folder, `wandb.path` may be relative to it. No line of paths or commands is
    wrapped, so that each can be copied as it stands.
    """
    if console is None:
        console = Console()
        # A narrower window wraps the rows; rich would leave out their names instead.
        console.width = max(console.width, 72)
    status = str(summary.get("status", "unknown"))
    console.print()
    console.print(Text.assemble(what(summary), ": ", (status, _STATUS.get(status, "yellow"))))
    if error := summary.get("error"):
        console.print(Text(str(error), style="red"), soft_wrap=True)
    console.print()
    console.print(results_table(summary))
    console.print()
    for run, comparison in (summary.get("comparisons") or {}).items():
        console.print(Text(f"compared with {run}"), soft_wrap=True)
        console.print(Text("b: samples right here only, c: there only; p: McNemar's exact test", style="dim"))
        console.print()
        console.print(comparison_table(comparison["rows"]))
        console.print()
    for label, text in notes(summary):
        console.print(Text.assemble((f"{label:<11}", "dim"), text), soft_wrap=True)


def what(summary: Mapping[str, Any]) -> str:
    """Dataset, model, trainer and seed, as far as they are known; of a judged model, those it was trained by."""
    told = {**summary, **(summary.get("origin") or {})}
    parts = [str(told[key]) for key in ("dataset", "model", "trainer") if told.get(key) is not None]
    if told.get("seed") is not None:
        parts.append(f"seed {told['seed']}")
    if summary.get("origin"):
        parts.append("judged")
    return ", ".join(parts) or str(summary.get("run_id", "run"))


def _cells(name: str, attack: Mapping[str, Any], accuracy: Mapping[str, Any] | None) -> list[Text]:
    """One row; Text and not str, so that a name with square brackets is not read as markup."""
    accuracy = accuracy or {}
    value, low, high, n = (accuracy.get(key) for key in ("value", "low", "high", "n"))
    cells = [
        name,
        str(attack.get("norm") or ""),
        eps_text(attack["eps"]) if attack.get("eps") is not None else "",
        "-" if value is None else f"{100 * value:.1f} %",
        "-" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f} %",
        "-" if n is None else f"{n:d}",
        duration(attack["seconds"]) if attack.get("seconds") is not None else "",
    ]
    return [Text(cell) for cell in cells]


def duration(seconds: float) -> str:
    """Seconds as people read them: 1.6 s, 2 min 12 s, 2 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def notes(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines below the table of a run: label and text."""
    for doubt in summary.get("doubts") or ():
        yield "warning", f"model: {doubt}"
    attacks = summary.get("attacks") or {}
    if aside := [name for name, attack in attacks.items() if not attack.get("counts", True)]:
        yield (
            "*",
            f"not in the worst case, being outside the run's threat model (norm, eps, box): {', '.join(aside)}",
        )
    if not all(attack.get("alone", True) for attack in attacks.values()):
        yield "survivors", "each attack got what those before it had left; its accuracy is after all of them"
    for name, attack in attacks.items():
        for warning in attack.get("warnings") or ():
            yield "warning", f"{name}: {warning}"
    for run, comparison in (summary.get("comparisons") or {}).items():
        for warning in comparison["warnings"]:
            yield "warning", f"compared with {run}: {warning}"
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
    if times := spent(summary):
        yield "time", times
    folder = summary.get("folder")
    if folder is not None:
        yield "files", str(folder)
        if (Path(folder) / "report.html").is_file():
            yield "page", str(Path(folder) / "report.html")
    wandb = summary.get("wandb") or {}
    if wandb.get("url"):
        yield "W&B", str(wandb["url"])
    if wandb.get("path") and wandb.get("mode") != "online":
        state = "offline" if wandb.get("mode") == "offline" else "incomplete"
        yield "W&B", f"{state}; to upload: wandb sync {shlex.quote(str(Path(folder or '') / wandb['path']))}"


def spent(summary: Mapping[str, Any]) -> str:
    """How long training and the attacks took."""
    seconds = summary.get("seconds") or {}
    parts = []
    if seconds.get("train") is not None:
        epochs = f" ({summary['epochs']} epochs)" if summary.get("epochs") else ""
        parts.append(f"training {duration(seconds['train'])}{epochs}")
    if seconds.get("attack") is not None:
        parts.append(f"attacks {duration(seconds['attack'])}")
    return ", ".join(parts)
