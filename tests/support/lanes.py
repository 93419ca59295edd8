"""Which tests share a worker of pytest-xdist: those of one file, and those on one real vLLM.

A mesh that tests share is started once by each worker that runs one of them. Most such meshes
belong to a file, so files stay whole (`--dist loadfile`). The end-to-end tests share theirs between
files, since its engines load for a minute each.
"""

from typing import Final

from xdist.scheduler import LoadFileScheduling  # pyright: ignore[reportMissingTypeStubs] - it has none

WHOLE: Final = "tests/e2e/"
"""All below this folder runs on one worker."""


class Lanes(LoadFileScheduling):
    """Scheduling by file, but for `WHOLE`."""

    def _split_scope(self, nodeid: str) -> str:
        return WHOLE if nodeid.startswith(WHOLE) else super()._split_scope(nodeid)
