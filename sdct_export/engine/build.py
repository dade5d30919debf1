"""A bundle as a TensorRT engine: the graph the parser reads, optimization profiles, the build, and its manifest.

onnx and tensorrt are imported by the functions that need them: reading a manifest needs neither, building no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
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
from . import settings

ENGINE_FILE = "model.engine"  # default name inside a bundle
GRAPH_FILE = "model.tensorrt.onnx"  # the graph without function bodies, beside the weights it shares with model.onnx
OLD_GRAPH_FILE = "model.tensorrt8.6.onnx"  # the same in the opset TensorRT 8 and 9 read
OLDEST_GRAPH_FILE = "model.tensorrt8.onnx"  # and without LayerNormalization, which 8.5 does not know
SCATTER_GRAPH_FILE = "model.tensorrt10.15.onnx"  # with a cache that is written in place
MANIFEST_VERSION = 1
PLUGIN = "sdct_tensorrt"  # the plugin library, see `native.find_library`
PLUGIN_NONE, PLUGIN_LIBRARY, PLUGIN_EMBEDDED = "none", "library", "embedded"
_LARGEST_JSON = 16 << 20
_CACHE_LIMIT = 1 << 30

Range = tuple[int, int, int]  # smallest, most usual, largest
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # of each input, likewise
Progress = Callable[[str, int, int], None]  # phase, step, steps


@dataclasses.dataclass(frozen=True)
class Profile:
    """Sizes an engine accepts, each as (smallest, most usual, largest); the engine is tuned for the middle one.

    Args:
        batch: rows of a request.
        sequence: tokens of a row; text models only.
        slots: adapters in the bank plus one; costs no memory before they are used.
        blend: adapters mixed in one row.
        length: columns of the key-value cache, so many tokens may a row have in all; language models with a cache
            only, of which `sequence` is then how many are read in one step of the prompt.

    Raises:
        ConfigError: a range is not ascending or starts below 1.
    """

    batch: Range = (1, 8, 32)
    sequence: Range = (1, 128, 512)
    slots: Range = (2, 256, 4096)
    blend: Range = (1, 1, 4)
    length: Range = (1, 1024, 4096)

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
    says whether several execution contexts may share the profile. Of an engine with a key-value cache `shapes` are
    those of prefill, `decode` those of a second profile for one token a row (empty where the first is for both), and
    `in_place` says that its presents lie in the memory of its pasts.
    """

    model_sha256: str
    engine_sha256: str
    tensorrt: str
    plugin: str
    concurrent: bool
    shapes: Shapes
    decode: Shapes = dataclasses.field(default_factory=dict)
    in_place: bool = False

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
            shapes, decode = _shapes(raw.pop("shapes")), _shapes(raw.pop("decode", {}))
            ranks = {name: len(low) for name, (low, _, _) in shapes.items()}
            if decode and ranks != {name: len(low) for name, (low, _, _) in decode.items()}:
                raise ValueError("the shapes of both profiles do not belong together")
            manifest = cls(**raw, shapes=shapes, decode=decode)
            texts = (manifest.model_sha256, manifest.engine_sha256, manifest.tensorrt, manifest.plugin)
            flags = (manifest.concurrent, manifest.in_place)
            if not all(isinstance(text, str) for text in texts) or not all(isinstance(flag, bool) for flag in flags):
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
    in_place: bool = True,
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
        in_place: let the plugin update its y in place (TensorRT 10.3 on), which is a preview feature of TensorRT.
        report: called with lines worth showing, among them the `trtexec` command that does the same.
        progress: called with phase, step and steps while TensorRT (9 on) builds.

    Raises:
        UnsupportedError: TensorRT, its plugin library or a GPU is missing, or the graph cannot be read.
        AdapterFormatError: the bundle is damaged. ConfigError: sizes that cannot work.
        OutputError: a file cannot be written. SdctError: TensorRT gave up; the message has its own words.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    engine = Path(output) if output is not None else bundle.path / ENGINE_FILE
    trt = _tensorrt_or_none()
    version = settings.NEWEST if trt is None else parse_version(str(trt.__version__))
    profiles = engine_profiles(bundle, profile or default_profile(bundle), version)
    graph = prepare_graph(bundle, version=version)
    library = find_plugin(None if trt is None else str(trt.__version__)) if bundle.groups else None
    cache = Path(timing_cache) if timing_cache is not None else None
    told = settings.builder_settings(
        version,
        bundle.dtype,
        graph,
        profiles,
        library=(library or Path(f"lib{PLUGIN}.so")) if bundle.groups else None,
        embed=embed_plugin,
        in_place=in_place,
    )
    report(settings.command(version, graph, engine, told, cache))
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
    plan, cache_bytes = _build(trt, log, version, graph, profiles[0], told, cache, progress)
    with new_file(engine) as work:
        try:
            work.write_bytes(plan)
        except OSError as error:
            raise OutputError(f"writing {engine} failed: {error.strerror or error}") from error
        sha256 = file_sha256(work)
    if cache is not None and cache_bytes is not None:
        with new_file(cache) as work:
            work.write_bytes(cache_bytes)
    embedded = embed_plugin and settings.carries_plugins(version)
    plugin = PLUGIN_NONE if library is None else PLUGIN_EMBEDDED if embedded else PLUGIN_LIBRARY
    concurrent = settings.shares_profiles(version)
    manifest = EngineManifest(
        bundle.model_sha256,
        sha256,
        str(trt.__version__),
        plugin,
        concurrent,
        profiles[0],
        profiles[1] if len(profiles) > 1 else {},
        bundle.cache is not None and settings.writes_cache_in_place(version),
    )
    manifest.write(engine)
    return manifest


