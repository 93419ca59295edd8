"""The instrument itself: a cut is silent and one-way, delay and loss are what was asked for."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.netns import Network

pytestmark = pytest.mark.mesh

PORT = 7000


@pytest.fixture
def network(namespaces: None) -> Generator[Network]:
    """Give two hosts, `left` and `right`."""
    with Network(["left", "right"]) as made:
        yield made


@contextlib.contextmanager
def echoes(network: Network) -> Generator[tuple[socket.socket, socket.socket]]:
    """Connect from `left` to `right`; yields both ends."""
    with network["right"].entered():
        server = socket.create_server((network["right"].address, PORT))
    with server:
        with network["left"].entered():
            near = socket.create_connection((network["right"].address, PORT), timeout=2)
        far, _ = server.accept()
        far.settimeout(2)
        with near, far:
            yield near, far


def arrives(source: socket.socket, target: socket.socket, within_s: float) -> bool:
    """Tell whether a byte gets from one end to the other in time."""
    source.send(b"x")
    target.settimeout(within_s)
    try:
        return bool(target.recv(1))
    except TimeoutError:
        return False


def test_a_cut_is_silent_and_one_way_and_heals(network: Network) -> None:
    """Only one direction is dropped, nobody is told, and what was sent arrives after healing."""
    with echoes(network) as (near, far):
        assert arrives(near, far, 2)
        with network.cut([("right", "left")]):
            assert not arrives(far, near, 0.4)
            # The byte gets there; only its acknowledgement does not come back.
            assert arrives(near, far, 2)
            with network["left"].entered(), socket.socket() as other:
                other.settimeout(0.4)
                with pytest.raises(TimeoutError):
                    other.connect((network["right"].address, PORT))
        near.settimeout(5)
        assert near.recv(1) == b"x"


def test_a_slow_link_delays_both_ways(network: Network) -> None:
    """A delay of 0.1 s each way makes a round trip of 0.2 s, and only on that link."""
    both = [("left", "right"), ("right", "left")]
    with echoes(network) as (near, far):
        with network.impaired(both, delay_s=0.1):
            began_s = time.monotonic()
            assert arrives(near, far, 2)
            assert arrives(far, near, 2)
            assert 0.2 <= time.monotonic() - began_s < 0.6
        began_s = time.monotonic()
        assert arrives(near, far, 2)
        assert time.monotonic() - began_s < 0.1


def test_a_lossy_link_loses_the_share_that_was_asked_for(network: Network) -> None:
    """Of 1000 datagrams over a link that loses 5 %, between 20 and 90 are lost."""
    with network["right"].entered():
        target = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        target.bind((network["right"].address, PORT))
    with network["left"].entered():
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    count = 0
    with target, source, network.impaired([("left", "right")], loss=0.05):
        target.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for batch in range(11):
                for _ in range(100 if batch < 10 else 0):
                    source.sendto(b"x", (network["right"].address, PORT))
                expected = 80 if batch < 10 else 1000
                while expected > 0 and target.recv(1):
                    count += 1
                    expected -= 1
    assert 910 <= count <= 980


def test_what_a_killed_run_left_is_swept_away(network: Network, tmp_path: Path) -> None:
    """A namespace whose maker is dead goes at the next start, with the processes in it."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(10)
    name = f"{netns.PREFIX}{ended.pid}-0-left"
    netns.command(netns.IP, "netns", "add", name)
    orphan = netns.popen(
        netns.Host("left", name, ""), ["sleep", "60"], log=tmp_path / "log", env=os.environ
    )
    assert netns.sweep() == [name]
    assert orphan.wait(5) < 0
    assert network["left"].namespace in netns.command(netns.IP, "netns", "list")
