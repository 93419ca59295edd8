"""The last thing `redmesh up` prints: commands that work as pasted, in bash and zsh.

Remarks stand on lines of their own: an interactive zsh takes a `#` behind a command for an
argument.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from services.cli.statedir import DEFAULT, Mesh, StateDir
from shared.models.deployment import DeploymentSpec

_QUESTION = "What is redmesh?"


def block(
    state: StateDir, mesh: Mesh, specs: Sequence[DeploymentSpec], key_prefix: str = "redmesh"
) -> str:
    """Write the whole block."""
    names = ", ".join(spec.name for spec in specs)
    lines = ["", f"redmesh is ready: {names} behind {' and '.join(mesh.proxy_urls)}", ""]
    for spec in specs:
        lines += _requests(mesh, spec)
    first = next((spec for spec in specs if spec.engine.runner == "generate"), None)
    if first is not None:
        lines += _openai(mesh, first.name)
    lines += _redis(state, mesh, f"{key_prefix}:{{{specs[0].name}}}", f"{key_prefix}:{{ctl}}")
    lines += _operate(state, mesh, specs[0])
    return "\n".join(lines)


def command(state: StateDir) -> tuple[str, str]:
    """Tell how to call `redmesh` from here, and the option that names this mesh."""
    script = Path(sys.executable).with_name("redmesh")
    found = shutil.which("redmesh")
    if found is not None and Path(found).resolve() == script.resolve():
        name = "redmesh"
    elif script.is_relative_to(Path.cwd()):
        name = str(script.relative_to(Path.cwd()))
    else:
        name = str(script)
    option = "" if state.path == DEFAULT.absolute() else f" --state-dir {_shown(state.path)}"
    return shlex.quote(name), option


def _shown(path: Path) -> str:
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def _requests(mesh: Mesh, spec: DeploymentSpec) -> list[str]:
    lines = [f"# {spec.name}, through each proxy"]
    json_header = "-H 'Content-Type: application/json'"
    text_header = "-H 'Content-Type: text/plain'"
    for url in mesh.proxy_urls:
        if spec.engine.runner == "pooling":
            lines += [
                f"curl {url}/v1/embeddings {json_header} \\",
                f"""  -d '{{"model": "{spec.name}", "input": "{_QUESTION}"}}'""",
            ]
            continue
        messages = f'[{{"role": "user", "content": "{_QUESTION}"}}]'
        lines += [
            f"curl -X POST {url}/v1/chat/{spec.name} {json_header} --no-buffer \\",
            f"""  -d '{{"messages": {messages}, "stream": true, "max_tokens": 64}}'""",
            f"curl -X POST '{url}/v1/chat/{spec.name}?max_tokens=64' {text_header} --no-buffer \\",
            f"  -d '{_QUESTION}'",
        ]
    return [*lines, ""]


def _openai(mesh: Mesh, model: str) -> list[str]:
    lines = ["# with the OpenAI client"]
    if importlib.util.find_spec("openai") is None:
        lines.append(f"{_shown(Path(sys.executable))} -m pip install openai")
    return [
        *lines,
        f"{_shown(Path(sys.executable))} - <<'EOF'",
        "from openai import OpenAI",
        f'client = OpenAI(base_url="{mesh.proxy_urls[-1]}/v1", api_key="unused")',
        "for chunk in client.chat.completions.create(",
        f'    model="{model}", max_tokens=64, stream=True,',
        f'    messages=[{{"role": "user", "content": "{_QUESTION}"}}],',
        "):",
        '    print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="")',
        "EOF",
        "",
    ]


def _redis(state: StateDir, mesh: Mesh, model: str, fleet: str) -> list[str]:
    """Write redis-cli lines; without one on PATH, or for a foreign Redis, our own command."""
    commands = (
        (f"HGETALL '{model}:nreq'", "requests in flight on each replica"),
        (f"ZRANGE '{model}:ready' 0 -1 WITHSCORES", "who is chosen next"),
        (f"XREVRANGE '{fleet}:events' + - COUNT 3", "what happened last"),
    )
    if mesh.redis_port and shutil.which("redis-cli"):
        lines = [
            "# look into Redis",
            f"export REDISCLI_AUTH=$(cat {_shown(state.redis_password_file)})",
        ]
        prefix = f"redis-cli -p {mesh.redis_port}"
    else:
        name, option = command(state)
        lines, prefix = ["# look into Redis"], f"{name} redis{option} --"
    for text, why in commands:
        lines += [f"# {why}", f"{prefix} {text}"]
    return [*lines, ""]


def _operate(state: StateDir, mesh: Mesh, spec: DeploymentSpec) -> list[str]:
    name, option = command(state)
    more = min(spec.replicas.count + 1, spec.replicas.max)
    return [
        "# see and steer",
        f"{name} get replicas{option}",
        f"{name} scale {spec.name} {more}{option}",
        f"{name} audit{option}",
        "# stop everything" if mesh.detached else "# stop everything (or Ctrl-C here)",
        f"{name} down{option}",
    ]
