"""A slow or lossy link in user space: `python -m tests.support.slowlink DEVICE DELAY_S LOSS SEED`.

Makes a TUN device and sends every packet that is routed into it back out of it, later, unless it
is lost. Run in a router's namespace, it is `tc netem` for kernels without it. Prints `ready` once
the device exists.
"""

import fcntl
import os
import random
import select
import stat
import struct
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

_NODE: Final = Path("/dev/net/tun")
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_MTU_BYTES: Final = 65536
_QUEUE: Final = 50_000
"""More packets than that at once are lost, as in any router."""


def main(device: str, delay_s: float, loss: float, seed: int) -> None:
    """Relay for ever."""
    if not _NODE.exists():  # a bare machine may have the driver and not its node
        _NODE.parent.mkdir(exist_ok=True)
        os.mknod(_NODE, 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    tun = os.open(_NODE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    chance = random.Random(seed)
    late: deque[tuple[float, bytes]] = deque()
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        select.select([tun], [], [], wait_s)
        for packet in _arrived(tun):
            if chance.random() >= loss and len(late) < _QUEUE:
                late.append((time.monotonic() + delay_s, packet))
        now_s = time.monotonic()
        while late and late[0][0] <= now_s:
            os.write(tun, late.popleft()[1])


def _arrived(tun: int) -> list[bytes]:
    packets: list[bytes] = []
    try:
        while len(packets) < 256:
            packets.append(os.read(tun, _MTU_BYTES))
    except BlockingIOError:
        pass
    return packets


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
