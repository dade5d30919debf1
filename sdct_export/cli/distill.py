"""`sdct-export distill`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import importable_here, print_json, printable


@click.command(
    epilog="""\b
Examples:
  sdct-export distill --model bert/ --lora lora/ --texts mine.txt --output adapter/
  sdct-export distill --model bert/ --lora lora/ --texts mine.txt --epochs 5 --output adapter/"""
)
@click.option(
    "--model", metavar="BASE", required=True, type=click.Path(path_type=Path), help="Base checkpoint folder."
)
@click.option("--lora", required=True, type=click.Path(path_type=Path), help="PEFT adapter folder to learn from.")
@click.option(
    "--texts", required=True, type=click.Path(path_type=Path), help="UTF-8 file of texts without labels, one a line."
)
@click.option("--output", metavar="ADAPTER", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option(
    "--n-coefficients", default=700, show_default=True, type=click.IntRange(1), help="Coefficients per matrix."
)
@click.option("--epochs", default=2, show_default=True, type=click.IntRange(1), help="Passes over the texts.")
@click.option(
    "--learning-rate", default=2e-2, show_default=True, type=float, help="Of the coefficients; heads get a tenth."
)
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Where longer texts are cut."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order of the texts.")
@click.option(
    "--task",
    type=click.Choice(["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "FEATURE_EXTRACTION"]),
    help="What the model is for. [default: the LoRA's]",
)
@click.option("--model-class", metavar="MODULE:CLASS", help="Class of the base, where it is one of your own.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def distill(
    model: Path,
    lora: Path,
    texts: Path,
    output: Path,
    n_coefficients: int,
    epochs: int,
    learning_rate: float,
    max_tokens: int,
    seed: int,
    task: str | None,
    model_class: str | None,
    as_json: bool,
) -> None:
    """Train a small sDCT adapter to do what a LoRA does, on texts of yours without labels.

    Texts that are held back tell how near it comes to the LoRA model, beside what `project` would give.
    """
    from ..files import refuse_existing
    from ..tuning.distillation import distill as train

    refuse_existing(output)
    with importable_here(model_class):
        adapter, report = train(
            model,
            lora,
            texts,
            n_coefficients=n_coefficients,
            epochs=epochs,
            learning_rate=learning_rate,
            max_tokens=max_tokens,
            seed=seed,
            task_type=task,
            model_class=model_class,
        )
    adapter.save(output)
    if as_json:
        import dataclasses

        print_json({"output": str(output), "n_parameters": adapter.n_parameters} | dataclasses.asdict(report))
        return
    for title, distance in (("projected", report.projected), ("before training", report.start)):
        click.echo(f"{title}: {_distance(report.measure, distance.error, distance.agreement)}")
    if report.ignored:
        click.echo(printable(f"not carried over: {', '.join(report.ignored)}"))
    click.echo(
        f"wrote {printable(str(output))}: {adapter.n_parameters} parameters, distance from the LoRA model on "
        f"{report.held_back} texts held back: "
        + _distance(report.measure, report.distilled.error, report.distilled.agreement)
    )


def _distance(measure: str, error: float, agreement: float | None) -> str:
    return f"{measure} {error:.4g}" + ("" if agreement is None else f", same answer {agreement:.1%}")
