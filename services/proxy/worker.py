"""The program of one worker, started by the parent of several (see `services.proxy.workers`).

Settings come by environment, secrets with them or in the files that it names: the command line
holds nothing but the number of an inherited socket, which worker this is, and where all workers'
metrics are.
"""

import os
import sys
from collections.abc import Sequence

from services.proxy.main import run
from services.proxy.settings import ProxySettings
from services.proxy.workers.tie import Tie
from shared.settings import load


def main(arguments: Sequence[str]) -> int:
    """Run a worker until it is told to end, or its parent is gone."""
    fd, slot, metrics_url = arguments
    settings = load(ProxySettings, os.environ)
    return run(settings, Tie(int(fd), int(slot), metrics_url))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
