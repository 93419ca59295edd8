"""Redis as it is run in earnest: replicas, Sentinels, a cluster that fails over, a full disk.

Real processes on loopback with their own folders, always killed. Calls block: a test with an event
loop makes them in a thread.
"""

import resource
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final, Self, cast

import redis

from tests.support.servers import SLOTS, RedisServer, any_binary, free_port
from tests.support.waiting import wait_until_sync

SERVICE: Final = "mymaster"
DOWN_AFTER_MS: Final = 1000
NODE_TIMEOUT_MS: Final = 1500
ACCEPTED_S: Final = 20.0
"""Within this a Sentinel agrees to a failover: it asks its servers for news every ten seconds."""


class Server(RedisServer):
    """A server whose data, disk and role a test can change."""

    def __init__(self, folder: Path, *options: str, password: str = "") -> None:
        self.folder = folder
        super().__init__(_unsinkable(folder), folder, *options, password=password)

    @property
    def pid(self) -> int:
        """Process id; the server must run."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Tell whether it runs."""
        return self._process is not None

    def forget(self) -> None:
        """Drop what it has stored; it must not run."""
        for each in self.folder.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.suffix in {".rdb", ".aof", ".manifest"}:
                each.unlink()

    def fill_disk(self, *, full: bool) -> None:
        """Let it write no further than its append-only file is now, or as far as it wants."""
        log = max((p for p in self.folder.rglob("*.aof")), key=lambda p: p.stat().st_mtime)
        size = log.stat().st_size if full else resource.RLIM_INFINITY
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def follow(self, port: int | None) -> None:
        """Become a replica of `port` on this machine, or a primary."""
        self.command("REPLICAOF", *(("127.0.0.1", port) if port else ("NO", "ONE")))

    def synced(self) -> bool:
        """Tell whether it is a replica with its primary's data."""
        role = self.command("ROLE")
        return bool(role[0] == b"slave" and role[3] == b"connected")

    def leads(self) -> bool:
        """Tell whether it answers as a primary."""
        try:
            role = self.command("ROLE")
        except redis.RedisError:
            return False
        return bool(role[0] == b"master")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()


