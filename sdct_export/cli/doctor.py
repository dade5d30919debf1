"""`sdct-export doctor`."""

from __future__ import annotations

import click

from .output import print_json, print_table


@click.command(
    epilog="""\b
Example:
  sdct-export doctor --json"""
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on standard output.")
def doctor(as_json: bool) -> None:
    """Tell what is installed here, what works, and what to install for the rest.

    Exits 0 whatever it finds: most parts are optional.
    """
    import dataclasses

    from ..doctor import examine

    findings = examine()
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
        return
    rows = [(f.part, f.state, f.detail, f.advice) for f in findings]
    print_table(["part", "state", "found", "what to do"], rows)
