"""The house rules that a reviewer would otherwise have to watch: import direction, lazy imports, packaging."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdct_export

PACKAGE = Path(sdct_export.__file__).parent
# each layer may import those before it, and its own members
LAYERS = [
    {"errors", "config", "files", "contract"},
    {"spectrum", "selection", "adapter", "adapter_io"},
    {"base", "checkpoint"},
    {"changes"},
    {"tuning", "projection", "merging", "summary", "plot"},
    {"graph"},
    {"bundle", "probe"},
    {"packing", "request"},
    {"onnx_adapter"},
    {"export", "reference"},
    {"native"},
    {"build"},
    {"runtime"},
    {"verify", "doctor"},
    {"cli"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The layer member a file belongs to: its module, or the folder directly under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Layer members that a file imports anywhere in it, inside functions and under TYPE_CHECKING too."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` names the module in its aliases; inside a subfolder one dot is that folder itself
            base = [*path.relative_to(PACKAGE).parts[: depth - node.level + 1]] if node.level else []
            prefix = ".".join((["sdct_export", *base] if node.level else []) + ([node.module] if node.module else []))
            names = [prefix] if node.module else [f"{prefix}.{alias.name}" for alias in node.names]
            if prefix == "sdct_export":
                names = [f"sdct_export.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("sdct_export.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_to_lower_layers(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the public names, loaded on first use
    assert part in LEVEL, f"{part} has no place in the layers; give it one here"
    for other in imported_parts(path) - {part}:
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[part], f"{part} imports {other}, which lies above it"
        else:
            assert other in {"__version__"}, f"{part} imports {other} from the package's own front door"


def test_the_import_check_sees_relative_absolute_and_nested_imports(tmp_path: Path) -> None:
    assert imported_parts(PACKAGE / "base.py") == {"adapter", "errors"}
    assert {"config", "errors", "adapter_io", "spectrum"} <= imported_parts(PACKAGE / "adapter.py")


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
        ("import sdct_export.bundle", set()),
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


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
