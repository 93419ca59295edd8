"""Entry point of `redmesh`. Imports as little as possible.

A container that runs one service installs only that service's extra: no click, no rich. So the
service commands are found before anything else is imported, and the operator's commands are
loaded only when one of them is asked for.
"""

import sys
from collections.abc import Sequence

from services.cli import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 fine, 1 failure or drift, 2 bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in launch.SERVICES:
        return launch.serve(arguments[0], arguments[1:])
    try:
        from services.cli import app  # noqa: PLC0415 - needs the `cli` extra, which services lack
    except ModuleNotFoundError as error:
        print(
            f"redmesh: the operator's commands need the package {error.name!r}: "
            "install redmesh[cli]",
            file=sys.stderr,
        )
        return 1
    return app.run(arguments)