# --- Profiles


def default_profile(bundle: Bundle) -> Profile:
    """`Profile()`, with sequence and length limited to the longest the base model can read."""
    limit = bundle.max_tokens
    if limit is None:  # positions that are computed go on, but not further than it was trained for
        with contextlib.suppress(AdapterFormatError):  # config.json only refines
            config = read_json(bundle.path / "config.json", _LARGEST_JSON, AdapterFormatError, "export again")
            limit = config.get("max_position_embeddings")
    usual = Profile()
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        return usual
    ranges = {
        name: (low, min(opt, limit), min(high, limit))
        for name, (low, opt, high) in (("sequence", usual.sequence), ("length", usual.length))
    }
    return dataclasses.replace(usual, **ranges)


def engine_profiles(bundle: Bundle, profile: Profile, version: settings.Version) -> list[Shapes]:
    """Shapes of every input, for each optimization profile.

    One, but with a key-value cache two: of prefill, and of decode with one token a row. Before TensorRT 9, whose
    `trtexec` knows one profile, that is for both and is tuned for one token.

    Raises:
        ConfigError: a step of the prompt is longer than the cache. UnsupportedError: as `profile_shapes`.
    """
    if bundle.cache is None:
        return [profile_shapes(bundle, profile)]
    if profile.sequence[2] > profile.length[2]:
        raise ConfigError(
            f"a step of {profile.sequence[2]} tokens (--sequence) does not fit into a cache of "
            f"{profile.length[2]} (--length); make --sequence smaller"
        )
    decode = dataclasses.replace(profile, sequence=(1, 1, 1))
    if not settings.has_profiles(version):
        return [profile_shapes(bundle, dataclasses.replace(profile, sequence=(1, 1, profile.sequence[2])))]
    return [profile_shapes(bundle, profile), profile_shapes(bundle, decode)]


def profile_shapes(bundle: Bundle, profile: Profile) -> Shapes:
    """Smallest, most usual and largest shape of every input of the graph.

    Raises:
        UnsupportedError: an input has a symbolic dimension a profile does not name.
    """
    ranges: dict[str, Range] = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
    inputs: dict[str, tuple[int | str, ...]] = {spec.name: spec.shape for spec in bundle.inputs}
    if (cache := bundle.cache) is not None:  # see `lower.keep_in_buffers`
        inputs = dict.fromkeys((contract.INPUT_IDS, contract.POSITION_IDS), inputs[contract.INPUT_IDS])
        inputs[contract.KEPT] = (contract.BATCH, 1)
        inputs |= dict.fromkeys(cache.pasts, (contract.BATCH, cache.kv_heads, "length", cache.head_size))
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


# --- The graph the parser reads


def check_dtype(dtype: str | None, version: settings.Version) -> None:
    """Raise `UnsupportedError` where TensorRT `version` builds no engine of `dtype` weights.

    bfloat16 needs a strongly typed network, which is built from TensorRT 10 on; older builders choose types by layer.
    """
    if dtype == "bfloat16" and not settings.is_strongly_typed(version):
        raise UnsupportedError(
            f"TensorRT {version[0]}.{version[1]} is too old for bfloat16 bundles; install TensorRT 10 or newer, or "
            "export with --dtype float16 or float32"
        )


