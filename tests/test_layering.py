"""The rooms of the package: what each may import, who may use process groups, and how long an entry
script is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alexnet_mp"

ROOMS = {
    "config": set(),
    "ops": {"config"},
    "plotting": set(),
    "model": {"config", "ops"},
    "data": {"config", "ops"},
    "parallel": {"config", "ops", "model"},
    "weights": {"config", "model"},
    "training": {"config", "ops", "model", "data", "parallel", "weights", "plotting"},
    "inference": {"config", "ops", "model", "data", "parallel", "weights", "plotting", "training"},
    "cli": {
        "config",
        "ops",
        "model",
        "data",
        "parallel",
        "weights",
        "plotting",
        "training",
        "inference",
    },
}
TOP_LEVEL = {"__init__.py", "__main__.py", "py.typed", "README.md"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def imported(path: Path) -> set[str]:
    """Every module that `path` names in an import, at whatever depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "alexnet_mp" and len(part) > 1} & set(ROOMS)


def test_the_package_has_ten_rooms_and_at_most_four_files() -> None:
    here = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {name for name in here if (PACKAGE / name).is_dir()} == set(ROOMS)
    assert {name for name in here if (PACKAGE / name).is_file()} <= TOP_LEVEL


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path)], ids=name_of)
def test_a_module_imports_only_rooms_that_its_own_may(path: Path) -> None:
    forbidden = rooms_imported(path) - ROOMS[room_of(path)] - {room_of(path)}
    assert not forbidden, f"{name_of(path)} imports {forbidden}: not allowed in {room_of(path)}/"


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path)], ids=name_of)
def test_no_module_imports_the_public_api_at_the_top(path: Path) -> None:
    public = {f"alexnet_mp.{room}" for room in ROOMS}
    named = {name for name in imported(path) if name.startswith("alexnet_mp.")}
    assert "alexnet_mp" not in imported(path) or any(
        name.startswith(tuple(public)) for name in named
    ), f"{name_of(path)} imports alexnet_mp itself: name the room"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_each_room_says_what_lives_there_and_where_to_start(room: str) -> None:
    text = ast.get_docstring(
        ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    )
    assert text, f"{room}/__init__.py has no docstring"
    assert "mports" in text, f"{room}/__init__.py does not say what the room imports"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_parallel_uses_process_groups(path: Path) -> None:
    if room_of(path) == "parallel":
        return
    assert not any(module.startswith("torch.distributed") for module in imported(path))
    attributes = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    ]
    assert not [
        node
        for node in attributes
        if node.attr == "distributed" and getattr(node.value, "id", "") == "torch"
    ]


def test_nothing_in_the_package_imports_entry_scripts_or_tests() -> None:
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & {
            "launch",
            "benchmarks",
            "tests",
            "ranks",
            "reference",
        }


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_an_entry_script_has_under_80_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80


def test_the_packages_map_names_every_module_of_every_room() -> None:
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    for room in ROOMS:
        section = text.split(f"### {room}/")[1].split("###")[0].split("\n## ")[0]
        named = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
        files = {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}
        files |= {f"csrc/{path.name}" for path in (PACKAGE / room).rglob("*.cpp")}
        assert named == files, f"alexnet_mp/README.md, {room}/: {named ^ files}"
