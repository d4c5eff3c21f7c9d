"""Imports go one way only, the model knows no process group, and files stay small enough to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alexnet_mp"

# A module may import from its own row and from rows above (DESIGN.md, decision 12); within a row there is no circle either.
ROWS = [
    {"seeds", "lock", "from_scratch", "native", "fusing"},
    {"architecture"},
    {"config"},
    {"presets", "layers", "exchange", "optim", "schedule", "precision", "summary", "crossing", "first_layer", "tally", "data"},
    {"model"},
    {"networks"},
    {"heartbeat", "rendezvous", "distributed", "evaluation", "lettering", "figures", "pictures"},
    {"checkpoint", "requests", "cli", "agreement", "checks", "hints", "curves"},
    {"trainer", "inference", "profiling"},
    {"run", "console", "gallery"},
    {"__init__"},
]
MAY_USE_PROCESS_GROUPS = {"exchange", "heartbeat", "rendezvous", "distributed"}


def modules() -> dict[str, Path]:
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    return files | {f"data.{path.stem}": path for path in (PACKAGE / "data").glob("*.py")}


def imported(path: Path) -> set[str]:
    """Every module that `path` names in an import, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Modules of this package, without the prefix; the data package counts as one."""
    known = {name.split(".")[0] for name in modules()}
    parts = [name.split(".") for name in imported(path) if name.startswith("alexnet_mp.")]
    return {part[1] for part in parts} & known


def row(name: str) -> int:
    top = name.split(".")[0]
    found = [i for i, names in enumerate(ROWS) if top in names]
    assert found, f"alexnet_mp/{top}.py stands in no row: give it one"
    return found[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_only_from_its_own_row_and_above(name: str) -> None:
    below = {other for other in own_imports(modules()[name]) if row(other) > row(name)}
    assert not below, f"{name} imports {below}, which stand below it"


def test_imports_make_no_circle() -> None:
    graph = {name: own_imports(path) - {name} for name, path in modules().items() if "." not in name and name != "__init__"}
    graph["data"] = set().union(*(own_imports(path) for name, path in modules().items() if name.startswith("data."))) - {"data"}
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert done == set(graph), f"a circle among {set(graph) - done}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_the_exchange_and_the_set_up_know_process_groups(name: str) -> None:
    if name.split(".")[0] not in MAY_USE_PROCESS_GROUPS:
        assert not any(module.startswith("torch.distributed") for module in imported(modules()[name]))
        assert "distributed" not in {node.attr for node in ast.walk(ast.parse(modules()[name].read_text()))
                                     if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch"}


def test_nothing_in_the_package_imports_the_entry_scripts_or_the_tests() -> None:
    for path in modules().values():
        assert not {name.split(".")[0] for name in imported(path)} & {"launch", "benchmarks", "tests", "ranks", "reference"}


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py")]), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_under_300_lines_and_an_entry_script_under_80(path: Path) -> None:
    assert len(path.read_text().splitlines()) < (80 if path.parent.name == "launch" else 300)
