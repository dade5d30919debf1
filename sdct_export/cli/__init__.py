"""The command line. Commands parse and call the library; heavy imports happen inside the command that needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .bench import bench
from .build import build
from .combine import combine
from .distill import distill
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .output import BasePath, Main, busy, importable_here, print_json, printable
from .project import project
from .run import run
from .verify import verify

if TYPE_CHECKING:
    from ..bundle.description import Bundle

__all__ = ["main"]

_EPILOG = """\b
Examples:
  sdct-export --merge --model bert/ --adapter legal/ --output legal-onnx/
  sdct-export --model bert/ --adapter legal/ --adapter med=medical-v2/ --output bundle/
  sdct-export run bundle/ --text "It is hereby agreed" --adapter legal"""


@click.group(
    cls=Main,
    invoke_without_command=True,
    no_args_is_help=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--model", metavar="BASE", type=BasePath(path_type=Path), help="Checkpoint folder of the base model.")
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]ADAPTER",
    multiple=True,
    help="Adapter folder; repeat it for more. NAME defaults to the folder's name.",
)
@click.option(
    "--onnx",
    metavar="MODEL.onnx",
    type=click.Path(path_type=Path),
    help="Put the adapters on this graph, which another tool exported from BASE, in place of one made here.",
)
@click.option("--output", metavar="OUT", type=click.Path(path_type=Path), help="Folder to make; must not exist.")
@click.option("--merge", is_flag=True, help="Merge one adapter into the weights.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["onnx", "transformers", "tensorrt"]),
    default="onnx",
    show_default=True,
    help="What to write: ONNX, the same with a TensorRT engine in it, or (with --merge) a checkpoint.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the ONNX weights; bfloat16 runs on CUDA and TensorRT 10 only. [default: the base's, but float32 for "
    "a bfloat16 base unless --format tensorrt]",
)
@click.option(
    "--target",
    type=click.Choice(["ort", "tensorrt", "standard"]),
    help="Who computes the attention of a language model with a cache: an operator of ONNX Runtime's, an engine "
    "of TensorRT, or ONNX's own operators, which any runtime has. [default: ort where its operator takes the model]",
)
@click.option("--no-cache", is_flag=True, help="Leave the key-value cache out of a language model.")
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4"]),
    help="Quantize the base's linear layers for ONNX Runtime; adapters and heads stay in float. int8 is the safe one.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="Elements of a quantized weight that share a scale. [default: 32]",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["1", "4"]),
    help="What quantized weights are multiplied with: float32 (1, slow on a CPU), or 8 bits (4). [default: 4]",
)
@click.option(
    "--task",
    type=click.Choice(["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION", "IMAGE_CLS"]),
    help="What the model is for. [default: as trained]",
)
@click.option("--model-class", metavar="MODULE:CLASS", help="Class of the base, where it is one of your own.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
@click.version_option(__version__)
@click.pass_context
def main(
    context: click.Context,
    model: Path | None,
    adapters: tuple[str, ...],
    onnx: Path | None,
    output: Path | None,
    merge: bool,
    format_: str,
    dtype: str | None,
    target: str | None,
    no_cache: bool,
    quantize: str | None,
    block_size: str | None,
    accuracy_level: str | None,
    task: str | None,
    model_class: str | None,
    as_json: bool,
) -> None:
    """Take trained sDCT adapters to production.

    With --merge, write one static model with the adapter in its weights. Without, write one multi-adapter bundle whose
    adapters are chosen per request, per row of a batch.
    """
    if context.invoked_subcommand is not None:
        values = (model, adapters, onnx, output, merge, dtype, target, no_cache, quantize, block_size, accuracy_level)
        if any((*values, task, model_class, as_json)) or format_ != "onnx":
            raise click.UsageError(f"options of the export do not go before {context.invoked_subcommand!r}")
        return
    for value, name in ((model, "--model"), (adapters, "--adapter"), (output, "--output")):
        if not value:
            raise click.UsageError(f"missing option {name}")
    assert model is not None
    assert output is not None
    named = _named(adapters)
    if onnx is not None:
        own = {"--merge": merge, "--dtype": dtype, "--target": target, "--no-cache": no_cache, "--quantize": quantize}
        own |= {"--block-size": block_size, "--accuracy-level": accuracy_level, "--format": format_ != "onnx"}
        if given := [name for name, value in own.items() if value]:
            raise click.UsageError(f"{given[0]} does not go with --onnx, whose graph stays as it is")
    if merge and len(named) > 1:
        raise click.UsageError("--merge takes one --adapter; leave --merge out for a bundle of several")
    if format_ == "transformers" and not merge:
        raise click.UsageError("--format transformers needs --merge: a checkpoint holds one set of weights")
    if format_ == "transformers" and dtype:
        raise click.UsageError("--dtype is for ONNX; a merged checkpoint keeps the types of the base")
    if format_ == "transformers" and target:
        raise click.UsageError("--target is for ONNX: a checkpoint has no key-value cache")
    if format_ == "tensorrt" and target not in (None, "tensorrt"):
        raise click.UsageError("an engine's key-value cache is that of --target tensorrt")
    if quantize and format_ != "onnx":
        raise click.UsageError("--quantize is for ONNX Runtime; leave --format out")
    if (block_size or accuracy_level) and not quantize:
        raise click.UsageError("--block-size and --accuracy-level are for --quantize")
    from ..files import check_text, refuse_existing

    refuse_existing(output)
    if format_ != "transformers":
        check_text(output, "ONNX Runtime")
    if format_ == "tensorrt":
        dtype = _dtype_for_tensorrt(dtype)
    if format_ == "transformers":
        from ..weights.merging import merge_checkpoint

        with importable_here(model_class):
            merge_checkpoint(model, next(iter(named.values())), output, model_class=model_class)
        _report({"output": str(output), "format": "transformers", "bytes": _size(output)}, as_json)
        return
    if onnx is not None:
        from ..adoption import export_onnx

        with busy("exporting"), importable_here(model_class):
            bundle = export_onnx(onnx, model, named, output, task_type=task, model_class=model_class)
        _report(_summary(bundle, output, format_), as_json)
        return
    from ..export import export_merged, export_multi

    cache = False if no_cache or (format_ == "tensorrt" and target is None) else None
    options: dict[str, Any] = {
        "task_type": task,
        "model_class": model_class,
        "dtype": dtype,
        "cache": cache,
        "target": target,
        "quantize": quantize,
        "block_size": block_size and int(block_size),
        "accuracy_level": accuracy_level and int(accuracy_level),
    }
    with busy("exporting"), importable_here(model_class):
        if merge:
            bundle = export_merged(model, next(iter(named.values())), output, **options)
        else:
            bundle = export_multi(model, named, output, **options)
    if format_ == "tensorrt":
        from ..engine.build import build_engine

        with busy("building"):
            build_engine(bundle, report=lambda line: click.echo(printable(line), err=True))
    _report(_summary(bundle, output, format_), as_json)


def _summary(bundle: Bundle, output: Path, format_: str) -> dict[str, object]:
    return {
        "output": str(output),
        "format": format_,
        "kind": bundle.kind,
        "task": bundle.task,
        "dtype": bundle.dtype,
        "cache": bundle.cache and bundle.cache.target,
        "quantization": None if bundle.quantization is None else bundle.quantization.name,
        "producer": None if bundle.foreign is None else bundle.foreign.producer,
        "adapters": list(bundle.adapters),
        "bytes": _size(output),
    }


def _named(adapters: tuple[str, ...]) -> dict[str, Path]:
    """`[NAME=]PATH` items as name -> path."""
    from ..errors import ConfigError
    from ..files import check_adapter_name, folder_name

    named: dict[str, Path] = {}
    for item in adapters:
        name, equals, path = item.partition("=")
        if not equals or Path(item).is_dir():
            name, path = folder_name(item), item
            try:
                check_adapter_name(name)
            except ConfigError as error:
                raise ConfigError(f"{error}; choose a name with --adapter NAME={item}") from None
        check_adapter_name(name)
        if not path:
            raise click.BadParameter(f"{item!r} names no folder", param_hint="--adapter")
        if name in named:
            raise click.BadParameter(f"two adapters are called {name!r}; use NAME=FOLDER", param_hint="--adapter")
        named[name] = Path(path)
    return named


def _dtype_for_tensorrt(dtype: str | None) -> str | None:
    """The type to export; what TensorRT cannot do is refused before minutes of export, not after them."""
    from ..engine.build import check_dtype
    from ..engine.settings import is_strongly_typed
    from ..errors import UnsupportedError
    from ..plugin_choice import parse_version

    try:
        import tensorrt
    except ImportError:
        raise UnsupportedError(
            "--format tensorrt builds an engine, which needs the package tensorrt on the machine with the GPU: "
            "pip install 'sdct_export[tensorrt]' there, or export ONNX here and run `sdct-export build` there"
        ) from None
    version = parse_version(str(tensorrt.__version__))
    check_dtype(dtype, version)
    return dtype or ("base" if is_strongly_typed(version) else None)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _report(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    adapters = result.get("adapters")
    detail = f", adapters: {', '.join(map(str, adapters))}" if isinstance(adapters, list) and adapters else ""
    click.echo(f"wrote {printable(str(result['output']))} ({int(str(result['bytes'])) / 1e6:.1f} MB{detail})")


for _command in (project, distill, combine, inspect, verify, build, run, generate, bench, doctor):
    main.add_command(_command)
