"""aerl: train image classifiers by policy gradient or cross-entropy, and evaluate how robust they are.

    report = aerl.evaluate(model, images, labels, norm="Linf", eps=8 / 255)
    x_adv = aerl.attacks.pgd(model, x, y, eps=0.5)
    model = aerl.load_model("runs/digits/alicnn/sl/default/seed0")
    runs = aerl.load_runs("runs")

The command line is launch.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aerl import attacks
    from aerl.errors import UserError
    from aerl.models import adapt
    from aerl.python import Accuracy, Report, evaluate, load_model
    from aerl.report.runs import load_runs

__version__ = "0.1.0"
__all__ = ["Accuracy", "Report", "UserError", "adapt", "attacks", "evaluate", "load_model", "load_runs"]

_HOMES = {
    "evaluate": "python", "load_model": "python", "Report": "python", "Accuracy": "python", "adapt": "models",
    "load_runs": "report.runs", "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: torch takes seconds."""
    if name == "attacks":
        return import_module("aerl.attacks")
    if name in _HOMES:
        return getattr(import_module(f"aerl.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'aerl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
