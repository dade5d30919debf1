"""Which of several plugin libraries is taken for a TensorRT version."""

from importlib import metadata
from pathlib import Path

import pytest

from sdct_export.doctor import examine
from sdct_export.errors import UnsupportedError
from sdct_export.native import find_plugin
from sdct_export.plugin_choice import choose_plugin, library_version, parse_version, plugin_libraries

FOLDER = Path("lib")
NUMBERED = [FOLDER / f"libsdct_tensorrt_{v}.so" for v in ("10_0", "10_16", "11_1", "8_5")]
BY_HAND = FOLDER / "libsdct_tensorrt.so"


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ((8, 5), "8_5"),
        ((8, 6), "8_5"),
        ((10, 0), "10_0"),
        ((10, 3), "10_0"),  # numbers, not text: 10.3 comes before 10.16
        ((10, 15), "10_0"),
        ((10, 16), "10_16"),
        ((10, 99), "10_16"),
        ((11, 4), "11_1"),
    ],
)
def test_newest_of_the_same_major_version_that_is_not_newer(found, taken):
    chosen = choose_plugin(NUMBERED, found)
    assert chosen == FOLDER / f"libsdct_tensorrt_{taken}.so"
    assert choose_plugin(NUMBERED[::-1], found) == chosen


@pytest.mark.parametrize("found", [(8, 4), (9, 3), (11, 0), (12, 0)])
def test_error_names_what_there_is_and_what_to_do(found):
    message = (
        f"no plugin library for TensorRT {found[0]}.{found[1]}: lib has those for 8.5, 10.0, 10.16, 11.1, .*build"
    )
    with pytest.raises(UnsupportedError, match=message):
        choose_plugin(NUMBERED, found)


def test_a_library_built_by_hand_comes_first():
    assert choose_plugin([*NUMBERED, BY_HAND], (10, 16)) == BY_HAND
    assert choose_plugin([BY_HAND], (12, 0)) == BY_HAND
    assert choose_plugin([*NUMBERED, BY_HAND], None) == BY_HAND


def test_none_where_nothing_can_be_chosen():
    assert choose_plugin([], (10, 0)) is None
    assert choose_plugin([], None) is None
    assert choose_plugin(NUMBERED, None) is None


def test_libraries_come_from_the_first_folder_that_has_any(tmp_path):
    empty, first, second = (tmp_path / name for name in ("empty", "first", "second"))
    for folder, names in (
        (empty, ["libsdct_onnxruntime.so", "libsdct_tensorrt_10_0.so.1", "libsdct_tensorrt_host_test.so"]),
        (first, ["libsdct_tensorrt_8_5.so", "libsdct_tensorrt_10_16.so", "libsdct_tensorrt_x_1.so"]),
        (second, ["libsdct_tensorrt.so"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    (first / "libsdct_tensorrt_9_0.so").mkdir()  # no file
    want = [first / "libsdct_tensorrt_10_16.so", first / "libsdct_tensorrt_8_5.so"]
    assert plugin_libraries([tmp_path / "absent", empty, first, second]) == want
    assert plugin_libraries([empty]) == []


def test_versions():
    assert [library_version(path) for path in (*NUMBERED, BY_HAND)] == [(10, 0), (10, 16), (11, 1), (8, 5), None]
    assert parse_version("10.16.1.11") == (10, 16)
    assert parse_version("8.5") == (8, 5)
    with pytest.raises(UnsupportedError, match="calls its version 'unknown'"):
        parse_version("unknown")


def test_the_search_path_and_doctor_use_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(tmp_path))
    assert find_plugin("10.3.0.26") is None
    for path in NUMBERED:
        (tmp_path / path.name).write_bytes(b"")
    assert find_plugin("10.3.0.26") == tmp_path / "libsdct_tensorrt_10_0.so"
    assert find_plugin(None) is None

    def tensorrt_is(version):
        def installed(name):
            if name == "tensorrt" and version is None:
                raise metadata.PackageNotFoundError(name)
            return version if name == "tensorrt" else "1.2"

        monkeypatch.setattr(metadata, "version", installed)
        return {finding.part: finding for finding in examine()}["plugin library"]

    none = tensorrt_is(None)
    assert (none.state, none.detail) == (
        "ok",
        f"for TensorRT 8.5, 10.0, 10.16, 11.1, whichever is installed: {tmp_path}",
    )
    newest = tensorrt_is("11.4.0")
    assert (newest.state, newest.detail) == ("ok", f"for TensorRT 11.1: {tmp_path / 'libsdct_tensorrt_11_1.so'}")
    unfit = tensorrt_is("9.1.0")
    assert unfit.state == "broken"
    assert "no plugin library for TensorRT 9.1" in unfit.detail
