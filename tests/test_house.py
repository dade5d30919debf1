"""The house rules that a reviewer would otherwise have to watch: import direction, lazy imports, packaging."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import sdct_export

PACKAGE = Path(sdct_export.__file__).parent
# the way of an adapter through the house; a room may import those before it and its own modules
ROOMS = [
    {"errors", "contract", "files", "native", "plugin_choice", "lazy", "signals"},
    {"spectral"},
    {"adapter"},
    {"base"},
    {"weights"},
    {"tuning"},
    {"graph"},
    {"foreign"},
    {"bundle"},
    {"engine", "export"},
    {"runtime"},
    {"verify", "doctor"},
    {"quality", "adoption"},
    {"serve"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, rooms in enumerate(ROOMS) for name in rooms}
MODULES = sorted(PACKAGE.rglob("*.py")) + sorted(PACKAGE.rglob("*.pyi"))
FOLDERS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def name_of(path: Path) -> str:
    """Dotted name of a module below the package: `adapter.folder`, `cli`, and the empty string for the package."""
    parts = [*path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {name_of(path) for path in MODULES}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it, inside functions and under TYPE_CHECKING too."""
    package = ["sdct_export", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "sdct_export":
                below = name.split(".")[1:]
                # the longest part that is a module: `adapter.folder.Contents` comes from `adapter.folder`
                found.add(next(n for k in range(len(below), -1, -1) if (n := ".".join(below[:k])) in KNOWN))
    return found - {name_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way_between_rooms(path: Path) -> None:
    room = name_of(path).split(".")[0]
    if not room:
        return  # the public names, loaded on first use
    assert room in FLOOR, f"{room} has no place in the house; give it one here and in docs/architecture.md"
    for other in imported(path):
        target = other.split(".")[0]
        if target == "":
            assert "import __version__" in path.read_text(), f"{path.name} imports from the package's own front door"
        elif target != room:
            assert FLOOR[target] < FLOOR[room] or (FLOOR[target] == 0 == FLOOR[room]), f"{room} imports {other}"


def test_no_circle_of_imports() -> None:
    """Not even a late one inside a function."""
    arrows: dict[str, set[str]] = {}
    for path in MODULES:  # a stub's imports are those of the `__init__.py` beside it
        arrows.setdefault(name_of(path), set()).update(imported(path))
    order = TopologicalSorter({name: targets - {""} for name, targets in arrows.items() if name})
    order.prepare()  # raises CycleError, which names the circle


def test_the_import_check_sees_relative_absolute_and_nested_imports() -> None:
    assert imported(PACKAGE / "adapter" / "folder.py") == {
        "adapter.config", "adapter.entries", "adapter.positions", "adapter.training", "errors", "files",
    }  # fmt: skip
    assert {"errors", "adapter.folder", "spectral.transform"} <= imported(PACKAGE / "adapter" / "adapter.py")
    assert "runtime.trt" in imported(PACKAGE / "runtime" / "model.py")  # inside a function
    assert {"", "cli.verify"} <= imported(PACKAGE / "cli" / "__init__.py")
    assert imported(PACKAGE / "spectral" / "__init__.pyi") == {"spectral.selection", "spectral.transform"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_room_says_what_it_is_for_and_hands_on_its_names(folder: Path) -> None:
    room = import_module(f"sdct_export.{folder.name}")
    assert room.__doc__
    assert len([line for line in room.__doc__.splitlines() if line]) <= 3
    if folder.name == "cli":  # a command line, no names
        return
    stub = ast.parse((folder / "__init__.pyi").read_text())
    names = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(room.__all__) <= set(dir(room))
    for name in names:
        assert getattr(room, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        room.nonsense  # noqa: B018


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "scipy", "peft"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import sdct_export", set()),
        ("from sdct_export import SdctAdapter, SdctConfig, SdctError", set()),
        ("from sdct_export.bundle import Bundle, pack", set()),
        ("from sdct_export.adapter import SdctAdapter, summarize", set()),
        ("from sdct_export.spectral import select", set()),
        (
            "import sdct_export.base, sdct_export.weights, sdct_export.tuning, sdct_export.graph, sdct_export.engine",
            set(),
        ),
        ("import sdct_export.runtime", {"onnxruntime"}),
        ("from sdct_export.runtime import MultiAdapterModel", {"onnxruntime"}),
        ("import sdct_export.cli", set()),
        (
            "from click.testing import CliRunner\nfrom sdct_export.cli import main\n"
            "assert CliRunner().invoke(main, ['--help']).exit_code == 0",
            set(),
        ),
    ],
)
def test_light_imports_stay_light(code: str, allowed: set[str]) -> None:
    loaded = modules_after(code)
    assert "sdct_export" in loaded
    assert loaded & HEAVY <= allowed


def test_every_public_name_loads() -> None:
    for name in sdct_export.__all__:
        assert getattr(sdct_export, name).__name__ == name
    assert set(sdct_export.__all__) <= set(dir(sdct_export))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sdct_export.nonsense  # noqa: B018


def test_a_name_that_needs_what_is_not_installed_says_so_in_one_traceback() -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom sdct_export import get_sdct_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: sdct_export.get_sdct_model: this needs torch, which is not installed: "
        "pip install 'sdct_export[torch]'"
    )


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
