"""Coverage-guided fuzzing of everything that reads a stranger's input (`targets.py`), with atheris.

    make fuzz                                           every target on a few thousand inputs, as CI does
    make fuzz ARGS="adapter -max_total_time=3600"       one target, with libFuzzer's options
    make fuzz ARGS="adapter build/fuzz/adapter-crash-…" one input again

Nothing but `SdctError` may come out of a target, within ten seconds and a GiB of memory. The corpus begins with the
valid files of the target and is kept in build/fuzz; what fails is left there, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

OUT = Path("build/fuzz")
# inputs of each target where none is named, from a fixed seed: nearly the same every time, so that this fails for a
# change and hardly ever by chance
RUNS, PLANTED_RUNS, SECONDS = 8_000, 50_000, 60
AT_ONCE = 2
LIMITS = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=65536", "-len_control=0", "-seed=1"]
MEMORY = 1 << 30  # that one input may take
PLANTED = "planted"  # a target with a fault, which must be found

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 255, 2**31 - 1, 2**31, 2**62, 2**63, 10**30, -1.5, 1e308, float("nan"), float("inf"),
    "", "a", "\ud800", "\u00b2", "9" * 5000, "../../x", "/dev/zero", "\x1b[31m\n", "\u202e", "(a+)+$", "F16",
    "x" * 3000,
    [], {}, [[]], [0], [2, 3], [2**40, 2**40], {"a": {}}, ["a", "b"],
]  # fmt: skip

WORDS = ["\\u00b2", "9" * 5000, "\\ud800", "\\n", "", "-1", "2147483648", "0", "null", "[]", "x"]  # within JSON


def pack(files: list[bytes]) -> bytes:
    """Several files as one input: each after its length."""
    return b"".join(len(content).to_bytes(4, "little") + content for content in files)


def unpack(data: bytes) -> list[bytes]:
    """The files in any input."""
    files = []
    while len(data) >= 4:
        length = int.from_bytes(data[:4], "little")
        files.append(data[4 : 4 + length])
        data = data[4 + length :]
    return files


def change_tree(tree: Any, rng: random.Random) -> Any:
    """A JSON value with one place changed."""
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(child, dict | list):
                stack.append(child)
    if not places:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    how = rng.randrange(7)
    if how == 6:  # one word of the file, wherever it stands, so that what belongs together stays so
        text = json.dumps(tree)
        word, other = rng.choice(re.findall(r"\w+", text) or ["x"]), rng.choice(WORDS)
        return json.loads(re.sub(rf"\b{word}\b", lambda _: other, text))
    if how == 0:
        node[key] = rng.choice(HOSTILE)
    elif how == 1:
        del node[key]
    elif how == 2:
        other, place = rng.choice(places)
        node[key] = other[place] if place in other or (isinstance(other, list) and place < len(other)) else None
    elif how == 3 and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1, 2**31, -(2**31)])
    elif how == 4 and isinstance(node, dict):
        name = rng.choice([str(rng.choice(HOSTILE)), f"{key}.x", key[1:], key.replace(".", "", 1)])
        node[name] = node.pop(key)
    elif how == 5:
        for _ in range(rng.choice([1, 50, 3000])):
            node[key] = [node[key]]
    return json.loads(json.dumps(tree))  # a tree again, where a part of it was put into itself


def change_file(content: bytes, rng: random.Random, mutate: Any) -> bytes:
    """One file changed as what it is, JSON or safetensors, or else byte by byte."""
    start = 8 if content[8:9] == b"{" and content[:1] != b"{" else 0
    if rng.random() < 0.7:
        length = int.from_bytes(content[:8], "little") if start else len(content)
        text, body = content[start : start + length], content[start + length :]
        try:
            changed = json.dumps(change_tree(json.loads(text), rng)).encode()
            return (len(changed).to_bytes(8, "little") if start else b"") + changed + body
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            pass
    return bytes(mutate(content, len(content) + 64))


def fuzz(name: str, options: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import atheris

    _leave_plain_imports()
    with atheris.instrument_imports(include=["sdct_export", "targets"]):
        from targets import TARGETS, planted
    corpus = OUT / name
    corpus.mkdir(parents=True, exist_ok=True)
    target = planted if name == PLANTED else TARGETS[name]
    seeds = [[b'{"a": 1}']] if name == PLANTED else TARGETS[name].seeds()
    for number, files in enumerate(seeds):
        (corpus / f"valid{number}").write_bytes(pack(files))
        target(files)  # what is loaded on first use counts as no input's memory
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)

    def mutator(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        files = unpack(data) or [b"{}"]
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(files))
            files[at] = b"" if rng.random() < 0.01 else change_file(files[at], rng, atheris.Mutate)
        return pack(files)[:most]

    def one(data: bytes) -> None:
        target(unpack(data))

    given = [option for option in options if not option.startswith("-")]
    flags = [option for option in options if option.startswith("-")]
    prefix = f"-artifact_prefix={OUT}/{name}-"
    atheris.Setup([sys.argv[0], *LIMITS, prefix, *flags, *(given or [str(corpus)])], one, custom_mutator=mutator)
    atheris.Fuzz()


def _leave_plain_imports() -> None:
    """Import the package from its sources: atheris cannot instrument what an editable installation's finder loads."""
    spec = importlib.util.find_spec("sdct_export")
    assert spec is not None
    places = [str(Path(place) / "lib") for place in spec.submodule_search_locations or ()]
    os.environ.setdefault("SDCT_LIBRARY_PATH", os.pathsep.join(places))
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
    sys.path.insert(0, str(Path(__file__).parents[2]))


def all_targets() -> int:
    """Every target for a few seconds; the number of those that failed."""
    from targets import TARGETS

    OUT.mkdir(parents=True, exist_ok=True)
    waiting = [PLANTED, *TARGETS]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = 0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            command = [
                sys.executable,
                __file__,
                name,
                f"-runs={PLANTED_RUNS if name == PLANTED else RUNS}",
                f"-max_total_time={SECONDS}",
                "-print_final_stats=1",
            ]
            with (OUT / f"{name}.log").open("wb") as log:
                seeded = os.environ | {"PYTHONHASHSEED": "0"}
                running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=seeded)
        for name, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            log = (OUT / f"{name}.log").read_text(errors="replace")
            runs = log.rpartition("stat::number_of_executed_units:")[2].split()[:1] or ["?"]
            blind = name != PLANTED and "no interesting inputs" in log
            if (process.returncode != 0) != (name == PLANTED) or blind:
                failed += 1
                print(f"{log[-8000:]}\nfuzz: FAILED {name}, see {OUT}/{name}.log", flush=True)
            else:
                print(
                    f"fuzz: {name} ok, {runs[0]} inputs" + (" (its fault was found)" * (name == PLANTED)), flush=True
                )
        time.sleep(0.2)
    return failed


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        fuzz(sys.argv[1], sys.argv[2:])
    else:
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(
            prefix="sdct-fuzz-", dir=memory
        ) as place:  # libFuzzer's exit cleans up nothing
            os.environ["TMPDIR"] = place
            failed = all_targets()
        sys.exit(1 if failed else 0)
