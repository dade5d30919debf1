"""Drive the plugin library through a real TensorRT registry: `python trt_registry_check.py LIBRARY`. Needs no GPU.

Works with the full package of any version (8.5 on) and with the lean runtime, which brings the same registry. Prints
one line a check and exits 1 where one fails. Run by test_trt_plugin.py with the interpreter that has TensorRT.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

try:
    import tensorrt as trt
except ImportError:  # the lean runtime; the extension inside it has the full interface
    import tensorrt_lean_bindings.tensorrt_lean as trt

NAME, VERSION, NAMESPACE = "SpectralDelta", "1", ""
GOOD = {"d_in": [64], "d_out": [64, 32], "capacity": [7, 3]}
V3 = hasattr(trt, "IPluginV3")
failed = 0


def check(what: str, passed: bool) -> None:
    global failed
    failed += not passed
    print("ok  " if passed else "FAIL", what)


def find():
    registry = trt.get_plugin_registry()
    if V3:
        return registry.get_creator(NAME, VERSION, NAMESPACE)
    return registry.get_plugin_creator(NAME, VERSION, NAMESPACE)


def collection(fields):
    made = [
        trt.PluginField(name, np.array(values, np.int32), trt.PluginFieldType.INT32)
        if isinstance(values, list)
        else trt.PluginField(name, *values)
        for name, values in fields
    ]
    return trt.PluginFieldCollection(made)


def create(creator, fields, phase="BUILD"):
    """The plugin for `fields` (name -> int32 list, or (array, type)), None where it is refused."""
    made = collection(list(fields.items()) if isinstance(fields, dict) else fields)
    try:
        if V3:
            return creator.create_plugin("attn.q", made, getattr(trt.TensorRTPhase, phase))
        return creator.create_plugin("attn.q", made)
    except (RuntimeError, TypeError):  # how some versions report a null plugin
        return None


def check_fields(creator) -> None:
    check("the creator names its fields", [f.name for f in creator.field_names] == list(GOOD))
    for name in GOOD:
        check(f"refused without {name}", create(creator, {k: v for k, v in GOOD.items() if k != name}) is None)
        as_float = (np.array(GOOD[name], np.float32), trt.PluginFieldType.FLOAT32)
        check(f"refused with float32 {name}", create(creator, GOOD | {name: as_float}) is None)
        check(f"refused with {name} twice", create(creator, [*GOOD.items(), (name, GOOD[name])]) is None)
    for name, bad in [
        ("d_in", [64, 64]),
        ("d_in", [0]),
        ("d_in", [-64]),
        ("d_in", [2**31 - 1]),
        ("d_out", [64]),
        ("d_out", [64, -32]),
        ("d_out", [64] * 9),
        ("capacity", [7]),
        ("capacity", [7, -3]),
        ("capacity", [7, 3, 1]),
    ]:
        check(f"refused with {name} = {bad}", create(creator, GOOD | {name: bad}) is None)
    check("refused with an unknown field", create(creator, GOOD | {"scaling": [1]}) is None)
    check("refused with no field", create(creator, {}) is None)


def check_v2(creator) -> None:
    plugin = create(creator, GOOD)
    check("created from the fields of a node", plugin is not None and plugin.num_outputs == 2)
    check("type, version", (plugin.plugin_type, plugin.plugin_version) == (NAME, VERSION))
    data = bytes(plugin.serialize())
    again = creator.deserialize_plugin("attn.q", data)
    check("deserialized", again is not None and again.num_outputs == 2)
    check("serializes to the same bytes", bytes(again.serialize()) == data)
    clone = plugin.clone()
    check("cloned", clone.num_outputs == 2 and bytes(clone.serialize()) == data)
    other = create(creator, GOOD | {"capacity": [3, 7]})
    check("another capacity serializes differently", bytes(other.serialize()) != data)

    def accepted(changed: bytes) -> bool:
        try:
            return creator.deserialize_plugin("attn.q", changed) is not None
        except (RuntimeError, TypeError):
            return False

    flips = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    check(f"refused with any of {len(data)} bytes changed", not any(map(accepted, flips)))
    check("refused when cut short", not any(accepted(data[:i]) for i in range(len(data))))
    check("refused when extended", not accepted(data + b"\0"))


def check_v3(creator) -> None:
    # what Python cannot call on a plugin of C++ (clone, enqueue, ...) is in plugins/tests/tensorrt_host_test.cpp
    plugin = create(creator, GOOD)
    check("created from the fields of a node", plugin is not None)
    core, build, runtime = (
        plugin.get_capability_interface(getattr(trt.PluginCapabilityType, t)) for t in ("CORE", "BUILD", "RUNTIME")
    )
    check(
        "name, version", (core.plugin_name, core.plugin_version, core.plugin_namespace) == (NAME, VERSION, NAMESPACE)
    )
    check("two outputs", build.num_outputs == 2)
    saved = GOOD | {"contract_version": [1]}
    again = create(creator, saved, "RUNTIME")
    check("created again from what an engine keeps", again is not None)
    same = again.get_capability_interface(trt.PluginCapabilityType.BUILD).timing_cache_id == build.timing_cache_id
    check("with the same timing cache ID", same)
    other = create(creator, GOOD | {"capacity": [3, 7]}).get_capability_interface(trt.PluginCapabilityType.BUILD)
    check("another capacity has another", other.timing_cache_id != build.timing_cache_id)
    check("refused at run time without a version", create(creator, GOOD, "RUNTIME") is None)
    check("refused of a newer version", create(creator, GOOD | {"contract_version": [2]}, "RUNTIME") is None)
    check("runtime interface", runtime is not None)


def check_load_library(library: str) -> None:
    registry = trt.get_plugin_registry()
    if not hasattr(registry, "load_library"):
        print("skip loadLibrary: TensorRT 8.5 has none")
        return
    handle = registry.load_library(library)
    check("loadLibrary takes over from registration at load", handle is not None and find() is not None)
    check("loadLibrary refuses a second copy, as documented", registry.load_library(library) is None)
    registry.deregister_library(handle)
    check("deregistering forgets the plugin", find() is None)
    check("it can be registered again", ctypes.CDLL(library).sdct_tensorrt_register() == 1 and find() is not None)
    with tempfile.TemporaryDirectory() as folder:  # as an engine that carries the library unpacks it
        copy = shutil.copy(library, Path(folder) / "unpacked.so")
        check("a copy takes over and is found", registry.load_library(str(copy)) is not None and find() is not None)


def main(library: str) -> int:
    print(f"TensorRT {getattr(trt, '__version__', '?')}, {'IPluginV3' if V3 else 'IPluginV2DynamicExt'}")
    check("unknown before the library is loaded", find() is None)
    loaded = ctypes.CDLL(library)
    creator = find()
    check("registered by loading the library", creator is not None)
    check("registering again changes nothing", loaded.sdct_tensorrt_register() == 1)
    check_fields(creator)
    (check_v3 if V3 else check_v2)(creator)
    check_load_library(library)
    print(f"{failed} failed")
    sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
