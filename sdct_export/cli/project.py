"""`sdct-export project`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import BasePath, print_json, print_table, printable


@click.command(
    epilog="""\b
Examples:
  sdct-export project --model bert/ --lora lora/ --output adapter/
  sdct-export project --model bert/ --tuned tuned/ --save classifier --total 20000 --output adapter/"""
)
@click.option("--model", metavar="BASE", required=True, type=BasePath(path_type=Path), help="Base checkpoint folder.")
@click.option("--lora", type=click.Path(path_type=Path), help="PEFT adapter folder: LoRA, or any kind that merges.")
@click.option("--tuned", type=click.Path(path_type=Path), help="Tuned checkpoint of the same architecture.")
@click.option("--output", metavar="ADAPTER", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--n", default=700, show_default=True, type=click.IntRange(1), help="Coefficients per matrix.")
@click.option("--total", type=click.IntRange(1), help="Coefficients in all, spread over the matrices by energy.")
@click.option(
    "--target", "targets", multiple=True, help="Module to project; repeat it for more. [default: all that changed]"
)
@click.option(
    "--save", "saved", multiple=True, help="Module of --tuned to store in full, such as its head; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def project(
    model: Path,
    lora: Path | None,
    tuned: Path | None,
    output: Path,
    n: int,
    total: int | None,
    targets: tuple[str, ...],
    saved: tuple[str, ...],
    as_json: bool,
) -> None:
    """Turn a LoRA or a tuned checkpoint into an sDCT adapter.

    Keeps the largest coefficients of each weight change and reports how much of it they hold; a warning says where
    that is too little to do what the change did.
    """
    if (lora is None) == (tuned is None):
        raise click.UsageError("give either --lora or --tuned")
    from ..files import refuse_existing
    from ..weights.projection import project as project_change

    refuse_existing(output)
    adapter, report = project_change(
        model,
        lora=lora,
        tuned=tuned,
        n_coefficients=n,
        total=total,
        target_modules=targets or None,
        modules_to_save=saved or None,
    )
    adapter.save(output)
    if as_json:
        import dataclasses

        figures = dataclasses.asdict(report) | {"enough": report.enough}
        print_json({"output": str(output), "n_parameters": adapter.n_parameters} | figures)
        return
    worst = report.worst
    rows = [
        (name, f"{m.shape[0]} x {m.shape[1]}", m.n, f"{m.retained_energy:.1%}", f"{m.relative_error:.3f}")
        for name, m in report.modules.items()
    ]
    print_table(["module", "shape", "n", "energy kept", "relative error"], rows, right=(2, 3, 4))
    for title, names in (("saved in full", report.saved), ("not carried over", report.ignored)):
        if names:
            click.echo(printable(f"{title}: {', '.join(names)}"))
    click.echo(
        f"wrote {printable(str(output))}: {adapter.n_parameters} parameters, energy kept {report.retained_energy:.1%}"
        + (f" (least: {printable(worst)}, {report.modules[worst].retained_energy:.1%})" if worst else "")
        + f", relative error {report.relative_error:.3f}"
    )
