"""What TensorRT's builder is told, once: as calls to its API, and as the `trtexec` command that does the same.

Each `Setting` holds both, so that neither can have what the other lacks. Options and names are those of NVIDIA's
`trtexec` and Python bindings for the versions named; tensorrt itself is not imported here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Version = tuple[int, int]
Shapes = Mapping[str, Sequence[tuple[int, ...]]]

NEWEST: Version = (10, 0)  # whose command is printed where TensorRT is missing: later ones take it, too
LAYER_NORMALIZATION: Version = (8, 6)  # the first whose parser knows it
TENSOR_SCATTER: Version = (10, 15)  # likewise
PROFILES: Version = (9, 0)  # the first whose `trtexec` takes several
_FLOAT32 = re.compile(rb"float32(?:\.in)?\[\d+\]")  # what `lower.name_float32` names nodes
_HELPERS = ("(Unnamed Layer", "ONNXTRT_")  # layers that the parser adds and does not name after a node (8; 9)


class Builder(NamedTuple):
    """What a setting is applied to: the module tensorrt, the builder, its configuration and the parsed network."""

    trt: Any
    builder: Any
    config: Any
    network: Any


class Setting(NamedTuple):
    """One thing the builder is told: options of `trtexec`, and the call that has the same effect."""

    options: tuple[str, ...]
    apply: Callable[[Builder], None]


def is_strongly_typed(version: Version) -> bool:
    """Whether the types of the graph are those of the engine; before, the builder chooses among those it may use."""
    return version >= (10, 0)


def is_mixed(version: Version, dtype: str) -> bool:
    """Whether the builder may compute in float16 what it is not told to leave in float32."""
    return dtype == "float16" and not is_strongly_typed(version)


def carries_plugins(version: Version) -> bool:
    """Whether an engine can hold the plugin library."""
    return version >= (8, 6)


def shares_profiles(version: Version) -> bool:
    """Whether several execution contexts may use one optimization profile, as `builder_settings` sets it."""
    return version >= (8, 6)


def has_profiles(version: Version) -> bool:
    """Whether prefill and decode have optimization profiles of their own."""
    return version >= PROFILES


def writes_cache_in_place(version: Version) -> bool:
    """Whether TensorRT keeps the present of a key-value cache in the memory of its past."""
    return version >= TENSOR_SCATTER


def builder_settings(
    version: Version,
    dtype: str,
    graph: Path,
    profiles: Sequence[Shapes],
    *,
    library: Path | None,
    embed: bool,
    in_place: bool,
) -> list[Setting]:
    """Everything that decides what engine comes out.

    Args:
        version: of TensorRT.
        dtype: of the bundle.
        graph: the file that the parser reads.
        profiles: smallest, most usual and largest shape of each input, for each optimization profile.
        library: the plugin library, None for a graph without plugin nodes.
        embed: let the engine carry the library, where it can.
        in_place: let the plugin update y in place, where TensorRT can (10.3 on).
    """
    settings = [_profile(i, profiles) for i in range(len(profiles))]
    settings.append(Setting(("--noTF32",), lambda b: b.config.clear_flag(b.trt.BuilderFlag.TF32)))  # it has 10 bits
    if library is not None:
        settings += _plugin(version, library, embed)
    if is_strongly_typed(version):
        # said when the network is created; TensorRT 11 knows nothing else
        settings.append(Setting(("--stronglyTyped",) if version < (11, 0) else (), lambda b: None))
    elif is_mixed(version, dtype):
        settings.append(Setting(("--fp16",), lambda b: b.config.set_flag(b.trt.BuilderFlag.FP16)))
        settings.append(_pins(graph))
    if (8, 6) <= version < (10, 0):  # on by itself from 10 on
        settings.append(_preview("profileSharing0806", "PROFILE_SHARING_0806"))
    if library is not None and in_place and version >= (10, 3):
        settings.append(_preview("aliasedPluginIO1003", "ALIASED_PLUGIN_IO_10_03"))
    return settings


def command(
    version: Version, graph: Path, engine: Path, settings: Sequence[Setting], timing_cache: Path | None
) -> str:
    """The `trtexec` command with these settings; it only builds."""
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}"]
    words += [option for setting in settings for option in setting.options]
    if timing_cache is not None:
        words.append(f"--timingCacheFile={timing_cache}")
    words.append("--skipInference" if version >= (8, 6) else "--buildOnly")
    return shlex.join(words)


def network_flags(trt: Any, version: Version) -> int:
    """How the network is created: strongly typed from TensorRT 10 on (11 knows nothing else), else explicit batch."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.STRONGLY_TYPED if is_strongly_typed(version) else flags.EXPLICIT_BATCH)


