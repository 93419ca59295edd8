"""`redmesh redis`: one Redis command on the mesh's Redis, for machines without redis-cli."""

from collections.abc import Iterator
from typing import Any, cast

import click

from services.cli.session import Session, common_options
from shared.registry import Registry


@click.command("redis", context_settings={"ignore_unknown_options": True})
@click.argument("parts", metavar="COMMAND [ARG]...", nargs=-1, required=True)
@common_options
def redis_command(session: Session, *, parts: tuple[str, ...]) -> int:
    """Run one command, such as `redmesh redis -- HGETALL 'redmesh:{demo}:nreq'`.

    The reply is written as redis-cli writes it. The command is run as it is: it may write, too.
    """

    async def act(registry: Registry) -> int:
        reply = await registry.connection.command(*parts)
        for line in lines(reply):
            click.echo(line)
        return 0

    return session.run(act)


def lines(reply: Any, indent: str = "") -> Iterator[str]:  # noqa: ANN401 - whatever Redis says
    """Write a reply as redis-cli does."""
    if isinstance(reply, dict):
        pairs = cast("dict[Any, Any]", reply)
        reply = [part for pair in pairs.items() for part in pair]
    if isinstance(reply, (list, tuple, set)):
        parts = list(cast("list[Any]", reply))
        if not parts:
            yield "(empty array)"
        width = len(str(len(parts)))
        for number, part in enumerate(parts, 1):
            head = f"{number:>{width}}) "
            inner = lines(part, indent + " " * len(head))
            yield (indent if number > 1 else "") + head + next(inner)
            yield from inner
        return
    if reply is None:
        yield "(nil)"
    elif isinstance(reply, bytes):
        text = reply.decode(errors="backslashreplace")
        yield '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    elif isinstance(reply, bool):
        yield "OK" if reply else "(false)"
    elif isinstance(reply, int):
        yield f"(integer) {reply}"
    elif isinstance(reply, float):
        yield f'"{reply:.0f}"' if reply.is_integer() else f'"{reply!r}"'
    else:
        yield str(reply)
