"""Stand-ins for TensorRT's builder and for `trtexec`: what they are asked for, and the network the parser makes.

`version` decides which names exist, after NVIDIA's Python bindings of that version: a call of one that does not is an
error here as there. The parser names layers as NVIDIA's does: after the node (with a number where a node needs
several), after the weights where they are constants, and helpers not at all or, in 9, `ONNXTRT_...`.
"""

from __future__ import annotations

import shlex
import types
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

FLOATS = ("float32", "float16")
TYPES = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BOOL: "bool"}
TYPES |= {TensorProto.INT64: "int64", TensorProto.INT32: "int32"}
SHAPES = ("Shape", "Size")


class Tensor:
    """`ITensor`."""

    def __init__(self, name: str, dtype: str, *, of_shapes: bool = False) -> None:
        self.name, self.dtype, self.is_execution_tensor = name, dtype, not of_shapes


class Layer:
    """`ILayer`; refuses what the real one refuses."""

    def __init__(self, name: str, kind: str, outputs: list[Tensor]) -> None:
        self.name, self.type, self.outputs = name, kind, outputs
        self.pinned: str | None = None
        self.output_types: dict[int, str] = {}

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]

    @property
    def precision(self) -> str | None:
        return self.pinned

    @precision.setter
    def precision(self, dtype: str) -> None:
        assert all(output.is_execution_tensor for output in self.outputs), "shapes have no precision"
        self.pinned = dtype

    def set_output_type(self, index: int, dtype: str) -> None:
        assert self.outputs[index].dtype in FLOATS, "only numbers that are floats have another float type"
        self.output_types[index] = dtype