def prepare_graph(bundle: Bundle, *, version: tuple[int, int] = settings.NEWEST) -> Path:
    """Write the bundle's graph so that TensorRT's parser takes `SpectralDelta` from the plugin; returns the file.

    The parser prefers a function inside the file to a plugin, so the function bodies go and everything else stays.
    The file shares its weights with `model.onnx`; it is written anew each time onnx is at hand, else one written
    before is used.

    Args:
        bundle: the bundle.
        version: of the TensorRT that will read it. 8 and 9 read ONNX up to opset 17 and no Gelu, 8.5 no
            LayerNormalization; for a float16 bundle their graph says which nodes are float32. From 10.15 on a
            key-value cache is written in place.

    Raises:
        UnsupportedError: onnx is missing, the graph cannot be converted, the bundle is quantized or has a key-value
            cache of another target, or TensorRT is too old for bfloat16.
    """
    if bundle.quantization is not None:
        raise UnsupportedError(
            f"{bundle.path} is quantized for ONNX Runtime, whose operator MatMulNBits TensorRT does not have; export "
            "without --quantize, in float16 for its speed"
        )
    if bundle.cache is not None and bundle.cache.target != "tensorrt":
        raise UnsupportedError(
            f"{bundle.path} has a key-value cache for target {bundle.cache.target!r}; export it for an engine, with "
            "--target tensorrt, or --no-cache for one without a cache"
        )
    old = version < (10, 0)
    check_dtype(bundle.dtype, version)
    if bundle.kind == "merged" and not old and bundle.cache is None:
        return bundle.model_path
    oldest = version < settings.LAYER_NORMALIZATION
    in_place = bundle.cache is not None and settings.writes_cache_in_place(version)
    newer = SCATTER_GRAPH_FILE if in_place else GRAPH_FILE
    target = bundle.path / (OLDEST_GRAPH_FILE if oldest else OLD_GRAPH_FILE if old else newer)
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
    if bundle.cache is not None:
        model = lower.keep_in_buffers(model, bundle.cache, in_place=in_place)
    if old:
        mixed = settings.is_mixed(version, bundle.dtype)
        model = lower.to_opset_17(model, layer_normalization=not oldest, mixed=mixed)
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
    version: settings.Version,
    graph: Path,
    shapes: Shapes,
    told: Sequence[settings.Setting],
    cache: Path | None,
    progress: Progress | None,
) -> tuple[Any, Any]:
    """The serialized engine and the serialized timing cache."""
    try:
        builder = trt.Builder(log.logger)
    except TypeError:  # how the bindings report a null pointer
        builder = None
    if builder is None:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} found no GPU it can use ({log.reason()}); engines are built on the GPU that "
            "runs them: check the driver with nvidia-smi"
        )
    network = builder.create_network(settings.network_flags(trt, version))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reasons = "; ".join(" ".join(error.desc().split()) for error in errors[:3]) or log.reason()
        raise UnsupportedError(f"TensorRT {trt.__version__} cannot read {graph}: {reasons}")
    config = builder.create_builder_config()
    for name in (network.get_input(i).name for i in range(network.num_inputs)):
        if name not in shapes:
            raise AdapterFormatError(f"{graph}: input {name!r} is not in the bundle's description; export it again")
    for setting in told:
        setting.apply(settings.Builder(trt, builder, config, network))
    timings = None
    if cache is not None:
        timings = config.create_timing_cache(_read_cache(cache))
        config.set_timing_cache(timings, ignore_mismatch=False)
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SdctError(f"TensorRT {trt.__version__} could not build the engine: {log.reason()}")
    return plan, timings.serialize() if timings is not None else None


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


def _shapes(raw: Mapping[str, Any]) -> Shapes:
    shapes = {str(name): (_shape(low), _shape(usual), _shape(high)) for name, (low, usual, high) in raw.items()}
    for name, (low, usual, high) in shapes.items():
        if not len(low) == len(usual) == len(high) or (name.startswith("sdct.") and not high):
            raise ValueError(f"the shapes of {name!r} do not belong together")
    return shapes


def _shape(raw: object) -> tuple[int, ...]:
    if not isinstance(raw, list) or not all(isinstance(d, int) and not isinstance(d, bool) for d in raw):
        raise TypeError(f"{raw!r} is no shape")
    return tuple(raw)
