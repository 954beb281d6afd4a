"""How aerl's figures look: one palette that any colour vision tells apart, and every figure as PNG and PDF."""

import io
from pathlib import Path
from typing import Any

from aerl.runtime.files import atomic_write

# Okabe and Ito's palette (2008).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#767676",
)  # fmt: skip
RIGHT, WRONG = BLUE, VERMILION  # of predictions
_TRAINERS = {
    "sl": BLUE, "sl_adv": SKY, "rl": VERMILION, "rl_adv": ORANGE, "rl_expected": PURPLE,
    "pgd_at": GREEN, "trades": YELLOW,
}  # fmt: skip


def trainer_colour(trainer: str) -> str:
    """The colour of a trainer in every figure; grey for one that aerl does not know."""
    return _TRAINERS.get(trainer, GREY)


def save(figure: Any, folder: Path, name: str, caption: str = "") -> Path:
    """Write a matplotlib Figure to `folder` as `name`.png, which carries its caption, and, for papers, `name`.pdf.

    Returns the path of the PNG. Raises UserError where the files cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    png = {"dpi": 130, "metadata": {"Description": caption}}
    for suffix, options in (("pdf", {"metadata": {"CreationDate": None}}), ("png", png)):
        stream = io.BytesIO()
        figure.savefig(stream, format=suffix, **options)
        atomic_write(folder / f"{name}.{suffix}", stream.getvalue())
    return folder / f"{name}.png"
