"""`sdct-export verify`."""

from __future__ import annotations

from pathlib import Path

import click

from .output import BasePath, busy, importable_here, print_json, print_table


@click.command(
    epilog="""\b
Examples:
  sdct-export verify bundle/
  sdct-export verify bundle/ --model bert/ --json"""
)
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--model", metavar="BASE", type=BasePath(path_type=Path), help="Compare with torch on this base, too.")
@click.option("--model-class", metavar="MODULE:CLASS", help="Class of the base, where it is one of your own.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
@click.pass_context
def verify(
    context: click.Context, bundle: Path, model: Path | None, model_class: str | None, device: str, as_json: bool
) -> None:
    """Check that a bundle is intact and computes what torch computes.

    Per adapter, mixed in one batch, blended, and with no adapter. Exits 1 where anything differs.
    """
    import dataclasses

    from ..verify import verify as verify_bundle

    with busy("verifying"), importable_here(model_class):
        report = verify_bundle(bundle, model, model_class=model_class, device=device)
    if as_json:
        print_json(dataclasses.asdict(report) | {"ok": report.ok})
    else:
        rows = [
            (
                check.name,
                "ok" if check.ok else "FAILED",
                "-" if check.error is None else f"{check.error:.1e}",
                "-" if check.limit is None else f"{check.limit:.0e}",
                check.detail,
            )
            for check in report.checks
        ]
        print_table(["check", "result", "difference", "limit", "detail"], rows, right=(2, 3))
    failed = sum(not check.ok for check in report.checks)
    if failed:
        click.echo(f"error: {bundle}: {failed} of {len(report.checks)} checks failed", err=True)
        context.exit(1)
