"""The table of faults in mutants.md names modules and tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROW = re.compile(r"^\| ([\w/.]+) \| .+ \| ([\w/.]+)::(\w+) \|$")


def test_every_fault_has_its_module_and_its_test() -> None:
    lines = (TESTS / "mutants.md").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if (row := ROW.match(line))]
    assert len(rows) == sum(line.startswith("| ") for line in lines) - 5  # five heads of tables
    wrong = [
        row[0]
        for row in rows
        if not (TESTS.parent / "alexnet_mp" / row[1]).is_file()
        or f"def {row[3]}(" not in (TESTS / row[2]).read_text(encoding="utf-8")
    ]
    assert wrong == []
