"""A bundle as a TensorRT engine: the graph the parser reads, optimization profiles, the build, and its manifest.

onnx and tensorrt are imported by the functions that need them: reading a manifest needs neither, building no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import shlex
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import contract
from ..bundle.description import Bundle, file_sha256
from ..bundle.packing import bank_layout
from ..errors import AdapterFormatError, ConfigError, OutputError, SdctError, UnsupportedError
from ..files import new_file, read_json
from ..native import find_plugin
from ..plugin_choice import parse_version

ENGINE_FILE = "model.engine"  # default name inside a bundle
GRAPH_FILE = "model.tensorrt.onnx"  # the graph without function bodies, beside the weights it shares with model.onnx
OLD_GRAPH_FILE = "model.tensorrt8.onnx"  # the same in the opset TensorRT 8 and 9 read
MANIFEST_VERSION = 1
PLUGIN = "sdct_tensorrt"  # the plugin library, see `native.find_library`
PLUGIN_NONE, PLUGIN_LIBRARY, PLUGIN_EMBEDDED = "none", "library", "embedded"
_LARGEST_JSON = 16 << 20
_CACHE_LIMIT = 1 << 30

Range = tuple[int, int, int]  # smallest, most usual, largest
Progress = Callable[[str, int, int], None]  # phase, step, steps


@dataclasses.dataclass(frozen=True)
class Profile:
    """Sizes an engine accepts, each as (smallest, most usual, largest); the engine is tuned for the middle one.

    Args:
        batch: rows of a request.
        sequence: tokens of a row; text models only.
        slots: adapters in the bank plus one; costs no memory before they are used.
        blend: adapters mixed in one row.

    Raises:
        ConfigError: a range is not ascending or starts below 1.
    """

    batch: Range = (1, 8, 32)
    sequence: Range = (1, 128, 512)
    slots: Range = (2, 256, 4096)
    blend: Range = (1, 1, 4)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = tuple(getattr(self, field.name))
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
            if len(value) != 3 or not whole or not 1 <= value[0] <= value[1] <= value[2] < 2**31:
                raise ConfigError(
                    f"{field.name} must be three ascending positive numbers MIN:OPT:MAX, "
                    f"got {':'.join(map(str, value))}"
                )


@dataclasses.dataclass(frozen=True)
class EngineManifest:
    """What an engine file holds, from `<engine>.json` beside it.

    `model_sha256` is that of the bundle's `model.onnx`; `shapes` maps every input to its smallest, most usual and
    largest shape; `plugin` is `none`, `library` (load it first) or `embedded` (the engine carries it); `concurrent`
    says whether several execution contexts may share the profile.
    """

    model_sha256: str
    engine_sha256: str
    tensorrt: str
    plugin: str
    concurrent: bool
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    @property
    def max_slots(self) -> int:
        """Most slots the bank may have; 0 for a merged model."""
        banks = [shapes[2][0] for name, shapes in self.shapes.items() if name.startswith("sdct.")]
        return min(banks, default=0)

    @classmethod
    def load(cls, engine: Path) -> EngineManifest:
        """Read and check the manifest of `engine`. Raises `AdapterFormatError`."""
        file = manifest_path(engine)
        raw = read_json(file, _LARGEST_JSON, AdapterFormatError, "build the engine with `sdct-export build`")
        try:
            if raw.pop("format_version") != MANIFEST_VERSION:
                raise ValueError("another format_version")
            shapes = {
                str(name): (_shape(low), _shape(usual), _shape(high))
                for name, (low, usual, high) in raw.pop("shapes").items()
            }
            for name, (low, usual, high) in shapes.items():
                if not len(low) == len(usual) == len(high) or (name.startswith("sdct.") and not high):
                    raise ValueError(f"the shapes of {name!r} do not belong together")
            manifest = cls(**raw, shapes=shapes)
            texts = (manifest.model_sha256, manifest.engine_sha256, manifest.tensorrt, manifest.plugin)
            if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.concurrent, bool):
                raise ValueError("a field has another type")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterFormatError(f"{file} is damaged ({error}); build the engine again") from error
        return manifest

    def write(self, engine: Path) -> None:
        """Write the manifest beside `engine`."""
        with new_file(manifest_path(engine)) as work:
            raw = {"format_version": MANIFEST_VERSION} | dataclasses.asdict(self)
            work.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def manifest_path(engine: Path) -> Path:
    """Where the manifest of `engine` lies."""
    return engine.with_name(f"{engine.name}.json")


def build_engine(
    bundle: Bundle | str | Path,
    output: str | Path | None = None,
    *,
    profile: Profile | None = None,
    timing_cache: str | Path | None = None,
    embed_plugin: bool = True,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build a TensorRT engine for the GPU of this machine, in the bundle's own precision (TF32 off).

    Args:
        bundle: a multi-adapter or merged bundle.
        output: the engine file, default `model.engine` in the bundle; replaced where it exists. Its manifest is
            written beside it, the graph the parser reads beside the bundle's `model.onnx`.
        profile: sizes the engine accepts; default `Profile()`, with the sequence limited to what the base allows.
        timing_cache: file with kernel timings, read where it exists and written back; a second build is then quick.
        embed_plugin: let the engine carry the plugin library where TensorRT can (8.6 on), so that it runs alone.
        report: called with lines worth showing, among them the `trtexec` command that does the same.
        progress: called with phase, step and steps while TensorRT (8.6 on) builds.

    Raises:
        UnsupportedError: TensorRT, its plugin library or a GPU is missing, or the graph cannot be read.
        AdapterFormatError: the bundle is damaged. ConfigError: sizes that cannot work.
        OutputError: a file cannot be written. SdctError: TensorRT gave up; the message has its own words.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    engine = Path(output) if output is not None else bundle.path / ENGINE_FILE
    shapes = profile_shapes(bundle, profile or default_profile(bundle))
    trt = _tensorrt_or_none()
    graph = prepare_graph(bundle, old=trt is not None and _major(trt) < 10)
    library = find_plugin(None if trt is None else str(trt.__version__)) if bundle.groups else None
    cache = Path(timing_cache) if timing_cache is not None else None
    report(trtexec_command(bundle, graph, engine, shapes, library=library, timing_cache=cache, trt=trt))
    if trt is None:
        raise UnsupportedError(
            "the package tensorrt is not installed; pip install tensorrt on the machine with the GPU that will run "
            f"the engine, or run trtexec there on {graph}"
        )
    if bundle.groups and library is None:
        raise UnsupportedError(
            f"the plugin library {PLUGIN} is missing, which computes the adapters; build it against TensorRT's "
            "headers (see docs/tensorrt.md), or export with --merge"
        )
    log = Log(trt)
    if library is not None:
        load_plugin(trt, library)
    plan, cache_bytes, embedded = _build(trt, log, bundle, graph, shapes, library, cache, embed_plugin, progress)
    with new_file(engine) as work:
        try:
            work.write_bytes(plan)
        except OSError as error:
            raise OutputError(f"writing {engine} failed: {error.strerror or error}") from error
        sha256 = file_sha256(work)
    if cache is not None and cache_bytes is not None:
        with new_file(cache) as work:
            work.write_bytes(cache_bytes)
    plugin = PLUGIN_NONE if library is None else PLUGIN_EMBEDDED if embedded else PLUGIN_LIBRARY
    concurrent = _major(trt) >= 10 or hasattr(getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806")
    manifest = EngineManifest(bundle.model_sha256, sha256, str(trt.__version__), plugin, concurrent, shapes)
    manifest.write(engine)
    return manifest


# --- Profiles


def default_profile(bundle: Bundle) -> Profile:
    """`Profile()`, with the sequence limited to the longest the base model can read."""
    limit = bundle.max_tokens
    if limit is None:  # positions that are computed go on, but not further than it was trained for
        with contextlib.suppress(AdapterFormatError):  # config.json only refines
            config = read_json(bundle.path / "config.json", _LARGEST_JSON, AdapterFormatError, "export again")
            limit = config.get("max_position_embeddings")
    usual = Profile()
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return usual
    low, opt, high = usual.sequence
    return dataclasses.replace(usual, sequence=(low, min(opt, limit), min(high, limit)))


def profile_shapes(
    bundle: Bundle, profile: Profile
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Smallest, most usual and largest shape of every input of the graph.

    Raises:
        UnsupportedError: an input has a symbolic dimension a profile does not name.
    """
    ranges: dict[str, Range] = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    inputs: dict[str, tuple[int | str, ...]] = {spec.name: spec.shape for spec in bundle.inputs}
    if bundle.kind == "multi":
        batch = bundle.inputs[0].shape[0]
        inputs |= dict.fromkeys((contract.ADAPTER_IDS, contract.ADAPTER_SCALES), (batch, contract.BLEND))
        inputs |= {name: (contract.SLOTS, *shape) for name, (_, shape) in bank_layout(bundle).items()}
    shapes = {}
    for name, dims in inputs.items():
        for dim in dims:
            if isinstance(dim, str) and dim not in ranges:
                raise UnsupportedError(
                    f"input {name!r} has the symbolic dimension {dim!r}; only {', '.join(ranges)} have a profile"
                )
        low, opt, high = (tuple(d if isinstance(d, int) else ranges[d][i] for d in dims) for i in range(3))
        shapes[name] = (low, opt, high)
    return shapes