class Network:
    """`INetworkDefinition` once the parser has filled it."""

    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.layers: list[Layer] = []
        self.inputs: list[Any] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def parse(self, graph: onnx.GraphProto, version: tuple[int, int]) -> str:
        """Add the layers of a graph; the problem where the parser of this version has one."""
        for value in graph.input:
            self.inputs.append(types.SimpleNamespace(name=value.name))
        return self._parse(graph, version, {})

    def _parse(self, graph: onnx.GraphProto, version: tuple[int, int], around: dict[str, int]) -> str:
        known = around | {
            v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)
        }
        weights = {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            new = {"Gelu": (10, 0), "LayerNormalization": (8, 6), "TensorScatter": (10, 15)}.get(node.op_type, (0, 0))
            if version < new:
                return f"No importer registered for op: {node.op_type}"
            if version < (10, 0) and node.op_type == "Shape" and node.attribute:
                return "Shape gives the whole shape here, whatever its bounds"
            for attribute in node.attribute:
                if attribute.HasField("g") and (problem := self._parse(attribute.g, version, known | weights)):
                    return problem
            if node.op_type in ("Constant", "If", "Loop"):
                continue
            for name in node.input:
                if name in weights:
                    self._add(name, "constant", [(name, weights[name])])
            helper = (
                "ONNXTRT_unsqueezeTensor" if version >= (9, 0) else f"(Unnamed Layer* {len(self.layers)}) [Shuffle]"
            )
            self._add(helper, "shuffle", [("", known[node.output[0]])])
            kind = "plugin" if node.domain else node.op_type.lower()
            name = f"(Unnamed Layer* {len(self.layers)}) [Normalization]" if "normalization" in kind else node.name
            outputs = [(name, known[name]) for name in node.output]
            self._add(name or node.output[0], kind, outputs, of_shapes=node.op_type in SHAPES)
        return ""

    def _add(self, name: str, kind: str, outputs: list[tuple[str, int]], *, of_shapes: bool = False) -> None:
        taken = {layer.name for layer in self.layers}
        unique = next(n for n in (name, *(f"{name}_{i}" for i in range(len(taken) + 1))) if n not in taken)
        self.layers.append(Layer(unique, kind, [Tensor(n, TYPES[t], of_shapes=of_shapes) for n, t in outputs]))


class FakeTensorRT(types.ModuleType):
    """Records in `said` what the builder is asked for; `problem` makes it fail."""

    float32, float16 = FLOATS

    def __init__(self, version: str = "10.16.0", *, problem: str = "") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.said: dict[str, Any] = {"preview": {}, "set": [], "cleared": [], "shapes": {}}
        number = int(version.split(".")[0]), int(version.split(".")[1])
        fake = self

        class ILogger:
            Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)

        class Builder:
            def __init__(self, logger: Any) -> None:
                if problem == "no GPU":
                    logger.log(1, "CUDA initialization failure with error: 35")
                    raise TypeError("factory function returned nullptr")
                self.logger = logger

            def create_network(self, flags: int) -> Network:
                fake.said["network"] = flags
                fake.network = Network(flags)
                return fake.network

            def create_builder_config(self) -> Any:
                fake.config = Config()
                return fake.config

            def create_optimization_profile(self) -> Any:
                shapes: dict[str, Any] = {}

                def set_shape(name: str, *three: Any) -> None:
                    fake.said["shapes"][name] = shapes[name] = three

                return types.SimpleNamespace(set_shape=set_shape, shapes=shapes)

            def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
                if problem == "no tactic":
                    self.logger.log(1, "could not find any implementation")
                    return None
                monitor = getattr(config, "progress_monitor", None)
                if monitor is not None:
                    monitor.phase_start("tactics", None, 2)
                    assert monitor.step_complete("tactics", 0)
                    monitor.phase_finish("tactics")
                return b"a plan"

        class Config:
            __slots__ = (
                *(["plugins_to_serialize"] if number >= (8, 6) else []),
                *(["progress_monitor"] if number >= (9, 0) else []),
            )

            def __init__(self) -> None:
                for name in self.__slots__:
                    setattr(self, name, [] if name == "plugins_to_serialize" else None)

            def clear_flag(self, flag: str) -> None:
                fake.said["cleared"].append(flag)

            def set_flag(self, flag: str) -> None:
                fake.said["set"].append(flag)

            def set_preview_feature(self, feature: str, on: bool) -> None:
                fake.said["preview"][feature] = on

            def add_optimization_profile(self, profile: Any) -> None:
                fake.said["profiles"] = fake.said.get("profiles", 0) + 1
                fake.said.setdefault("profile shapes", []).append(profile.shapes)

            def create_timing_cache(self, data: bytes) -> Any:
                fake.said["cache"] = data
                return types.SimpleNamespace(serialize=lambda: data + b"+")

            def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
                assert ignore_mismatch is False

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: Network, logger: Any) -> None:
                self.network, self.problem = network, "no importer\nfor Frobnicate"

            def parse_from_file(self, path: str) -> bool:
                fake.said["graph"] = path
                model = onnx.load(path, load_external_data=False)
                opset = {o.domain: o.version for o in model.opset_import}[""]
                assert number >= (10, 0) or opset <= 17, "TensorRT 8 reads up to opset 17"
                found = self.network.parse(onnx.shape_inference.infer_shapes(model).graph, number)
                self.problem = found or self.problem
                return not found and problem != "unreadable"

            def get_error(self, index: int) -> Any:
                return types.SimpleNamespace(desc=lambda: self.problem)

        def names(*known: tuple[str, tuple[int, int], tuple[int, int]]) -> Any:
            """The names of an enumeration that this version has: from the first version until before the second."""
            here = [name for name, since, until in known if since <= number < until]
            return types.SimpleNamespace(**{name: name for name in here})

        always, never = (0, 0), (99, 0)
        self.ILogger, self.Builder, self.OnnxParser = ILogger, Builder, OnnxParser
        self.BuilderFlag = names(
            ("TF32", always, never), ("FP16", always, (11, 0)), ("OBEY_PRECISION_CONSTRAINTS", always, (11, 0))
        )
        self.LayerType = types.SimpleNamespace(CONSTANT="constant", SHAPE="shape")
        self.PreviewFeature = names(
            ("FASTER_DYNAMIC_SHAPES_0805", (8, 5), (10, 0)),
            ("PROFILE_SHARING_0806", (8, 6), (11, 0)),
            ("ALIASED_PLUGIN_IO_10_03", (10, 3), never),
        )
        flags: dict[str, int] = {}
        if number < (11, 0):
            flags["EXPLICIT_BATCH"] = 0
        if number >= (9, 0):
            flags["STRONGLY_TYPED"] = 1
            self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(**flags)

    def pins(self) -> dict[str, tuple[str, dict[int, str]]]:
        """Layer name -> precision and output types, of the layers that have one."""
        return {layer.name: (layer.pinned, layer.output_types) for layer in self.network.layers if layer.pinned}


