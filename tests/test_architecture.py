"""A module imports what stands below it, never above; light rooms start without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fishr

SOURCE = Path(fishr.__file__).parent
HOUSE = (
    "cli",
    "workflows",
    "estimator",
    "reports",
    "sweeps",
    "analysis",
    "deploy",
    "testing",
    "training",
    "selection",
    "records",
    "algorithms",
    "models",
    "data",
    "nn",
    "functional",
    "devices",
    "space",
    "registry",
    "files",
    "errors",
)
"""Rooms from the roof down."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "fishr" and len(parts) == 2:  # a public name, such as fishr.train, stands where it is defined
        parts = fishr._HOMES.get(parts[1], module).split(".")
    return parts[1] if parts[0] == "fishr" and len(parts) > 1 else None


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            modules += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def upward_imports(path: Path, room: str) -> list[str]:
    return [
        module
        for module in imported_modules(path)
        if (target := room_of(module)) in HOUSE and HOUSE.index(target) < HOUSE.index(room)
    ]


MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_lead_downwards(path):
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert room in HOUSE, f"{path} stands in no room of the house"
    assert not upward_imports(path, room)


def test_an_upward_import_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def late():\n    from fishr.training import train\n")
    assert upward_imports(module, "algorithms") == ["fishr.training", "fishr.training.train"]
    module.write_text("from fishr import FishrPenalty, train\n")
    assert upward_imports(module, "algorithms") == ["fishr.train"]


def test_light_rooms_start_without_torch():
    script = (
        "import sys, fishr, fishr.cli, fishr.records, fishr.reports.tables, fishr.space, fishr.registry, fishr.errors;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rooms_are_reached_from_the_package():
    script = "import fishr; assert fishr.training.train is fishr.train"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_exist():
    for name in fishr.__all__:
        assert getattr(fishr, name) is not None
    with pytest.raises(AttributeError, match="module 'fishr' has no attribute 'nothing'"):
        fishr.nothing  # noqa: B018
