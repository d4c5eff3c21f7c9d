"""Everything printed in a README runs: Python cells, the package's commands, scripts and flags."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from data_forms import (
    DEVKIT,
    WNIDS,
    make_devkit,
    make_ilsvrc,
    make_parquet,
    make_shards,
    make_tar,
)
from image_sets import make_folder
from ranks import run

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted(
    path
    for pattern in ("README.md", "*/README.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)
SMALL = (
    "--kernels 4 4 4 4 4 --hidden 8 8 --batch-size 8 --max-steps 2 --threads 1 "
    "--limit-train 32 --limit-val 8 --limit-test 8"
).split()
NEEDS_DOWNLOAD = ("cifar10", "fashion-mnist")
NEEDS_PACKAGE = {"PARQUET": "pyarrow", "ILSVRC": "scipy"}


def blocks(language: str) -> list[tuple[str, str]]:
    """(file, text) of every block of code in that language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        (str(path.relative_to(ROOT)), text)
        for path in READMES
        for text in fence.findall(path.read_text(encoding="utf-8"))
    ]


ON_A_CLUSTER = re.compile(r"--nnodes|^(srun|sbatch|mpirun) ")  # cli/test_clusters.py runs these


def command_lines() -> list[tuple[str, str]]:
    """(file, line) of every command in a shell block, without its comment; joined lines are one."""
    found = []
    for file, text in blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                found += [(file, part)] if part.strip() else []
    return [(file, line) for file, line in found if not ON_A_CLUSTER.search(line)]


CELLS = blocks("python")
LINES = command_lines()


def cell(word: str) -> str:
    found = [text for _, text in CELLS if word in text]
    assert len(found) == 1, f"{len(found)} cells with {word}"
    return found[0]


def test_the_first_cell_makes_the_papers_network(capsys) -> None:
    scope: dict = {}
    exec(cell("ModelConfig"), scope)
    assert scope["logits"].shape == (1, 1000)
    assert "60,965,224" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorials_cells_train_evaluate_and_draw(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(cell("Trainer"), scope)
    trainer, printed = scope["trainer"], capsys.readouterr().out
    assert len(trainer.train_losses) == len(trainer.val_losses) == len(trainer.gradient_norms) == 2
    assert f"accuracy {trainer.accuracy(scope['test_loader']):.2%}" in printed
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("samples.png", "losses.png"))