OPTIONS = {  # of `trtexec`: since, until before
    "onnx": ((0, 0), (99, 0)),
    "saveEngine": ((0, 0), (99, 0)),
    "profile": ((9, 0), (99, 0)),
    "minShapes": ((0, 0), (99, 0)),
    "optShapes": ((0, 0), (99, 0)),
    "maxShapes": ((0, 0), (99, 0)),
    "noTF32": ((0, 0), (99, 0)),
    "timingCacheFile": ((0, 0), (99, 0)),
    "preview": ((8, 5), (99, 0)),
    "fp16": ((0, 0), (11, 0)),
    "precisionConstraints": ((0, 0), (11, 0)),
    "layerPrecisions": ((0, 0), (11, 0)),
    "layerOutputTypes": ((0, 0), (11, 0)),
    "stronglyTyped": ((9, 0), (11, 0)),
    "plugins": ((0, 0), (8, 6)),
    "dynamicPlugins": ((8, 6), (99, 0)),
    "setPluginsToSerialize": ((8, 6), (99, 0)),
    "buildOnly": ((0, 0), (8, 6)),
    "skipInference": ((8, 6), (99, 0)),
}


def trtexec(command: str, version: str) -> FakeTensorRT:
    """What NVIDIA's `trtexec` of this version asks the builder for when it is given `command`."""
    trt = FakeTensorRT(version)
    number = int(version.split(".")[0]), int(version.split(".")[1])
    program, *words = shlex.split(command)
    assert program == "trtexec"
    given: dict[str, list[str]] = {}
    for word in words:
        option, _, value = word.removeprefix("--").partition("=")
        since, until = OPTIONS[option]
        assert since <= number < until, f"trtexec {version} has no --{option}"
        given.setdefault(option, []).append(value)
    assert ("skipInference" in given) or ("buildOnly" in given)  # the command is to build, not to measure
    builder = trt.Builder(None)
    flags = trt.NetworkDefinitionCreationFlag
    typed = "stronglyTyped" in given or number >= (11, 0)
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED if typed else flags.EXPLICIT_BATCH))
    assert trt.OnnxParser(network, None).parse_from_file(given["onnx"][0])
    config = builder.create_builder_config()
    if "noTF32" in given:
        config.clear_flag(trt.BuilderFlag.TF32)
    if "fp16" in given:
        config.set_flag(trt.BuilderFlag.FP16)
    for value in given.get("preview", []):
        features = {"profileSharing0806": "PROFILE_SHARING_0806", "aliasedPluginIO1003": "ALIASED_PLUGIN_IO_10_03"}
        for part in value.split(","):
            config.set_preview_feature(getattr(trt.PreviewFeature, features[part[1:]]), part[0] == "+")
    if "setPluginsToSerialize" in given:
        config.plugins_to_serialize = given["setPluginsToSerialize"]
    trt.said["loaded"] = given.get("dynamicPlugins", given.get("plugins", []))
    assert given.get("profile", ["0"]) == [str(i) for i in range(len(given["minShapes"]))]
    for i in range(len(given["minShapes"])):
        three = [
            dict(item.rsplit(":", 1) for item in given[f"{name}Shapes"][i].split(","))
            for name in ("min", "opt", "max")
        ]
        profile = builder.create_optimization_profile()
        for name in three[0]:
            profile.set_shape(name, *(tuple(map(int, part[name].split("x"))) for part in three))
        config.add_optimization_profile(profile)
    if "precisionConstraints" in given:
        assert given["precisionConstraints"] == ["obey"]
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        kinds = {"fp32": trt.float32}
        pins = {
            option: dict(item.rsplit(":", 1) for item in given.get(option, [""])[0].split(",") if item)
            for option in ("layerPrecisions", "layerOutputTypes")
        }
        for layer in network.layers:
            if layer.name in pins["layerPrecisions"]:
                layer.precision = kinds[pins["layerPrecisions"][layer.name]]
            if layer.name in pins["layerOutputTypes"]:
                for j in range(layer.num_outputs):
                    layer.set_output_type(j, kinds[pins["layerOutputTypes"][layer.name]])
    if "timingCacheFile" in given:
        file = Path(given["timingCacheFile"][0])
        config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    return trt


def plugin_of(folder: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that says it was built for `version`, compiled by nobody: ctypes is replaced."""
    library = folder / "libsdct_tensorrt.so"
    library.write_bytes(b"")
    functions = types.SimpleNamespace(sdct_tensorrt_version=lambda: version, sdct_tensorrt_register=lambda: 1)
    monkeypatch.setattr("ctypes.CDLL", lambda path: functions)
    monkeypatch.setenv("SDCT_LIBRARY_PATH", str(folder))
    return library
