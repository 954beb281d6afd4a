"""The closing table of a run, from its summary.json alone: showing a finished run again imports nothing slow."""

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

from aerl.runtime.terminal import eps_text

_STATUS = {"finished": "green", "failed": "bold red"}


@dataclass(frozen=True)
class Grid:
    """A table of text, for terminals, pages and files."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[str]  # the columns of words, aligned to the left; the others hold numbers

    def rich(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
        for name in self.columns:
            table.add_column(Text(name), justify="left" if name in self.words else "right", no_wrap=True)
        for row in self.rows:  # Text and not str: rich reads square brackets in a name as markup
            table.add_row(*map(Text, row), style="bold" if row[0] == "worst case" else None)
        return table


def wide_console() -> Console:
    """A console that wraps no line: paths and commands can be copied."""
    return Console(width=10_000)


def attack_grid(summary: Mapping[str, Any]) -> Grid:
    """Clean accuracy, every attack and the worst case, as far as they were measured."""
    rows = [_attack_row("clean", {"robust_accuracy": summary.get("clean_accuracy")})]
    for name, attack in (summary.get("attacks") or {}).items():
        rows.append(_attack_row(name if attack.get("counts", True) else f"{name} *", attack))
    counted = [info for info in (summary.get("attacks") or {}).values() if info.get("counts", True)]
    for row in summary.get("worst_case_by_eps") or ():
        threat = {"norm": counted[0]["norm"] if counted else None, "eps": row["eps"]}
        rows.append(_attack_row("worst case", {"robust_accuracy": row, **threat}))
    if (worst := summary.get("worst_case_accuracy")) and not summary.get("worst_case_by_eps"):
        rows.append(_attack_row("worst case", {"robust_accuracy": worst}))
    return Grid(("attack", "norm", "eps", "accuracy", "95 % interval", "n", "time"), rows, ("attack", "norm"))


def _attack_row(name: str, attack: Mapping[str, Any]) -> list[str]:
    cells = ["-"] * 3
    if (accuracy := attack.get("robust_accuracy")) and accuracy["value"] is not None:
        interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f} %"
        cells = [f"{100 * accuracy['value']:.1f} %", interval, str(accuracy["n"])]
    eps, seconds = attack.get("eps"), attack.get("seconds")
    threat = [str(attack.get("norm") or ""), "" if eps is None else eps_text(eps)]
    return [name, *threat, *cells, "" if seconds is None else duration(seconds)]


def headline(summary: Mapping[str, Any]) -> list[str]:
    """The robust accuracy, and whether it can be relied on and why, in up to three sentences; none without one."""
    attacks, worst = summary.get("attacks") or {}, summary.get("worst_case_accuracy")
    counted = [info for info in attacks.values() if info.get("counts", True)]
    if not worst or not counted or worst["value"] is None:
        return []
    threat = f"{counted[0].get('norm')} perturbations up to {eps_text(max(info.get('eps') or 0 for info in counted))}"
    value, low, high = (100 * worst[key] for key in ("value", "low", "high"))
    sentences = [f"At most {value:.1f} % of the images withstand {threat} (95 % interval {low:.1f} to {high:.1f} %)."]
    if summary.get("normalization") == "withheld":
        sentences.insert(0, "Judged without the normalisation that it was trained with: not the model's robustness.")
    paper = attacks.get("pgd_paper")
    if paper and 100 * paper["robust_accuracy"]["value"] - value > 5:
        sentences.insert(0, f"The paper's attack alone says {100 * paper['robust_accuracy']['value']:.1f} %.")
    masking, planted = summary.get("masking") or {}, summary.get("planted") or {}
    masked = str(masking.get("verdict", "")).startswith("masked")
    why = str(masking.get("mechanism", "")).partition(":")[0]
    adapted = any(info.get("of") == "adaptive" for info in attacks.values())
    found = ""
    if planted:
        found = (
            f"the attack found {round(planted['found']['value'] * planted['found']['n'])} of {planted['found']['n']}"
        )
        found += " adversarial examples that were planted to test it"
    if planted and not planted["trusted"]:
        sentences.append(f"Do not rely on this number: {found}, so the true accuracy may be far lower.")
    elif planted and planted["found"]["low"] < 0.8:
        sentences.append(f"Whether it can be relied on is open: {found}, which are too few to tell.")
    elif masked and not adapted:
        sentences.append(
            f"Do not rely on this number: gradients mislead attacks ({why}), and attack=suite adapts to that."
        )
    elif masked and planted:
        sentences.append(f"Gradients mislead plain attacks ({why}), but {found}, so this one can be relied on.")
    elif masked:
        sentences.append(
            f"Gradients mislead plain attacks ({why}); these attacks adapt to that, but no planted test was made."
        )
    elif planted:
        sentences.append(f"This can be relied on: {found}" + (", and gradients do not mislead it." if masking else "."))
    elif masking:
        sentences.append(f"The masking audit says: {masking['verdict']}.")
    return sentences


def comparison_grid(comparison: Mapping[str, Any]) -> Grid:
    """The paired comparison with another run, as `aerl.analyses.compare` writes it to the summary."""
    rows = []
    for name, row in comparison["rows"].items():
        p = f"{row['p']:.3f}" if row["p"] >= 0.001 else "<0.001"
        accuracies = [f"{100 * row[key]:.1f} %" for key in ("accuracy", "other_accuracy")]
        difference = [f"{100 * row['difference']:+.1f} %", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f} %"]
        rows.append(
            [name.replace("worst_case", "worst case"), *accuracies, *difference, str(row["b"]), str(row["c"]), p]
        )
    return Grid(("attack", "this", "other", "difference", "95 % interval", "b", "c", "p"), rows, ("attack",))


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print what a run measured and where its files are; to a console that is given, without its files."""
    rows = [*notes(summary), *(() if console else places(summary))]
    console = console or wide_console()
    status = summary["status"]
    console.print(Text.assemble("\n", title(summary), ": ", (status, _STATUS.get(status, "yellow"))))
    if error := summary.get("error"):
        console.print(Text(str(error), style="red"))
    console.print("", attack_grid(summary).rich(), "", sep="\n")
    if sentences := headline(summary):
        console.print(Text("\n".join([*sentences, ""])))
    for run, comparison in (summary.get("comparisons") or {}).items():
        console.print(Text(f"compared with {run}"))
        console.print(Text("b: samples right here only, c: there only; p: McNemar's exact test\n", style="dim"))
        console.print(comparison_grid(comparison).rich(), "", sep="\n")
    for label, text in rows:
        console.print(Text.assemble((f"{label:<11}", "dim"), text))


