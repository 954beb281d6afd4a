"""Imports go one way, and each heavy or configuring library stays in its rooms."""

import ast
import graphlib

import pytest

from tests.conftest import ROOT

# A module imports from its own layer and those before it.
LAYERS = [
    {"errors", "types"},
    {"runtime"},
    {"config", "attacks", "data", "models", "tracking"},
    {"training", "evaluation", "build", "hub"},
    {"analyses", "report"},
    {"run", "verify", "python", "tune"},
    {"launch"},
]
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Imported in a function, where a whole run is at hand.
ALLOWED = {("aerl/config/multirun.py", "build"), ("aerl/tracking/run_folder.py", "training"),
           ("aerl/tracking/inputs.py", "training")}  # fmt: skip
ROOMS = {"hydra": ("launch.py", "aerl/run.py", "aerl/config/"), "wandb": ("aerl/tracking/",)}
ROOMS["omegaconf"] = ROOMS["hydra"]


def imports(path, annotations=True):
    tree = ast.parse(path.read_text())
    skipped = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = {id(part) for node in skipped for part in ast.walk(node)} if not annotations else set()
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", [*sorted((ROOT / "aerl").rglob("*.py")), ROOT / "launch.py"], ids=str)
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    room = path.relative_to(ROOT).parts[min(1, name.count("/"))].removesuffix(".py")
    for module in imports(path):
        top, imported = f"{module}.".split(".")[:2]
        assert name.startswith(ROOMS.get(top, "")), module
        if top == "aerl" and imported in LAYER and room in LAYER and (name, imported) not in ALLOWED:
            assert LAYER[imported] <= LAYER[room], module


def test_no_modules_import_each_other_in_a_circle():
    """Also not in functions; imports for annotations alone (TYPE_CHECKING) do not count."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in (ROOT / "aerl").rglob("*.py")}  # fmt: skip
    graph = {}
    for module, path in paths.items():
        names = list(imports(path, annotations=False))
        graph[module] = {name if name in paths else name.rpartition(".")[0] for name in names} & set(paths) - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them
