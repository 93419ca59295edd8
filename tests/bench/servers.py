"""What is measured: each server is one process tree on the measured core, before the replicas."""

import os
import shutil
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from shared.models.deployment import StreamFailover
from shared.registry import open_registry
from shared.secret import Secret
from shared.settings import CommonSettings
from tests.bench.machine import BenchError, Cores, process
from tests.bench.peers import PROGRAMS, peer
from tests.bench.site import Server, Site, Start, begun, listens
from tests.support.servers import RedisServer, any_binary, free_port
from tests.support.standalone import declare, proxy

_NGINX: Final = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log error;
events {{ worker_connections 40000; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream replicas {{
    least_conn;
    {replicas}
    keepalive 1024;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 100000000;
    client_body_buffer_size 1m;
    location / {{
      proxy_pass http://replicas;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


def nginx_program() -> str | None:
    """Find nginx, which Debian installs where users do not look."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@asynccontextmanager
async def nginx(site: Site) -> AsyncGenerator[Server]:
    """Run nginx as a plain reverse proxy: one worker, least connections, nothing buffered."""
    program = nginx_program()
    if program is None:
        raise BenchError("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    replicas = "\n    ".join(f"server 127.0.0.1:{each};" for each in site.replica_ports)
    config = site.folder / "nginx.conf"
    config.write_text(_NGINX.format(folder=site.folder, port=port, replicas=replicas))
    log = site.folder / "nginx.log"
    command = (*site.cores.on_measured(), program, "-p", site.folder, "-c", config, "-e", log)
    async with process(*command, log=log) as running:
        await begun(lambda: listens(port), "nginx", log)
        yield Server("nginx", port, running.pid)


def redmesh(name: str, failover: StreamFailover, workers: int = 1) -> Start:
    """Make a server of redmesh's proxy, for a model of its own with this kind of failover.

    All its workers share the measured core: what they cost together for a request is what one
    costs if they do not disturb each other, and then they carry as much more as they have cores.
    """

    @asynccontextmanager
    async def start(site: Site) -> AsyncGenerator[Server]:
        urls = [f"http://127.0.0.1:{port}" for port in site.replica_ports]
        registry = await open_registry(CommonSettings(redis_url=Secret(site.redis.url)))
        try:
            await declare(registry, name, urls, stream_failover=failover)
            key = registry.keys.model(name).nreq
        finally:
            await registry.aclose()

        def reserved() -> int:
            return int(site.redis.command("HGET", key, "*") or 0)

        log = site.folder / f"{name}.log"
        async with proxy(
            site.redis.url,
            prefix=site.cores.on_measured(),
            log=str(log),
            log_level="warning",
            workers=workers,
        ) as running:
            await begun(lambda: running.serves(name), name, log)
            yield Server(name, running.port, running.pid, name, reserved, workers)

    return start


def redis_pid(server: RedisServer) -> int:
    """Ask a Redis for its process."""
    said = server.command("INFO", "server").decode()
    return int(next(x for x in said.splitlines() if x.startswith("process_id:")).split(":")[1])


@asynccontextmanager
async def redis_for(folder: Path, cores: Cores) -> AsyncGenerator[RedisServer]:
    """Run the Redis that the proxies share, away from the measured core."""
    server = RedisServer(any_binary(), folder / "redis")
    try:
        os.sched_setaffinity(redis_pid(server), {cores.redis})
        yield server
    finally:
        server.kill()


@asynccontextmanager
async def direct(site: Site) -> AsyncGenerator[Server]:
    """Let the load reach one of the replicas with nothing between: what the pair itself can do."""
    yield Server("direct", site.replica_ports[0], None)


SERVERS: Final[Mapping[str, Start]] = {
    "nginx": nginx,
    "redmesh-armed": redmesh("redmesh-armed", StreamFailover.VALID),
    "redmesh-disarmed": redmesh("redmesh-disarmed", StreamFailover.OFF),
    **{name: peer(name) for name in PROGRAMS},
    "redmesh-two-workers": redmesh("redmesh-two-workers", StreamFailover.VALID, workers=2),
    "direct": direct,
}
"""By name, in the order in which a round asks them."""

USUAL: Final = tuple(name for name in SERVERS if name not in {"redmesh-two-workers", "direct"})
"""Measured unless told otherwise."""
