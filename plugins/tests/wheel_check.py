"""Asks an installed wheel whether its operator works, see check_wheel.sh: `wheel_check.py SITE_PACKAGES BUNDLE...`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY_PATH = "SDCT_LIBRARY_PATH"
SIZES = {"batch": 4, "sequence": 7}
TOLERANCE = 1e-5  # of the largest number in an output


def operator_of_doctor(site_packages: Path) -> Path:
    """Where `sdct-export doctor` finds the operator library: inside the installed package."""
    command = [str(Path(sys.executable).parent / "sdct-export"), "doctor", "--json"]
    findings = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (operator,) = (finding for finding in findings if finding["part"] == "operator library")
    assert operator["state"] == "ok", operator
    path = Path(operator["detail"].rpartition(": ")[2])
    assert path.is_relative_to(site_packages.resolve()), f"{path} lies outside of {site_packages}"
    return path


def make_inputs(specs: Any) -> dict[str, Any]:
    """Random inputs of a bundle; masks are all ones."""
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in specs:
        shape = [SIZES.get(size, 5) if isinstance(size, str) else size for size in spec.shape]
        if "mask" in spec.name:
            inputs[spec.name] = np.ones(shape, spec.dtype)
        elif "int" in spec.dtype:
            inputs[spec.name] = rng.integers(0, 2 if "type" in spec.name else 50, shape).astype(spec.dtype)
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return inputs


def loaded(library: Path) -> bool:
    """Whether this process has loaded the library (told on Linux only)."""
    maps = Path("/proc/self/maps")
    return not maps.is_file() or str(library) in maps.read_text()


def check(folder: str, library: Path) -> None:
    """The operator equals the portable body, adapters change the output, and a row without one equals the base."""
    from sdct_export.runtime import MultiAdapterModel

    os.environ[LIBRARY_PATH] = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no operator, which is meant
        portable = MultiAdapterModel(folder)
    del os.environ[LIBRARY_PATH]
    native = MultiAdapterModel(folder)
    assert loaded(library), f"{library} was not loaded"
    inputs, names = make_inputs(native.bundle.inputs), list(native.adapters)
    rows = [names[0], None, dict.fromkeys(names, 0.5), names[-1]]
    got, want, base = native.run(inputs, rows), portable.run(inputs, rows), native.run(inputs, None)
    assert got.keys() == want.keys() != set()
    worst, change = 0.0, 0.0
    for name, expected in want.items():
        scale = float(np.abs(expected).max())
        worst = max(worst, float(np.abs(got[name] - expected).max()) / scale)
        change = max(change, float(np.abs(got[name] - base[name]).max()) / scale)
        assert got[name][1].tobytes() == base[name][1].tobytes(), f"{name}: a row without adapter changed"
        for row in (0, 2, 3):
            assert (np.abs(got[name][row] - base[name][row]).max() / scale) > 1e-3, f"{name}: row {row} has no effect"
    assert worst <= TOLERANCE, f"the operator differs from the portable body by {worst:.2e}"
    print(f"{Path(folder).name}: operator and portable body differ by {worst:.1e}, adapters change {change:.1e}")


def main(site_packages: str, *bundles: str) -> None:
    """Check them all; an AssertionError says what is wrong."""
    library = operator_of_doctor(Path(site_packages))
    print(f"doctor: {library.relative_to(Path(site_packages).resolve())} is ok")
    for bundle in bundles:
        check(bundle, library)
    assert "torch" not in sys.modules, "running a bundle imported torch"


if __name__ == "__main__":
    main(*sys.argv[1:])
