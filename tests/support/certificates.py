"""Certificates for servers on this machine: an authority of a test's own, and what it signs."""

import subprocess
from pathlib import Path
from typing import Final, NamedTuple

_KEY: Final = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Certificate(NamedTuple):
    """Files in PEM format."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1 that hold for two days."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._signed = 0
        self.certificate = folder / "authority.pem"
        """What a client must trust."""
        self._key = folder / "authority.key"
        _openssl(
            *("req", "-x509", *_KEY, "-days", "2", "-subj", "/CN=authority of a test"),
            *("-keyout", self._key, "-out", self.certificate),
        )

    def sign(self) -> Certificate:
        """Make and sign another certificate."""
        self._signed += 1
        made, key, wish, names = (
            self._folder / f"server-{self._signed}.{suffix}"
            for suffix in ("pem", "key", "csr", "names")
        )
        names.write_text("subjectAltName=IP:127.0.0.1\n")
        _openssl("req", *_KEY, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", wish)
        _openssl(
            *("x509", "-req", "-in", wish, "-days", "2", "-extfile", names, "-out", made),
            *("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial"),
        )
        return Certificate(made, key)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(
        ["openssl", *map(str, arguments)],  # noqa: S607 - as the system has it
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