def _profile(index: int, profiles: Sequence[Shapes]) -> Setting:
    shapes = profiles[index]
    extents = {name: {tuple(shape) for profile in profiles for shape in profile[name]} for name in shapes}
    dynamic = {name: three for name, three in shapes.items() if len(extents[name]) > 1}
    options = [f"--profile={index}"] if len(profiles) > 1 else []
    for i, option in enumerate(("minShapes", "optShapes", "maxShapes") if dynamic else ()):
        items = (f"{name}:{'x'.join(map(str, three[i]))}" for name, three in dynamic.items())
        options.append(f"--{option}={','.join(items)}")

    def apply(b: Builder) -> None:
        profile = b.builder.create_optimization_profile()
        for i in range(b.network.num_inputs):
            name = b.network.get_input(i).name
            profile.set_shape(name, *shapes[name])
        b.config.add_optimization_profile(profile)

    return Setting(tuple(options), apply)


def _plugin(version: Version, library: Path, embed: bool) -> list[Setting]:
    """The library is loaded before the parser runs, which is what the first option says."""
    load = "--dynamicPlugins" if version >= (8, 6) else "--plugins"
    settings = [Setting((f"{load}={library}",), lambda b: None)]

    def carry(b: Builder) -> None:
        b.config.plugins_to_serialize = [str(library)]

    if embed and carries_plugins(version):
        settings.append(Setting((f"--setPluginsToSerialize={library}",), carry))
    return settings


def _preview(option: str, name: str) -> Setting:
    return Setting(
        (f"--preview=+{option}",), lambda b: b.config.set_preview_feature(getattr(b.trt.PreviewFeature, name), True)
    )


def _pins(graph: Path) -> Setting:
    """Keep in float32 what the graph has in float32, where the builder may compute in float16.

    The names are read from the bytes of the file, so that this works where onnx is missing.
    """
    names = sorted({match.decode() for match in _FLOAT32.findall(graph.read_bytes())}, key=lambda n: (len(n), n))
    options = ["--precisionConstraints=obey"]
    if names:
        options.append(f"--layerPrecisions={','.join(f'{name}:fp32' for name in names)}")
    if results := [name for name in names if ".in" not in name]:
        options.append(f"--layerOutputTypes={','.join(f'{name}:fp32' for name in results)}")

    def apply(b: Builder) -> None:
        b.config.set_flag(b.trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        for layer, gives_float32 in pinned_layers(b.trt, b.network):
            layer.precision = b.trt.float32
            for j in range(layer.num_outputs) if gives_float32 else ():
                if layer.get_output(j).dtype in (b.trt.float32, b.trt.float16):
                    layer.set_output_type(j, b.trt.float32)

    return Setting(tuple(options), apply)


def pinned_layers(trt: Any, network: Any) -> list[tuple[Any, bool]]:
    """The layers that compute what the graph has in float32, each with whether it gives float32 as well.

    The parser names a layer after its node, and where a node needs several, adds a number. Some helpers it leaves
    without a name: they belong to the node before or behind them, and count as float32 where either is, since that
    can only be more exact. What computes shapes or whole numbers is left alone.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    constant = (trt.LayerType.CONSTANT, trt.LayerType.SHAPE)  # the first are named after their weights
    named = [layer.type not in constant and not layer.name.startswith(_HELPERS) for layer in layers]
    own = [_FLOAT32.match(layer.name.encode()) for layer in layers]
    before, behind = _carried(own, named), _carried(own[::-1], named[::-1])[::-1]
    found = []
    for i, layer in enumerate(layers):
        wanted = own[i] if named[i] else before[i] or behind[i]
        if not wanted or layer.type in constant:
            continue
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        gives_float = any(output.dtype in (trt.float32, trt.float16) for output in outputs)
        if all(output.is_execution_tensor for output in outputs) and (named[i] or gives_float):
            found.append((layer, gives_float))
    return found


def _carried(own: Sequence[object], named: Sequence[bool]) -> list[object]:
    """For each place what the last named place up to it has."""
    found: list[object] = []
    for what, has_name in zip(own, named, strict=True):
        found.append(what if has_name else found[-1] if found else None)
    return found