def trtexec_command(
    bundle: Bundle,
    graph: Path,
    engine: Path,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    *,
    library: Path | None = None,
    timing_cache: Path | None = None,
    trt: Any = None,
) -> str:
    """The `trtexec` command that builds the same engine (for TensorRT 10 on where `trt` is None)."""
    command = ["trtexec", f"--onnx={graph}", f"--saveEngine={engine}"]
    for i, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        dynamic = {name: three for name, three in shapes.items() if three[0] != three[2]}
        if dynamic:
            items = (f"{name}:{'x'.join(map(str, three[i]))}" for name, three in dynamic.items())
            command.append(f"--{option}={','.join(items)}")
    major = 10 if trt is None else _major(trt)
    if bundle.groups:
        command.append(f"--{'dynamicPlugins' if major >= 10 else 'plugins'}={library or 'libsdct_tensorrt.so'}")
    if major == 10:  # from 11 on every network is strongly typed
        command.append("--stronglyTyped")
    elif major < 10 and bundle.dtype == "float16":
        command.append("--fp16")
    command.append("--noTF32")
    if timing_cache is not None:
        command.append(f"--timingCacheFile={timing_cache}")
    return shlex.join(command)


# --- The graph the parser reads


def prepare_graph(bundle: Bundle, *, old: bool = False) -> Path:
    """Write the bundle's graph so that TensorRT's parser takes `SpectralDelta` from the plugin; returns the file.

    The parser prefers a function inside the file to a plugin, so the function bodies go and everything else stays.
    The file shares its weights with `model.onnx`; it is written anew each time onnx is at hand, else one written
    before is used.

    Args:
        bundle: the bundle.
        old: for TensorRT 8 and 9, which read ONNX up to opset 17 and no LayerNormalization or Gelu.

    Raises:
        UnsupportedError: onnx is missing, or the graph cannot be converted.
    """
    if bundle.kind == "merged" and not old:
        return bundle.model_path
    target = bundle.path / (OLD_GRAPH_FILE if old else GRAPH_FILE)
    try:
        import onnx

        from . import lower
    except ImportError:
        if target.is_file():
            return target
        raise UnsupportedError(
            f"preparing {bundle.model_path} for TensorRT needs the package onnx, or {target.name} in the bundle; pip "
            "install 'sdct_export[tensorrt]', or call sdct_export.engine.prepare_graph where onnx is installed"
        ) from None
    try:
        model = onnx.load(bundle.model_path, load_external_data=False)
    except OSError as error:
        raise AdapterFormatError(f"{bundle.model_path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf's errors share no public base class
        raise AdapterFormatError(f"{bundle.model_path} is no ONNX file ({error}); export the bundle again") from error
    model = lower.for_plugin(model)
    if old:
        model = lower.to_opset_17(model)
    with new_file(target) as work:
        onnx.save(model, work)
        try:
            onnx.checker.check_model(str(work))
        except onnx.checker.ValidationError as error:
            raise UnsupportedError(f"the graph prepared for TensorRT is not valid: {error}") from error
    return target


# --- TensorRT


def load_plugin(trt: Any, library: Path) -> None:
    """Load the plugin library, so that parser and runtime know `SpectralDelta`. Raises `UnsupportedError`."""
    try:
        loaded = ctypes.CDLL(str(library))
        built_for, known = loaded.sdct_tensorrt_version(), loaded.sdct_tensorrt_register()
    except (OSError, AttributeError) as error:
        raise UnsupportedError(f"{library} cannot be loaded ({error}); build it again for this machine") from error
    built, found = (built_for // 10000, built_for // 100 % 100), parse_version(str(trt.__version__))
    if built[0] != found[0] or built > found or not known:
        raise UnsupportedError(
            f"{library} was built for TensorRT {built[0]}.{built[1]}, this is "
            f"{trt.__version__}; build it against the headers of the TensorRT that runs"
        )


def _tensorrt_or_none() -> Any:
    try:
        import tensorrt
    except ImportError:
        return None
    return tensorrt


def _major(trt: Any) -> int:
    return int(str(trt.__version__).split(".")[0])


class Log:
    """What TensorRT reports: its last errors and warnings are kept for our own messages, nothing is printed."""

    def __init__(self, trt: Any) -> None:
        errors: deque[str] = deque(maxlen=3)
        warnings: deque[str] = deque(maxlen=3)
        severity = trt.ILogger.Severity
        kept = {severity.INTERNAL_ERROR: errors, severity.ERROR: errors, severity.WARNING: warnings}

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in kept:
                    kept[level].append(" ".join(message.split()))

        self._errors, self._warnings = errors, warnings
        self.logger = Logger()

    def reason(self) -> str:
        """The last errors, or warnings where there was no error, on one line."""
        return "; ".join(self._errors or self._warnings) or "no reason given"


def _build(
    trt: Any,
    log: Log,
    bundle: Bundle,
    graph: Path,
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    library: Path | None,
    cache: Path | None,
    embed_plugin: bool,
    progress: Progress | None,
) -> tuple[Any, Any, bool]:
    """The serialized engine, the serialized timing cache, and whether the engine carries the plugin."""
    try:
        builder = trt.Builder(log.logger)
    except TypeError:  # how the bindings report a null pointer
        builder = None
    if builder is None:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} found no GPU it can use ({log.reason()}); engines are built on the GPU that "
            "runs them: check the driver with nvidia-smi"
        )
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flag = typed if typed is not None and _major(trt) >= 10 else trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(" ".join(error.desc().split()) for error in errors[:3]) or log.reason()
        raise UnsupportedError(f"TensorRT {trt.__version__} cannot read {graph}: {reasons}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # it would round float32 products to 10 bits
    if typed is None and bundle.dtype == "float16":
        config.set_flag(trt.BuilderFlag.FP16)
    features = {"ALIASED_PLUGIN_IO_10_03": library is not None, "PROFILE_SHARING_0806": _major(trt) < 10}
    for feature, wanted in features.items():
        if wanted and hasattr(getattr(trt, "PreviewFeature", None), feature):
            config.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
    optimization = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        if name not in shapes:
            raise AdapterFormatError(f"{graph}: input {name!r} is not in the bundle's description; export it again")
        optimization.set_shape(name, *shapes[name])
    config.add_optimization_profile(optimization)
    embedded = library is not None and embed_plugin and hasattr(config, "plugins_to_serialize")
    if embedded:
        config.plugins_to_serialize = [str(library)]
    timings = None
    if cache is not None:
        timings = config.create_timing_cache(_read_cache(cache))
        config.set_timing_cache(timings, ignore_mismatch=False)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SdctError(f"TensorRT {trt.__version__} could not build the engine: {log.reason()}")
    return plan, timings.serialize() if timings is not None else None, embedded


def _read_cache(cache: Path) -> bytes:
    try:
        if cache.stat().st_size > _CACHE_LIMIT:
            raise ConfigError(f"{cache} is larger than {_CACHE_LIMIT} bytes; this is no timing cache")
        return cache.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"timing cache {cache} cannot be read: {error.strerror or error}") from error


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self._steps.get(phase_name, 0))
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            progress(phase_name, steps, steps)

    return Monitor()


def _shape(raw: object) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(isinstance(d, int) and not isinstance(d, bool) for d in raw):
        raise TypeError(f"{raw!r} is no shape")
    return tuple(raw)
