"""The compiled half of the carrier: where it is, how it is built, and its functions.

It is plain C behind ctypes: no Python headers are needed to compile it, and one file serves every
version of Python. The file's name has a digest of source and flags in it, so that one of another
version is never loaded. It is made at installation (`python -m services.proxy.carrier.compiled`);
where it is missing, streams are relayed in Python, which does the same.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("carrier.c")
FLAGS: Final = (
    *("-std=c11", "-O2", "-shared", "-fPIC"),
    *("-Wall", "-Wextra", "-Wconversion", "-Werror", "-D_FORTIFY_SOURCE=2"),
    *("-fstack-protector-strong", "-Wl,-z,relro,-z,now"),
)


class Report(ctypes.Structure):
    """Of the stream that was given back, or taken out, last."""

    _fields_ = (
        ("kind", ctypes.c_uint64),
        ("whole", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("events", ctypes.c_uint64),
        ("chars", ctypes.c_uint64),
        ("ids_count", ctypes.c_uint64),
        ("ids", ctypes.c_void_p),
    )
    kind: int
    """Why it was given back."""
    whole: int
    """Of a slow client's stream: whether its last chunk was read, too."""
    bytes: int
    """How much of what was read was not carried, which stands at `data`."""
    data: int | None
    events: int
    chars: int
    ids_count: int
    ids: int | None


class BuildError(Exception):
    """The compiler refuses the source; carries what it says."""


def library_path() -> Path:
    """Say where the library of this source and these flags is, if it was built."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    return SOURCE.with_name(f"carrier-{digest}.so")


def load() -> ctypes.PyDLL | None:
    """Load the library; None where it was not built, or this system is not its own.

    Calls keep the interpreter's lock: each takes microseconds, and nothing in it blocks.
    """
    try:
        library = ctypes.PyDLL(str(library_path()))
    except OSError:
        return None
    place, size = ctypes.c_uint32, ctypes.c_uint32
    carrier, text, file = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("new", carrier, ()),
        ("free", None, (carrier,)),
        ("fd", file, (carrier,)),
        ("report", ctypes.POINTER(Report), (carrier,)),
        ("add", ctypes.c_int, (carrier, file, file, text, size, text, size)),
        ("run", ctypes.c_int, (carrier,)),
        ("heard_s", ctypes.c_double, (carrier, place)),
        ("remove", None, (carrier, place)),
    ):
        function = getattr(library, f"carrier_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def build() -> Path:
    """Compile the library unless it is there; raises BuildError, also where there is no compiler.

    Two builds at the same time do no harm, and neither does a crash: the file appears whole.
    """
    path = library_path()
    if path.exists():
        return path
    compiler = shutil.which("cc")
    if compiler is None:
        raise BuildError("there is no C compiler (apt-get install gcc libc6-dev)")
    file, made = tempfile.mkstemp(dir=path.parent, prefix=".carrier-", suffix=".so")
    os.close(file)
    try:
        done = subprocess.run(
            [compiler, *FLAGS, "-o", made, str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BuildError(done.stderr.strip())
        Path(made).chmod(0o644)
        Path(made).replace(path)
    finally:
        Path(made).unlink(missing_ok=True)
    for old in path.parent.glob("carrier-*.so"):
        if old != path:
            old.unlink(missing_ok=True)
    return path


def main() -> int:
    """Build, or say why not: a proxy does without, at a higher cost per token."""
    try:
        build()
    except (BuildError, OSError) as error:
        print(  # noqa: T201 - a program of the installation
            f"going on without the proxy's compiled carrier (tokens cost more CPU): {error}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
