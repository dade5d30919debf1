"""`sdct-export inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .output import print_json, print_table, printable

if TYPE_CHECKING:
    from ..bundle.description import Bundle, TensorSpec
    from ..contract import Cache, Foreign, Quantization


@click.command(
    epilog="""\b
Examples:
  sdct-export inspect legal/
  sdct-export inspect legal/ --plot spectrum.png
  sdct-export inspect bundle/ --json"""
)
@click.argument("path", metavar="ADAPTER|BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the adapter's spectrum to this .png, .svg or .pdf file."
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def inspect(path: Path, plot: Path | None, as_json: bool) -> None:
    """Show what an adapter or an exported bundle holds.

    Energy is the squared norm of the weight change; its shares per band run from low to high frequencies.
    """
    from ..bundle.description import BUNDLE_FILE, Bundle

    if (path / BUNDLE_FILE).exists():
        bundle = Bundle.load(path)
        if plot:
            raise click.UsageError(f"--plot draws one adapter; give its folder, e.g. {path}/adapters/NAME")
        _show_bundle(bundle, as_json)
    else:
        _show_adapter(path, plot, as_json)


def _show_adapter(path: Path, plot: Path | None, as_json: bool) -> None:
    from ..adapter.adapter import SdctAdapter
    from ..adapter.summary import summarize

    adapter = SdctAdapter.load(path)
    modules = summarize(adapter)
    if plot:
        from ..adapter.plot import plot_spectrum
        from ..files import folder_name

        plot_spectrum(adapter, plot, title=printable(folder_name(path)))
    if as_json:
        print_json(
            {
                "adapter": str(path),
                "config": adapter.config.to_dict(),
                "n_parameters": adapter.n_parameters,
                "base_hash": adapter.base_hash,
                "modules": [dataclasses.asdict(m) for m in modules],
                "saved": {n: {"shape": list(a.shape), "dtype": str(a.dtype)} for n, a in adapter.saved.items()},
                "plot": str(plot) if plot else None,
            }
        )
        return
    for name, value in adapter.config.to_dict().items():
        text = ", ".join(value) if isinstance(value, list) else value
        click.echo(f"{name}: {'-' if text is None else printable(str(text))}")
    click.echo(f"base_hash: {printable(adapter.base_hash or '-')}")
    click.echo(f"parameters: {adapter.n_parameters}\n")
    print_table(
        ["module", "shape", "n", "energy", "share per band, %", "largest"],
        [
            (
                m.module,
                f"{m.shape[0]} x {m.shape[1]}" if m.shape else "-",
                m.n,
                f"{m.energy:.4g}",
                " / ".join(f"{100 * share:.0f}" for share in m.band_shares),
                f"{m.largest:.4g}",
            )
            for m in modules
        ],
        right=(2, 3, 4, 5),
    )
    if adapter.saved:
        click.echo()
        saved = [(name, " x ".join(map(str, a.shape)), a.dtype) for name, a in adapter.saved.items()]
        print_table(["saved in full", "shape", "dtype"], saved)
    if plot:
        click.echo(f"wrote {printable(str(plot))}")


def _cache(cache: Cache) -> str:
    windows = f", windows of {', '.join(map(str, cache.windows))} tokens" if cache.windows else ""
    return (
        f"{cache.layers} layers, {cache.kv_heads} heads of {cache.head_size} in {cache.dtype}{windows}, "
        f"target {cache.target}"
    )


def _signature(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} [{', '.join(map(str, s.shape))}]" for s in specs)


def _quantization(found: Quantization) -> str:
    return (
        f"{found.name} in {len(found.modules)} linear layers, block_size {found.block_size}, accuracy_level "
        f"{found.accuracy_level}; at export it moved the outputs by {found.change:.2%} of their size"
    )


def _foreign(found: Foreign) -> str:
    changed = f"; its numbers move the outputs by {found.change:.2%} of their size" if found.change else ""
    return f"{found.producer or 'another tool, which it does not name'}{changed}"


def _operator(bundle: Bundle) -> dict[str, object] | None:
    """How ONNX Runtime would run the adapters of `bundle` on this machine's CPU, None for a merged bundle."""
    from ..errors import UnsupportedError
    from ..native import operator_library, why_no_operator

    if not bundle.groups:
        return None
    try:
        path = operator_library()
    except UnsupportedError as error:  # what a run would refuse; the bundle can be described all the same
        return {"native": False, "detail": str(error)}
    if path is None:
        return {"native": False, "detail": f"the portable body in the file, the slower way: {why_no_operator()}"}
    return {"native": True, "detail": f"the native operator, {path}"}


def _show_bundle(bundle: Bundle, as_json: bool) -> None:
    from ..errors import AdapterFormatError, VerificationError

    states = {}
    for name in bundle.adapters:
        try:
            bundle.check_adapter(name)
            states[name] = "intact"
        except VerificationError:
            states[name] = "changed"
        except AdapterFormatError:
            states[name] = "missing"
    operator = _operator(bundle)
    if as_json:
        described = dataclasses.asdict(bundle) | {"path": str(bundle.path), "operator": operator}
        del described["module_digests"]
        for name, state in states.items():
            described["adapters"][name]["state"] = state
        print_json(described)
        return
    for name, value in (
        ("kind", bundle.kind),
        ("task", bundle.task),
        ("dtype", bundle.dtype),
        *([("quantization", _quantization(bundle.quantization))] if bundle.quantization else []),
        *([("graph made by", _foreign(bundle.foreign))] if bundle.foreign else []),
        ("base", f"{bundle.base_name} ({bundle.base_architecture})"),
        ("base hash", bundle.base_hash),
        ("model sha256", bundle.model_sha256),
        ("inputs", _signature(bundle.inputs)),
        ("outputs", _signature(bundle.outputs)),
        *([("pooling", ", ".join(bundle.pooling))] if bundle.pooling else []),
        *([("cache", _cache(bundle.cache))] if bundle.cache is not None else []),
    ):
        click.echo(f"{name}: {printable(value)}")
    if operator is not None:
        click.echo(f"adapters run through: {operator['detail']}")
    if bundle.groups:
        click.echo()
        rows = [(g.name, g.d_in, " ".join(map(str, g.d_out)), " ".join(map(str, g.capacity))) for g in bundle.groups]
        print_table(["group", "d_in", "d_out", "capacity"], rows, right=(1,))
    if bundle.heads:
        click.echo()
        print_table(["head", "d_out", "d_in"], [(h.module, h.d_out, h.d_in) for h in bundle.heads], right=(1, 2))
    if bundle.adapters:
        click.echo()
        rows_ = [
            (name, states[name], record.sha256, "-" if record.labels is None else record.labels)
            for name, record in bundle.adapters.items()
        ]
        print_table(["adapter", "state", "sha256", "labels"], rows_, right=(3,))
