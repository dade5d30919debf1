"""`sdct-export run`. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import print_json, print_table, printable

if TYPE_CHECKING:
    from ..adapter.entries import Array

_NO_HEAD = ("the base has no head of its own", "-")  # in place of a label and its probability
_MOST_COSINES = 8  # columns of the table; all are in --json


@click.command(
    epilog="""\b
Examples:
  sdct-export run bundle/ --text "It is hereby agreed" --adapter legal
  sdct-export run bundle/ --text one --text two --adapter legal --adapter none
  sdct-export run bundle/ --text "both" --adapter legal=0.5+medical=0.5 --json
  sdct-export run bundle/ --input pixel_values=images.npy --adapter digits --output out.npz"""
)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, help="One row of text; repeat it for a batch.")
@click.option("--text-pair", "pairs", multiple=True, help="The second text of a row, for models that read two.")
@click.option("--input", "inputs", metavar="NAME=FILE.npy", multiple=True, help="An input of the model as an array.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="NAME, none, or a blend such as a=0.5+b=0.5; once for all rows or once per row. [default: none]",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--output", metavar="FILE.npz", type=click.Path(path_type=Path), help="Write all outputs to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print all outputs as JSON on standard output.")
def run(
    bundle: Path,
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    inputs: tuple[str, ...],
    adapters: tuple[str, ...],
    device: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Run a bundle once: text through its own tokenizer, or arrays from files.

    Prints the most probable label of each row for classifiers, the cosines between the rows for sentence embeddings,
    else the shapes of the outputs.
    """
    if bool(texts) == bool(inputs):
        raise click.UsageError("give either --text or --input")
    if pairs and len(pairs) != len(texts):
        raise click.UsageError("give one --text-pair for each --text")
    rows = [_parse_adapters(item) for item in adapters]
    files = dict(_parse_input(item) for item in inputs)
    if len(files) < len(inputs):
        raise click.UsageError("give --input once for each name")
    from ..bundle.description import Bundle
    from ..errors import ConfigError
    from ..files import refuse_existing
    from ..runtime import MultiAdapterModel
    from ..runtime.request import cosines, encode_text, read_arrays, top_labels, write_arrays

    if output:
        refuse_existing(output)
    described = Bundle.load(bundle)
    if adapters and described.kind == "merged":
        raise ConfigError(f"{bundle} is merged: its adapter is part of the weights, so leave --adapter out")
    for name in {name for row in rows for name in row or {}} - set(described.adapters):
        known = ", ".join(sorted(described.adapters)) or "none"
        raise ConfigError(f"{bundle} has no adapter {name!r}; it has {known} (a blend is a=0.5+b=0.5)")
    model = MultiAdapterModel(described, device=device, max_batch=None)  # this process ends after one batch
    feeds = encode_text(model.bundle, texts, pairs or None) if texts else read_arrays(files)
    result = model.run(feeds, rows[0] if len(rows) == 1 else rows or None)
    if output:
        write_arrays(output, result)
    batch = len(next(iter(result.values())))
    chosen = rows * batch if len(rows) == 1 else rows or [None] * batch
    labels = top_labels(model.bundle, result, [list(row or {}) for row in chosen])
    embedded = cosines(result)
    names = ["merged" if model.bundle.kind == "merged" else _format_adapters(row) for row in chosen]
    if as_json:
        told: list[dict[str, object]] = [{"adapter": name} for name in names]
        for row, label in zip(told, labels or [], strict=labels is not None):
            row |= {"label": label and label.index, "name": label and label.name}
            row["probability"] = label and label.probability
        if embedded is not None:
            for row, norm, between in zip(told, *embedded, strict=True):
                row |= {"norm": float(norm), "cosines": between.tolist()}
        print_json({"rows": told, "outputs": {name: array.tolist() for name, array in result.items()}})
        return
    if labels is not None:
        rows_ = [
            (i, name, *(_NO_HEAD if label is None else (label.name or label.index, f"{label.probability:.4f}")))
            for i, (name, label) in enumerate(zip(names, labels, strict=True))
        ]
        print_table(["row", "adapter", "label", "probability"], rows_, right=(3,))
    elif embedded is not None:
        _print_cosines(names, *embedded)
    else:
        shapes = [(name, " x ".join(map(str, array.shape)), array.dtype) for name, array in result.items()]
        print_table(["output", "shape", "dtype"], shapes)
    if output:
        click.echo(f"wrote {printable(str(output))}")


def _print_cosines(names: Sequence[str], norms: Array, between: Array) -> None:
    shown = range(min(len(names), _MOST_COSINES))
    table = [(i, name, *(f"{x:.4f}" for x in (norms[i], *between[i, shown]))) for i, name in enumerate(names)]
    columns = ["row", "adapter", "norm", *(f"cosine to {j}" for j in shown)]
    print_table(columns, table, right=range(2, len(columns)))


def _parse_adapters(text: str) -> dict[str, float] | None:
    """`none`, `a`, or `a=0.5+b=0.5` as name -> scale, None for the base."""
    if text == "none":
        return None
    row: dict[str, float] = {}
    for part in text.split("+"):
        name, equals, scale = part.partition("=")
        try:
            value = float(scale) if equals else 1.0
        except ValueError:
            raise click.BadParameter(f"{scale!r} in {text!r} is no number", param_hint="--adapter") from None
        if not name or name in row:
            raise click.BadParameter(f"{text!r} needs a name once for each part", param_hint="--adapter")
        row[name] = value
    return row


def _format_adapters(row: dict[str, float] | None) -> str:
    if not row:
        return "none"
    return "+".join(name if scale == 1.0 else f"{name}={scale:g}" for name, scale in row.items())


def _parse_input(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals or not name or not file:
        raise click.BadParameter(f"{text!r} must be NAME=FILE.npy", param_hint="--input")
    return name, file
