"""`sdct-export bench`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import BasePath, importable_here, print_json, print_table


@click.command(
    epilog="""\b
Examples:
  sdct-export bench bundle/ --quality --model bert/ --texts mine.txt
  sdct-export bench bundle/ --quality --model bert/ --texts mine.txt --adapter legal --json"""
)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--quality", is_flag=True, help="What quantizing changed, against the float model; needs torch.")
@click.option("--model", metavar="BASE", type=BasePath(path_type=Path), help="The base the bundle was exported from.")
@click.option("--texts", type=click.Path(path_type=Path), help="UTF-8 file of texts without labels, one a line.")
@click.option("--adapter", "adapters", metavar="NAME", multiple=True, help="One of the bundle's. [default: all]")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(2), help="Where longer texts are cut."
)
@click.option("--model-class", metavar="MODULE:CLASS", help="Class of the base, where it is one of your own.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def bench(
    bundle: Path,
    quality: bool,
    model: Path | None,
    texts: Path | None,
    adapters: tuple[str, ...],
    max_tokens: int,
    model_class: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Measure a bundle on texts of yours.

    With --quality: a quantized bundle (quantized base, exact adapter) and the same adapter merged and then quantized,
    both against the float model with that adapter. Error is the root of the mean squared difference of the outputs
    over their standard deviation.
    """
    if not quality:
        raise click.UsageError("say what to measure: --quality")
    for value, name in ((model, "--model"), (texts, "--texts")):
        if value is None:
            raise click.UsageError(f"missing option {name}")
    assert model is not None
    assert texts is not None
    import dataclasses

    from ..quality import quality as compare

    with importable_here(model_class):
        report = compare(
            bundle,
            model,
            texts,
            adapters=adapters or None,
            max_tokens=max_tokens,
            model_class=model_class,
            device=device,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    rows = [
        (
            row.adapter,
            row.method,
            f"{row.error:.2%}",
            f"{row.largest:.2g}",
            "-" if row.agreement is None else f"{row.agreement:.2%}",
            "-" if row.perplexity is None else f"{row.perplexity:.4g} ({row.float_perplexity:.4g})",
        )
        for row in report.rows
    ]
    columns = ["adapter", f"{report.quantization} model", "error", "largest", "same answer", "perplexity (float)"]
    print_table(columns, rows, right=(2, 3, 4, 5))
