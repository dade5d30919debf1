"""`sdct-export combine`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from .output import importable_here, print_json, print_table, printable


@click.command(
    epilog="""\b
Examples:
  sdct-export combine legal/=0.5 medical/=0.5 --output both/
  sdct-export combine site1/=0.7 site2/=0.3 --n-coefficients 700 --model bert/ --output round2/"""
)
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.option("--output", metavar="ADAPTER", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--n-coefficients", type=click.IntRange(1), help="Most coefficients per matrix. [default: all, which is exact]"
)
@click.option(
    "--model",
    metavar="BASE",
    type=click.Path(path_type=Path),
    help="Base checkpoint folder, to compare the adapters with and to record what the combination computes.",
)
@click.option("--model-class", metavar="MODULE:CLASS", help="Class of the base, where it is one of your own.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def combine(
    adapters: tuple[str, ...],
    output: Path,
    n_coefficients: int | None,
    model: Path | None,
    model_class: str | None,
    as_json: bool,
) -> None:
    """Make one adapter from several of the same base: the weighted sum of their weight changes.

    WEIGHT is 1 where it is left out. Heads are averaged, with the weights over their sum.
    """
    if model_class is not None and model is None:
        raise click.UsageError("--model-class is the class of the base; give the base with --model")
    from ..files import refuse_existing
    from ..tuning.combination import combine as combine_adapters

    refuse_existing(output)
    folders, weights = zip(*map(_weighted, adapters), strict=True)
    with importable_here(model_class):
        adapter, report = combine_adapters(
            folders, weights, n_coefficients=n_coefficients, base=model, model_class=model_class
        )
    adapter.save(output)
    recorded = adapter.trained_on is not None and adapter.trained_on.probe is not None
    if as_json:
        import dataclasses

        print_json(
            {"output": str(output), "adapters": [*folders], "n_parameters": adapter.n_parameters, "probe": recorded}
            | dataclasses.asdict(report)
        )
        return
    rows = [
        (path, m.n_exact, m.n, f"{m.energy:.4g}", f"{m.retained_energy:.1%}") for path, m in report.modules.items()
    ]
    print_table(["module", "n exact", "n kept", "energy", "energy kept"], rows, right=(1, 2, 3, 4))
    if report.saved_weights is not None:
        shares = ", ".join(f"{weight:.4g}" for weight in report.saved_weights)
        click.echo(printable(f"averaged with weights {shares}: {', '.join(report.saved)}"))
    click.echo(
        f"wrote {printable(str(output))}: {adapter.n_parameters} parameters, energy {report.energy:.4g}, "
        f"kept {report.retained_energy:.1%}" + ("" if recorded else "; no probe recorded (--model BASE records one)")
    )


def _weighted(item: str) -> tuple[str, float]:
    """`ADAPTER[=WEIGHT]`, or with a colon, as folder and weight. A folder of the whole name comes first."""
    if not Path(item).is_dir():
        for sign in "=:":
            folder, found, weight = item.rpartition(sign)
            with contextlib.suppress(ValueError):
                if found and folder:
                    return folder, float(weight)
    return item, 1.0
