"""`sdct-export build`. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .output import busy, print_json, printable


class RangeType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """`MIN:OPT:MAX`, or one number for all three."""

    name = "MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """The three numbers."""
        parts = str(value).split(":")
        if len(parts) not in (1, 3) or not all(part.isdecimal() and len(part) < 20 for part in parts):
            self.fail(f"{value!r} must be MIN:OPT:MAX or one number", param, ctx)
        numbers = [int(part) for part in parts]
        return (numbers[0], numbers[0], numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1], numbers[2])


@click.command(
    epilog="""\b
Examples:
  sdct-export build bundle/
  sdct-export build bundle/ --output llama.engine --batch 1:32:64 --sequence 1:512:4096 --timing-cache timings.bin"""
)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--output", metavar="FILE.engine", type=click.Path(path_type=Path), help="[default: model.engine in the bundle]"
)
@click.option("--batch", type=RangeType(), help="Rows of a request. [default: 1:8:32]")
@click.option(
    "--sequence",
    type=RangeType(),
    help="Tokens of a row; with a cache in one step of its prompt. [default: 1:128:512, at most what the base reads]",
)
@click.option("--slots", type=RangeType(), help="Adapters in the bank plus one. [default: 2:256:4096]")
@click.option("--blend", type=RangeType(), help="Adapters mixed in one row. [default: 1:1:4]")
@click.option(
    "--length",
    type=RangeType(),
    help="Tokens of a row in the cache, prompt and answer. [default: 1:1024:4096, at most what the base reads]",
)
@click.option("--timing-cache", metavar="FILE", type=click.Path(path_type=Path), help="Read, and written back.")
@click.option("--no-embed", is_flag=True, help="Keep the plugin library out of the engine.")
@click.option(
    "--no-in-place", is_flag=True, help="Let the plugin write beside its inputs, not over them (TensorRT 10.3 on)."
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def build(
    bundle: Path,
    output: Path | None,
    timing_cache: Path | None,
    no_embed: bool,
    no_in_place: bool,
    as_json: bool,
    **ranges: tuple[int, int, int] | None,
) -> None:
    """Build a TensorRT engine for the GPU of this machine, multi-adapter or merged.

    Prints the trtexec command that does the same, also where TensorRT is missing.
    """
    import dataclasses

    from ..bundle.description import Bundle
    from ..engine.build import ENGINE_FILE, build_engine, default_profile

    loaded = Bundle.load(bundle)
    given = {name: value for name, value in ranges.items() if value is not None}
    profile = dataclasses.replace(default_profile(loaded), **given)
    with busy("building"):
        manifest = build_engine(
            loaded,
            output,
            profile=profile,
            timing_cache=timing_cache,
            embed_plugin=not no_embed,
            in_place=not no_in_place,
            report=lambda line: click.echo(printable(line), err=as_json),
        )
    engine = output or bundle / ENGINE_FILE
    if as_json:
        print_json({"output": str(engine)} | dataclasses.asdict(manifest))
    else:
        click.echo(
            f"wrote {printable(str(engine))} ({engine.stat().st_size / 1e6:.1f} MB, TensorRT {manifest.tensorrt})"
        )
