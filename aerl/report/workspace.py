"""The W&B workspace as code: `python -m aerl.report.workspace --entity E --project P [--dry-run FILE.json]`.

Builds one saved view of a project: training curves by epoch, robustness, the masking audit, transfer, the
analyses' figures and tables. It needs the extra `aerl[workspace]`, and to save it a W&B key.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aerl.runtime.terminal import Parser, command
from aerl.tracking.results import write_json
from aerl.tracking.wandb import logged_in
from aerl.types import UserError, first_line

NAME = "aerl"
# Every key that a panel shows, by the section it is in. A run has those that its options measure.
CURVES = {
    "val": ("accuracy", "adversarial_accuracy", "loss"),
    "train": ("accuracy", "loss", "adversarial_loss", "reward", "grad_norm", "lr"),
}
ACCURACIES = ("worst_case", "clean", "pgd", "pgd_targeted", "autoattack")
MASKING = ("zero_gradient", "saturated", "paper_formula", "paper_step_length")
FIGURES = ("landscape", "gradients", "curve", "entropy", "confusion", "norms", "curvature", "pictures")
TABLES = ("curve", "gradients", "entropy", "norms", "compare")
COLUMNS = ("accuracy/clean", "accuracy/worst_case", "masking/verdict")


def build(entity: str, project: str) -> Any:
    """The `wandb_workspaces` Workspace, unsaved; UserError where that library is not installed."""
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            f"the workspace needs wandb-workspaces: pip install 'aerl[workspace]' ({first_line(error)})"
        ) from error

    def curve(key: str) -> Any:
        return panels.LinePlot(title=key, x="epoch", y=[key], aggregate=True, groupby_aggfunc="mean")

    def bar(title: str, *keys: str) -> Any:
        return panels.BarPlot(title=title, metrics=list(keys))

    def table(name: str) -> Any:
        return panels.WeavePanelSummaryTable(table_name=f"tables/{name}")

    def figure(name: str) -> Any:
        return panels.MediaBrowser(title=name, media_keys=[f"figures/{name}"])

    contents = {
        "robustness": [
            *(bar(name.replace("_", " "), f"accuracy/{name}") for name in ACCURACIES),
            panels.ScatterPlot(title="robust against clean", x="accuracy/clean", y="accuracy/worst_case"),
            table("attacks"),
        ],
        "training": [curve(f"{split}/{key}") for split, keys in CURVES.items() for key in keys],
        "masking": [
            *(bar(name.replace("_", " "), f"test/masking/{name}") for name in MASKING),
            table("masking"),
        ],
        "transfer": [figure("transfer_matrix"), table("transfer_matrix")],
        "analyses": [*map(figure, FIGURES), *map(table, TABLES), panels.RunComparer(diff_only="split")],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        auto_generate_panels=False,
        sections=[
            workspaces.Section(name=name, panels=shown, is_open=name in ("robustness", "training"))
            for name, shown in contents.items()
        ],
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")],
            pinned_columns=[f"summary:{key}" for key in COLUMNS],
        ),
    )


def serialised(workspace: Any) -> dict[str, Any]:
    """What would be sent to W&B, as plain containers."""
    view: dict[str, Any] = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return view


def save(workspace: Any) -> str:
    """Save it in its project; returns its address. UserError where there is no key, or W&B refuses."""
    if not logged_in():
        raise UserError("W&B has no key (WANDB_API_KEY, or run `wandb login`); --dry-run FILE.json needs none")
    try:
        return str(workspace.save().url)
    except Exception as error:  # whatever a server can make the client raise
        raise UserError(f"W&B did not take the workspace: {first_line(error)}") from error


@command
def main(words: Sequence[str] | None = None) -> int:
    description = "Save a view of a W&B project, as aerl's runs fill it."
    parser = Parser(prog="python -m aerl.report.workspace", description=description)
    parser.add_argument("--entity", required=True, help="whose project it is: a user or a team")
    parser.add_argument("--project", default="aerl", help="the project (aerl)")
    parser.add_argument("--dry-run", type=Path, metavar="FILE.json", help="write it there instead, without a key")
    given = parser.parse_args(words)
    workspace = build(given.entity, given.project)
    if given.dry_run is None:
        print(f"saved: {save(workspace)}")
    else:
        write_json(given.dry_run, serialised(workspace))
    return 0


if __name__ == "__main__":
    sys.exit(main())