def test_the_tutorials_initialization_describes_eight_layers(capsys) -> None:
    exec(cell("describe_layers"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "96 x 3 x 11 x 11" in lines[0]
    assert "0.0147" in lines[5]  # sqrt(2 / 9216) = 0.01473


def test_every_python_cell_is_run_by_a_test_above() -> None:
    assert len(CELLS) == 4


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|^\[[^]]+\]: (\S+?)(?:#.*)?$", text, re.MULTILINE)
    for target in (one or other for one, other in links):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_no_readme_points_outside_the_repository() -> None:
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        assert "../shared/reference" not in text and "DESIGN.md" not in text


def test_the_front_page_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The words in capitals of the READMEs, as folders and files of this test."""
    root = tmp_path_factory.mktemp("readmes")
    for name in ("MINE", "IMAGENET"):
        make_folder(root / name, ("train", "val"), count=48)
    make_tar(root / "MINE", root / "MINE.tar.gz", "w:gz")
    make_shards(root / "MINE", root / "SHARDS")
    make_ilsvrc(make_folder(root / "classes", ("train", "val"), WNIDS, 4), root / "ILSVRC")
    if find_spec("scipy"):
        make_devkit(root / "ILSVRC" / DEVKIT, root / "classes")
    if find_spec("pyarrow"):
        make_parquet(root / "MINE", root / "PARQUET")
    cat = next((root / "MINE" / "train" / "cat").iterdir())
    names = ("MINE", "IMAGENET", "STORE", "RUN", "SHARDS", "ILSVRC", "PARQUET")
    found = {name: str(root / name) for name in names}
    environment = {"XDG_CACHE_HOME": str(root / "cache")}
    done = run(
        command,
        1,
        "train",
        [*SMALL, "--epochs", "1", "--max-steps", "0", "--out", found["RUN"]],
        environment,
    )
    assert done == [0]
    return found | {"cat.jpg": str(cat), "cache": environment["XDG_CACHE_HOME"]}


def command(rank: int, name: str, flags: list[str], environment: dict[str, str]) -> int:
    """Runs a command of the package as its script does, and returns the exit code."""
    import os

    from alexnet_mp.cli.commands import load_command

    os.environ.update(environment)
    return load_command(name)(flags)


PACKAGE_LINES = [
    (file, line)
    for file, line in LINES
    if re.search(r"launch/\w+\.py|-m alexnet_mp ", line) and "--help" not in line
]


@pytest.mark.slow
def test_a_trained_network_is_used_from_python(places: dict[str, str], capsys) -> None:
    text = cell("load_network")
    for word in ("RUN", "cat.jpg"):
        text = text.replace(word, places[word])
    exec(text, {})
    assert "('" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("file, line", PACKAGE_LINES, ids=[line for _, line in PACKAGE_LINES])
def test_a_printed_command_of_the_package_ends_well(
    file: str, line: str, places: dict[str, str], tmp_path: Path
) -> None:
    if any(word in line for word in NEEDS_DOWNLOAD):
        pytest.skip("needs a download")
    for word, package in NEEDS_PACKAGE.items():
        if word in line:
            pytest.importorskip(package)
    match = re.search(r"(?:launch/(\w+)\.py|-m alexnet_mp (\w+)) ?(.*)", line)
    assert match
    name, flags = match[1] or match[2], match[3]
    for word, path in places.items():
        flags = re.sub(rf"(?<![\w/]){re.escape(word)}(?!\w)", path, flags)
    words = shlex.split(flags)
    if name == "train":
        if "--resume" in words:  # which takes the network from the checkpoint
            words += ["--threads", "1", "--max-steps", "5"]
        else:
            words += [*SMALL, *([] if "--out" in words else ["--out", str(tmp_path / "run")])]
    if name == "evaluate":
        words = [word for word in words if word[0] != "["] + ["--limit-test", "8"]
    if name == "check":
        words += ["--seconds", "0.2", "--device", "cpu"]
    if name == "pack" and places["STORE"] in words:
        words = [word if word != places["STORE"] else str(tmp_path / "store") for word in words]
    if name == "train" and places["STORE"] in words:
        pack = [places["IMAGENET"], str(tmp_path / "store")]
        assert run(command, 1, "pack", pack, {}) == [0]
        words = [word if word != places["STORE"] else str(tmp_path / "store") for word in words]
    ranks = re.search(r"--nproc_per_node=(\d)", line)
    environment = {"XDG_CACHE_HOME": places["cache"], "MPLBACKEND": "agg"}
    codes = run(command, int(ranks[1]) if ranks else 1, name, words, environment, timeout=120)
    assert set(codes) == {0}


OTHER_LINES = [pair for pair in LINES if pair not in PACKAGE_LINES]


@pytest.mark.parametrize("file, line", OTHER_LINES, ids=[line for _, line in OTHER_LINES])
def test_scripts_and_flags_of_other_printed_commands_exist(file: str, line: str) -> None:
    for script in re.findall(r"(?:benchmarks|tests|launch)/[\w/]+\.(?:py|sh)", line):
        text = (ROOT / script).read_text(encoding="utf-8")
        for module in re.findall(r"^from (\w+) import", text, re.MULTILINE):  # beside the script
            beside = (ROOT / script).with_name(f"{module}.py")
            text += beside.read_text(encoding="utf-8") if beside.is_file() else ""
        for flag in re.findall(r"--([a-z][a-z-]+)", line.split(script)[1]):
            assert flag.replace("-", "_") in text or flag in text, f"{script} has no --{flag}"