class Sentinels:
    """A primary, a replica, and three Sentinels that watch them."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [Server(folder / f"node{n}") for n in range(2)]
        self.nodes[1].follow(self.nodes[0].port)
        wait_until_sync(self.nodes[1].synced, what="the replica has the data")
        self.ports: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(3):
            port = free_port()
            home = folder / f"sentinel{number}"
            home.mkdir(parents=True)
            configuration = home / "sentinel.conf"
            configuration.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\n"
                f"sentinel monitor {SERVICE} 127.0.0.1 {self.nodes[0].port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {SERVICE} 3000\n"
            )
            with (home / "sentinel.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [any_binary(), str(configuration), "--sentinel"], stdout=log, stderr=log
                    )
                )
            self.ports.append(port)
        wait_until_sync(self._agreed, timeout_s=20, what="the Sentinels know each other")

    @property
    def url(self) -> str:
        """Give the URL that names all Sentinels."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def ask(self, number: int, *parts: str) -> Any:  # noqa: ANN401 - any reply
        """Ask one Sentinel; None if it does not answer. An error that it answers is raised."""
        with redis.Redis(host="127.0.0.1", port=self.ports[number], protocol=2) as client:
            cast("Any", client).response_callbacks.clear()  # replies as they are sent
            try:
                return cast("Any", client).execute_command(*parts)
            except redis.ConnectionError:
                return None

    def fail_over(self) -> None:
        """Have the primary swapped; a Sentinel refuses while it has seen no good replica yet."""
        deadline_s = time.monotonic() + ACCEPTED_S
        while True:
            try:
                if self.ask(0, "SENTINEL", "FAILOVER", SERVICE) is not None:
                    return
            except redis.ResponseError as error:
                if str(error).startswith("INPROG"):
                    return
                if time.monotonic() > deadline_s:
                    raise
            assert time.monotonic() < deadline_s, "the first Sentinel does not answer"
            time.sleep(0.1)

    def primary(self) -> Server:
        """Give the server that the first Sentinel calls primary."""
        address = self.ask(0, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        port = int(address[1]) if address else 0
        return next(node for node in self.nodes if node.port == port)

    def agree(self, server: Server) -> bool:
        """Tell whether every Sentinel names `server` as the primary."""
        command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        answers = [self.ask(number, *command) for number in range(len(self.ports))]
        return all(answer and int(answer[1]) == server.port for answer in answers)

    def kill(self) -> None:
        """End everything."""
        for process in self._processes:
            process.kill()
            process.wait()
        for node in self.nodes:
            node.kill()

    def _agreed(self) -> bool:
        for number in range(3):
            reply = self.ask(number, "SENTINEL", "MASTER", SERVICE)
            state = dict(zip(reply[::2], reply[1::2], strict=True)) if reply else {}
            if state.get(b"num-other-sentinels") != b"2" or state.get(b"num-slaves") != b"1":
                return False
        return True


class Cluster:
    """Three primaries, each with a replica."""

    def __init__(self, folder: Path) -> None:
        options = (
            *("--cluster-enabled", "yes"),
            *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
            *("--repl-diskless-sync-delay", "0"),
        )
        self.nodes = [Server(folder / f"node{n}", *options) for n in range(6)]
        bounds = [SLOTS * n // 3 for n in range(4)]
        for number, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                node.command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for node in self.nodes[1:]:
            self.nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port)
        wait_until_sync(
            lambda: all("cluster_known_nodes:6" in self._info(node) for node in self.nodes),
            timeout_s=20,
            what="the nodes know each other",
        )
        self.ids = [node.command("CLUSTER", "MYID").decode() for node in self.nodes]
        for number in range(3, 6):
            self.nodes[number].command("CLUSTER", "REPLICATE", self.ids[number - 3])
        wait_until_sync(
            lambda: (
                all("cluster_state:ok" in self._info(node) for node in self.nodes)
                and all(node.synced() for node in self.nodes[3:])
            ),
            timeout_s=20,
            what="the cluster is whole",
        )

    @property
    def url(self) -> str:
        """Give a URL that names three nodes."""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])
        return f"redis+cluster://{hosts}"

    def slot_of(self, key: str) -> int:
        """Tell the slot of a key."""
        return int(self.nodes[3].command("CLUSTER", "KEYSLOT", key))

    def owner(self, slot: int) -> int:
        """Tell which of the nodes has a slot, as a living one sees it."""
        node = next(node for node in reversed(self.nodes) if node.running)
        for low, high, primary, *_ in node.command("CLUSTER", "SLOTS"):
            if low <= slot <= high:
                return next(n for n, each in enumerate(self.nodes) if each.port == primary[1])
        return -1

    def primaries(self) -> list[int]:
        """Tell which of the nodes are primaries."""
        return [number for number, node in enumerate(self.nodes) if node.leads()]

    def move(self, slot: int, target: int) -> int:
        """Move a slot with all its keys, one by one; returns how many."""
        source = self.owner(slot)
        there, here = self.nodes[target], self.nodes[source]
        there.command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source])
        here.command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[target])
        moved = 0
        while keys := here.command("CLUSTER", "GETKEYSINSLOT", slot, 1):
            for key in keys:
                here.command("MIGRATE", "127.0.0.1", there.port, key, 0, 5000)
                moved += 1
        for number in (target, source):
            self.nodes[number].command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[target])
        return moved

    def kill(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            node.kill()

    @staticmethod
    def _info(node: Server) -> str:
        return str(node.command("CLUSTER", "INFO"))


def _unsinkable(folder: Path) -> str:
    """Wrap the server so that a file at its size limit is an error to it, not the end of it."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "redis-server.sh"
    script.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {any_binary()} \"$@\"\n")
    script.chmod(0o755)
    return str(script)
