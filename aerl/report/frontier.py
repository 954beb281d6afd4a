"""The frontier of a set of runs: robust against clean accuracy, and against the seconds of training."""

from collections.abc import Iterator
from pathlib import Path

from aerl.report import figures
from aerl.report.runs import Overview


def draw(overview: Overview, out: Path) -> Iterator[Path]:
    """Write frontier.png and .pdf, frontier_2.png, ... to the folder `out`, one for each table; yields the .png files.

    Every run is a point in the colour of its trainer. The line joins the runs that no other run of the table beats in
    both clean and worst-case accuracy.
    """
    for number, table in enumerate(overview.tables, 1):
        runs = table.runs.dropna(subset=["clean", "worst"])
        if runs.empty:
            continue
        timed = runs["seconds"].notna().any()
        figure, axes = figures.subplots(1, 1 + timed, figsize=(5.2 * (1 + timed), 4.2), sharey=True)
        for trainer, group in runs.groupby("trainer"):
            colour = figures.trainer_colour(str(trainer))
            axes[0, 0].scatter(group["clean"], group["worst"], s=24, color=colour, label=trainer)
            if timed:
                axes[0, 1].scatter(group["seconds"], group["worst"], s=24, color=colour)
        best = runs.sort_values(["clean", "worst"], ascending=False)
        best = best[best["worst"] > best["worst"].cummax().shift(fill_value=-1.0)]
        axes[0, 0].plot(best["clean"], best["worst"], color="grey", linewidth=0.8, zorder=0)
        axes[0, 0].set(xlabel="clean accuracy, %", ylabel="worst-case accuracy, %")
        axes[0, 0].legend(fontsize=8)
        if timed:
            axes[0, 1].set(xlabel="training, s", xscale="log")
        figure.suptitle(table.heading, fontsize=10)
        yield figures.save(figure, out, "frontier" if number == 1 else f"frontier_{number}", table.heading)