def title(summary: Mapping[str, Any]) -> str:
    """Dataset, model, trainer and seed; of an evaluated model those of its training."""
    origin = summary.get("origin")
    text = "{dataset}, {model}, {trainer}, seed {seed}".format_map({**summary, **(origin or {})})
    text += ", evaluated" if origin else ""
    return f"{text}, without its normalisation" if summary.get("normalization") == "withheld" else text


def notes(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What to know about the numbers of a run: label and text."""
    attacks = summary.get("attacks") or {}
    for doubt in summary.get("doubts") or ():
        yield "warning", f"model: {doubt}"
    if outside := [name for name, attack in attacks.items() if not attack.get("counts", True)]:
        yield "*", f"outside the threat model (norm, eps, box), not in the worst case: {', '.join(outside)}"
    if not all(attack.get("alone", True) for attack in attacks.values()):
        yield "survivors", "each attack got only the samples that withstood those before it; accuracies are cumulative"
    if (passes := summary.get("passes") or 1) > 1:
        yield "randomised", f"the model draws at random; each accuracy is the mean over {passes} passes"
    for name, attack in attacks.items():
        yield from (("warning", f"{name}: {warning}") for warning in attack.get("warnings") or ())
    for run, comparison in (summary.get("comparisons") or {}).items():
        yield from (("warning", f"compared with {run}: {warning}") for warning in comparison["warnings"])
    for name, reason in (summary.get("not_made") or {}).items():
        yield "not made", f"{name}: {reason}"
    if planted := summary.get("planted"):
        yield "planted", str(planted["says"])
    if masking := summary.get("masking"):
        yield "masking", str(masking["verdict"])
        if masking["verdict"] != "no sign":
            yield "mechanism", str(masking["mechanism"])
            yield "trust", str(masking["trust"])
        for check in masking.get("checks", ()):
            if check["name"] == "paper_formula" and check["flag"]:
                yield "pgd_paper", str(check["says"])


def places(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How long a run took and where its files are: label and text."""
    seconds, epochs = summary.get("seconds") or {}, summary.get("epochs")
    times = [f"training {duration(seconds['train'])} ({epochs} epochs)"] if epochs and "train" in seconds else []
    times += [f"attacks {duration(seconds['attack'])}"] if "attack" in seconds else []
    if times:
        yield "time", ", ".join(times)
    folder = Path(summary.get("folder") or "")  # an export has none
    yield "files", str(folder)
    if (page := folder / "report.html").is_file():
        yield "page", str(page)
    wandb = summary.get("wandb") or {}
    if wandb.get("url"):
        yield "W&B", wandb["url"]
    if wandb.get("path") and wandb["mode"] != "online":
        state = "offline" if wandb["mode"] == "offline" else "incomplete"
        yield "W&B", f"{state}; to upload: wandb sync {shlex.quote(str(folder / wandb['path']))}"


def duration(seconds: float) -> str:
    """Seconds as text: 1.6 s, 2 min 12 s, 2 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def shown(path: Path) -> str:
    """A path as a person would type it: relative if it lies below the current folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
