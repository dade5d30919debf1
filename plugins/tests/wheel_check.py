"""Asks an installed wheel whether it runs bundles, see check_wheel.sh: `wheel_check.py SITE_PACKAGES BUNDLE...`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

LIBRARY_PATH = "SDCT_LIBRARY_PATH"
SIZES = {"batch": 4, "sequence": 7}
TOLERANCE = 1e-5  # of the largest number in an output


# packages that an installation for running bundles must do without
ABSENT = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "peft")

WANTING = r"this needs (torch|onnx_ir), which is not installed: pip install 'sdct_export\[torch\]'"


def command(*args: object) -> subprocess.CompletedProcess[str]:
    """What `sdct-export ARGS` gives in a process of its own."""
    program = Path(sys.executable).parent / "sdct-export"
    return subprocess.run([program, *map(str, args)], capture_output=True, text=True, timeout=300)


def answer(*args: object) -> Any:
    """The JSON that a command prints, which must succeed."""
    done = command(*args, "--json")
    assert (done.returncode, done.stderr) == (0, ""), (args, done)
    return json.loads(done.stdout)


def commands(folder: str) -> None:
    """Every command that needs no torch runs `folder`; those that need it end with one line which says so."""
    from sdct_export.runtime import MultiAdapterModel

    found = {finding["part"]: finding["state"] for finding in answer("doctor")}
    assert {found[part] for part in ("numpy", "tokenizers", "onnxruntime", "operator library")} == {"ok"}, found
    assert {found[part] for part in ("torch", "transformers", "onnx")} == {"missing"}, found
    described = answer("inspect", folder)
    name = next(iter(described["adapters"]))
    assert answer("inspect", Path(folder, "adapters", name))["n_parameters"] > 0
    report = answer("verify", folder)
    assert report["ok"] is True
    assert {"recorded mixed", f"effect of {name}", "base rows"} <= {check["name"] for check in report["checks"]}, (
        report
    )
    if Path(folder, "tokenizer.json").exists():
        texts = ("--text", "one two three", "--text", "one two three")
        result = answer("run", folder, *texts, "--adapter", name, "--adapter", "none")
        assert [row["adapter"] for row in result["rows"]] == [name, "none"]
        got = {output: np.asarray(rows) for output, rows in result["outputs"].items()}
        ids = np.asarray([[1, 2, 3]] * 2)
        want = MultiAdapterModel(folder).run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, [name, None])
        for output, rows in want.items():
            assert np.allclose(got[output], rows, rtol=1e-6, atol=1e-6), output
            assert not np.allclose(rows[0], rows[1], atol=1e-3), f"{output}: the adapter has no effect"

    one = ("--model", folder, "--adapter", Path(folder, "adapters", name), "--output", "new")
    projected = ("project", "--model", folder, "--output", "new")
    for args in (
        one,
        (*one, "--merge"),
        (*one, "--merge", "--format", "transformers"),
        (*projected, "--lora", folder),
        (*projected, "--tuned", folder),
        ("verify", folder, "--model", folder),
        ("verify", folder, "--model", folder, "--json"),
    ):
        done = command(*args)
        assert (done.returncode, done.stdout) == (1, ""), (args, done)
        assert re.fullmatch(rf"error: {WANTING}\n", done.stderr), (args, done)
    assert not Path("new").exists()
    print(f"{Path(folder).name}: commands run it, {len(ABSENT)} packages they must do without are not here")


def names_that_need_torch() -> None:
    """Python says of such a name what to install, too."""
    import sdct_export

    needy = []
    for name in sdct_export.__all__:
        try:
            getattr(sdct_export, name)
        except ImportError as error:
            needy.append(name)
            said = str(error)
            assert re.fullmatch(rf"sdct_export\.{name}: {WANTING}", said), said
    assert {"export_multi", "get_sdct_model", "merge"} <= set(needy), needy
    assert not {"SdctAdapter", "SdctConfig", "SdctError"} & set(needy), needy


def operator_of_doctor(site_packages: Path) -> Path:
    """Where `sdct-export doctor` finds the operator library: inside the installed package."""
    (operator,) = (finding for finding in answer("doctor") if finding["part"] == "operator library")
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
    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    assert not present, f"{present} came along; an installation for running bundles must do without"
    names_that_need_torch()
    library = operator_of_doctor(Path(site_packages))
    print(f"doctor: {library.relative_to(Path(site_packages).resolve())} is ok")
    for bundle in bundles:
        check(bundle, library)
        commands(bundle)
    size = sum(path.stat().st_size for path in Path(site_packages).rglob("*") if path.is_file())
    print(f"installed: {size / 1e6:.0f} MB, pip among it")


if __name__ == "__main__":
    main(*sys.argv[1:])
