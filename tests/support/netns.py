"""Several hosts on one machine: network namespaces behind a router, and faults between them.

Each host is a namespace with one address, joined by a veth pair to a router that is a namespace of
its own; nothing of it touches the machine's network. A cut is a routing rule of the router that
drops what one host sends to another, without a word to either: what a failed switch does. What
should be late or lost instead travels through `tests.support.slowlink`, in user space, because not
every kernel has `netem`.

A namespace's name holds the pid of the test run that made it, so that a later run can remove what
a killed one left behind. All processes in our namespaces are ours, and end with them.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import psutil

from tests.support.waiting import wait_until_sync

PREFIX: Final = "rmtest-"
ROOT: Final = Path(__file__).resolve().parents[2]
_CLONE_NEWNET: Final = 0x40000000
_CUT_PRIORITY, _SLOW_PRIORITY = 50, 60
_NAMES: Final = Path("/run/netns")
IP: Final = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"
_FORBIDDEN: Final = ("not permitted", "ermission denied", "not supported", "Unknown device type")
_networks: Final = itertools.count()

Pairs = Sequence[tuple[str, str]]
"""Directed: what the first host sends to the second."""


def why_not() -> str | None:
    """Tell why this machine cannot have network namespaces; None when it can.

    Only what the kernel or our rights forbid counts: a missing program is an error to mend.
    """
    name = f"{PREFIX}{os.getpid()}-probe"
    try:
        command(IP, "netns", "add", name)
        command(IP, "-n", name, "link", "add", "name", "near0", "type", "veth")
    except RuntimeError as error:
        if any(word in str(error) for word in _FORBIDDEN):
            return str(error)
        raise
    finally:
        _remove(name)
    return None


def sweep() -> list[str]:
    """Remove the namespaces, with all that runs in them, of test runs that are no more."""
    removed: list[str] = []
    for path in _NAMES.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            _remove(path.name)
            removed.append(path.name)
    return removed


def command(*argv: str) -> str:
    """Run a short program and return what it printed; a failure says what it was."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=15, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


class Host:
    """One host: a namespace with an address."""

    def __init__(self, name: str, namespace: str, address: str) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address

    def within(self, *argv: str | Path) -> list[str]:
        """Give the command line that runs `argv` on this host (in the same process)."""
        return [IP, "netns", "exec", self.namespace, *map(str, argv)]

    @contextlib.contextmanager
    def entered(self) -> Generator[None]:
        """Put the calling thread on this host: sockets it makes meanwhile belong here."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(_NAMES / self.namespace, os.O_RDONLY)
        try:
            _setns(there)
            yield
        finally:
            _setns(home)
            os.close(there)
            os.close(home)


class Network:
    """Hosts and the router between them. Use as a context manager; removes all it made."""

    def __init__(self, names: Sequence[str]) -> None:
        stem = f"{PREFIX}{os.getpid()}-{next(_networks)}"
        self._router = f"{stem}-router"
        self._hosts = {
            name: Host(name, f"{stem}-{name}", f"10.77.{number}.2")
            for number, name in enumerate(names, start=1)
        }
        self._links = itertools.count()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._unmake()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._unmake()

    @contextlib.contextmanager
    def cut(self, pairs: Pairs) -> Generator[None]:
        """Drop silently what goes from the first to the second host of each pair."""
        rules = [[*self._rule(pair, _CUT_PRIORITY), "blackhole"] for pair in pairs]
        with contextlib.ExitStack() as healing:
            for rule in rules:
                healing.callback(self._route, "rule", "del", *rule)
                self._route("rule", "add", *rule)
            yield

    @contextlib.contextmanager
    def impaired(
        self, pairs: Pairs, *, delay_s: float = 0.0, loss: float = 0.0, seed: int = 1
    ) -> Generator[None]:
        """Make packets of each pair late by `delay_s`, and lose the share `loss` of them."""
        number = next(self._links)
        device, table = f"slow{number}", str(100 + number)
        relay = subprocess.Popen(
            [
                *(IP, "netns", "exec", self._router, sys.executable, "-m"),
                *("tests.support.slowlink", device, str(delay_s), str(loss), str(seed)),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        with contextlib.ExitStack() as healing:
            healing.callback(relay.wait, 10)
            healing.callback(relay.kill)
            assert relay.stdout is not None
            healing.enter_context(relay.stdout)
            assert relay.stdout.readline() == b"ready\n", "the slow link did not start"
            self._route("link", "set", device, "up", "txqueuelen", "10000")
            self._route("route", "add", "default", "dev", device, "table", table)
            for pair in pairs:
                # Only what comes from the host itself: the relay's own packets go their way.
                number_of_host = self._hosts[pair[0]].address.split(".")[2]
                rule = [*self._rule(pair, _SLOW_PRIORITY), "iif", f"h{number_of_host}"]
                rule += ["lookup", table]
                healing.callback(self._route, "rule", "del", *rule)
                self._route("rule", "add", *rule)
            yield

    def _rule(self, pair: tuple[str, str], priority: int) -> list[str]:
        source, target = (self._hosts[name].address for name in pair)
        return ["priority", str(priority), "from", source, "to", target]

    def _route(self, *words: str) -> None:
        command(IP, "-n", self._router, *words)

    def _make(self) -> None:
        command(IP, "netns", "add", self._router)
        self._route("link", "set", "lo", "up")
        settings = {"ip_forward": 1, "conf/all/rp_filter": 0, "conf/default/rp_filter": 0}
        settings |= {"conf/all/send_redirects": 0, "conf/default/send_redirects": 0}
        lines = [f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in settings.items()]
        command(IP, "netns", "exec", self._router, "sh", "-ec", "\n".join(lines))
        for host in self._hosts.values():
            number = host.address.split(".")[2]
            near, gateway = f"h{number}", f"10.77.{number}.1"
            command(IP, "netns", "add", host.namespace)
            peer = ["peer", "name", "net0", "netns", host.namespace]
            self._route("link", "add", "name", near, "type", "veth", *peer)
            self._route("address", "add", f"{gateway}/30", "dev", near)
            self._route("link", "set", near, "up")
            for words in (
                ("link", "set", "lo", "up"),
                ("address", "add", f"{host.address}/30", "dev", "net0"),
                ("link", "set", "net0", "up"),
                ("route", "add", "default", "via", gateway),
            ):
                command(IP, "-n", host.namespace, *words)

    def _unmake(self) -> None:
        for host in self._hosts.values():
            _remove(host.namespace)
        _remove(self._router)


def popen(
    host: Host, argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str], cwd: Path = ROOT
) -> "subprocess.Popen[bytes]":
    """Start a program on `host`; its output goes to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            host.within(*argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _remove(namespace: str) -> None:
    """End every process of a namespace of ours, and remove it."""
    if not (_NAMES / namespace).exists():
        return

    def emptied() -> bool:
        pids = [int(pid) for pid in command(IP, "netns", "pids", namespace).split()]
        alive = [pid for pid in pids if pid != os.getpid()]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not alive

    wait_until_sync(emptied, what=f"every process in {namespace} ended")
    command(IP, "netns", "del", namespace)


def _setns(handle: int) -> None:
    # `os.setns` exists from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(handle, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
