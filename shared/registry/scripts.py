"""`python -m shared.registry.scripts --out DIR` writes the assembled Lua scripts, for luacheck."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.registry.loader import ScriptLibrary


def main(argv: Sequence[str] | None = None) -> int:
    """Write every assembled script as `<noun>_<verb>.lua` into the folder given by --out."""
    parser = argparse.ArgumentParser(description="Write the assembled Lua scripts.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    library = ScriptLibrary.load()
    for name in library.names:
        target = out / f"{name.replace('/', '_')}.lua"
        target.write_text(library[name].text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
