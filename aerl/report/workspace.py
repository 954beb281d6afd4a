"""The W&B workspace as code: `python -m aerl.report.workspace --entity E --project P [--dry-run FILE.json]`.

Saves one view of a project: training curves, robustness, the masking audit, transfer, figures and tables of the
analyses. It needs the extra `aerl[workspace]` and, to save, a W&B key.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aerl.errors import UserError, first_line
from aerl.runtime.files import write_json
from aerl.runtime.terminal import Parser, command

# Every key that has a panel, by section. A run has those that its options measure.
SECTIONS = {
    "robustness": "accuracy/worst_case accuracy/clean accuracy/pgd accuracy/pgd_targeted accuracy/autoattack "
    "tables/attacks",
    "training": "val/accuracy val/adversarial_accuracy val/loss train/accuracy train/loss train/adversarial_loss "
    "train/reward train/grad_norm train/lr",
    "masking": "test/masking/zero_gradient test/masking/saturated test/masking/paper_formula "
    "test/masking/paper_step_length tables/masking",
    "transfer": "figures/transfer_matrix tables/transfer_matrix",
    "analyses": "figures/landscape figures/gradients figures/curve figures/entropy figures/confusion figures/norms "
    "figures/curvature figures/pictures tables/curve tables/gradients tables/entropy tables/norms tables/compare",
}
_COLUMNS = ("accuracy/clean", "accuracy/worst_case", "masking/verdict")


def build(entity: str, project: str) -> Any:
    """The `wandb_workspaces` Workspace, unsaved; UserError if that library is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(f"needs pip install 'aerl[workspace]' ({first_line(error)})") from error

    def panel(key: str) -> Any:
        group, name = key.partition("/")[0], key.rpartition("/")[2]
        if group == "tables":
            return wr.WeavePanelSummaryTable(table_name=key)
        if group == "figures":
            return wr.MediaBrowser(title=name, media_keys=[key])
        if group in ("train", "val"):
            return wr.LinePlot(title=key, x="epoch", y=[key], aggregate=True, groupby_aggfunc="mean")
        return wr.BarPlot(title=name.replace("_", " "), metrics=[key])

    panels = {name: [panel(key) for key in keys.split()] for name, keys in SECTIONS.items()}
    scatter = wr.ScatterPlot(title="robust against clean", x="accuracy/clean", y="accuracy/worst_case")
    panels["robustness"].append(scatter)
    panels["analyses"].append(wr.RunComparer(diff_only="split"))
    columns = [f"summary:{key}" for key in _COLUMNS]
    return ws.Workspace(
        entity=entity,
        project=project,
        name="aerl",
        auto_generate_panels=False,
        sections=[ws.Section(name=name, panels=panels[name], is_open=True) for name in panels],
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")], pinned_columns=columns),
    )


@command
def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m aerl.report.workspace", description="Save a view of a W&B project of aerl's runs.")
    parser.add_argument("--entity", required=True, help="whose project it is: a user or a team")
    parser.add_argument("--project", default="aerl", help="the project (aerl)")
    parser.add_argument("--dry-run", type=Path, metavar="FILE.json", help="write it there instead, without a key")
    given = parser.parse_args(words)
    workspace = build(given.entity, given.project)
    if given.dry_run is not None:
        write_json(given.dry_run, workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True))
        return 0
    try:
        print(f"saved: {workspace.save().url}")
    except Exception as error:  # no key, or whatever a server can make the client raise
        raise UserError(f"W&B did not save the workspace: {first_line(error)}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
