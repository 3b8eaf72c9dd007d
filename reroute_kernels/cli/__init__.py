"""The command line: `reroute-kernels` or `python -m reroute_kernels`."""

from __future__ import annotations

import sys

from ..versions import install_command


def main() -> None:
    """Entry point of the console script."""
    try:
        from .commands import app
    except ModuleNotFoundError as error:
        if sys.argv[1:2] == ["env"]:  # it tells which packages are missing, so it needs none of them
            from .environment import main as show_environment

            sys.exit(show_environment(sys.argv[2:]))
        print(
            f"reroute-kernels: the command line, but for `env`, needs {error.name}: {install_command(error)}",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="reroute-kernels")
