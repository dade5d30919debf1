"""The command `sdct-export` and `python -m sdct_export`: signals are handled before anything large is imported."""

from __future__ import annotations

import sys

from . import signals


def main() -> None:
    """Run the command line and exit."""
    signals.install()
    try:
        from .cli import main as command

        command(prog_name="sdct-export")
    except signals.Interrupted as stop:  # while importing
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(128 + stop.number)
    except MemoryError:
        print("error: not enough memory to start", file=sys.stderr)
        sys.exit(1)
    finally:
        signals.leave()


if __name__ == "__main__":
    main()
