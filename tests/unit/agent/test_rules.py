"""The small pure rules: health, load, last words, ports, settings, adoption, backoff."""

import socket
from pathlib import Path

import msgspec
import pytest

from services.agent.adoption import is_the_one
from services.agent.engine import backoff_s
from services.agent.health import Health, judge, progressed
from services.agent.inventory import cpus, memory_bytes
from services.agent.launch import usable
from services.agent.ports import choose_port
from services.agent.probe import parse_load
from services.agent.proctree import Process
from services.agent.settings import AgentSettings, check, parse_gpus, parse_ports
from services.agent.statefile import EngineFile, EngineFolders, is_folder_name, summary
from shared.errors import EngineError, InvalidInputError
from shared.models.deployment import DeploymentSpec
from shared.models.order import Order, OrderAction
from shared.secret import Secret


def _judged(health: Health, *, well: bool) -> Health:
    return judge(health, well=well, progress=1.0, now_s=10.0, interval_s=5.0, misses=3)


def test_three_misses_in_a_row_end_health_and_one_success_mends_it() -> None:
    """Fewer misses, or misses with a success between them, change nothing."""
    health = _judged(_judged(Health(), well=False), well=False)
    assert health.healthy
    assert _judged(_judged(health, well=True), well=False).healthy
    sick = _judged(health, well=False)
    assert not sick.healthy
    assert not _judged(sick, well=False).healthy
    assert _judged(sick, well=True).healthy


def test_a_miss_is_followed_up_soon() -> None:
    """After a miss the next probe is due in a second, after a success in its interval."""
    assert _judged(Health(), well=False).due_s == 11.0
    assert _judged(Health(), well=True).due_s == 15.0


def test_progress_counts_only_upwards_from_a_known_count() -> None:
    """An engine of unknown or restarted count has yet to show that it works."""
    assert not progressed(Health(), 5.0)
    assert not progressed(Health(progress=5.0), 5.0)
    assert not progressed(Health(progress=5.0), 0.0)
    assert progressed(Health(progress=5.0), 6.0)


def test_load_is_read_from_metrics_and_cores_add_up() -> None:
    """Counts of several engine cores add up, KV use is the fullest, twins and noise are skipped."""
    text = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:generation_tokens_total{engine="0"} 1e+02
vllm:generation_tokens_created{engine="0"} 1.7e9
vllm:prompt_tokens_total{engine="0"} 11.0
vllm:prompt_tokens_total{engine="1"} nonsense
"""
    load = parse_load(text)
    assert (load.running, load.waiting, load.kv_usage, load.progress) == (3, 4, 0.5, 111.0)
    assert parse_load("").running == 0


def test_last_words_are_the_cause_not_the_sequel() -> None:
    """The last error that is a cause is chosen, without log prefixes, cut to size."""
    log = """(EngineCore pid=12) ERROR 11-23 14:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-23 14:00:00 [core.py:1] ValueError: No available memory for the cache
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert summary(log) == "ValueError: No available memory for the cache"
    assert summary("tool: error: bad flag\n") == "tool: error: bad flag"
    assert summary("one\n\ntwo\nthree\nfour\n") == "two | three | four"
    assert summary("") == ""
    assert summary("INFO: up\nx.EngineDeadError: see above\n", cause_only=True) == ""
    assert summary(log, cause_only=True).startswith("ValueError")
    assert len(summary("ValueError: " + "x" * 999)) == 300
    assert summary("x" * 999).startswith("…")


def test_backoff_grows_to_a_minute() -> None:
    """The first restart is at once, the next after 1, 2, 4 … 60 seconds."""
    assert [backoff_s(n) for n in (0, 1, 2, 3, 20)] == [0.0, 1.0, 2.0, 4.0, 60.0]


def test_port_is_stable_free_and_not_promised_to_another() -> None:
    """The same replica gets the same port; taken and bound ports are passed over."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        ports = range(port, port + 1)
        with pytest.raises(EngineError, match="REDMESH_PORT_RANGE"):
            choose_port("r", ports, (), "127.0.0.1")
    assert choose_port("r", ports, (), "127.0.0.1") == port
    with pytest.raises(EngineError):
        choose_port("r", ports, {port}, "127.0.0.1")
    some = range(23900, 23950)
    first = choose_port("r", some, (), "127.0.0.1")
    assert choose_port("r", some, (), "127.0.0.1") == first
    assert choose_port("r", some, (), "127.0.0.1", preferred=23949) == 23949
    with pytest.raises(EngineError, match="REDMESH_ENGINE_HOST"):
        choose_port("r", some, (), "203.0.113.1")


def test_settings_report_all_problems_at_once() -> None:
    """One error names each wrong variable and its remedy."""
    with pytest.raises(InvalidInputError) as caught:
        check(AgentSettings(port_range="9-8", gpus="x", probe_deadline_s=0.0, max_replicas=0))
    for name in ("PORT_RANGE", "GPUS", "FLEET_SECRET", "PROBE_DEADLINE_S", "MAX_REPLICAS"):
        assert f"REDMESH_{name}" in str(caught.value)
    check(AgentSettings(fleet_secret=Secret("s")))


def test_ranges_and_indices_are_parsed() -> None:
    """Both ends of a port range count; `auto` means every GPU."""
    assert parse_ports("18000-18001") == range(18000, 18002)
    assert parse_gpus("auto") is None
    assert parse_gpus("none") == frozenset()
    assert parse_gpus("0, 2") == {0, 2}


def test_symlinked_engine_python_keeps_its_path() -> None:
    """The path is made absolute without leaving the virtual environment that it names."""
    assert AgentSettings().engine_python_path == Path.cwd() / ".engine/bin/python"
    assert not usable(Path("/no/such"))


def test_limits_of_the_control_group_count(tmp_path: Path) -> None:
    """A quota below the machine's size is the host's size; no limit means the machine's."""
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1048576\n")
    assert cpus(tmp_path) == 0.5
    assert memory_bytes(tmp_path) == 1048576
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert cpus(tmp_path) >= 1.0
    assert memory_bytes(tmp_path) > 1048576
    assert cpus(tmp_path / "none") >= 1.0


FILE = EngineFile(
    order=Order(
        rid="r",
        model="m",
        gen=1,
        action=OrderAction.RUN,
        revision="v",
        spec=DeploymentSpec(name="m"),
    ),
    port=1,
    url="u",
    mark="k",
    boot="b",
    program="p",
    pid=10,
    started_ticks=100,
)
FOUND = Process(pid=10, started_ticks=100, session=10, zombie=False, command_line="x")


def test_only_the_same_process_of_the_same_boot_is_adopted() -> None:
    """Another start time (the pid was used again), another boot, a zombie or nobody is not it."""
    assert is_the_one(FILE, FOUND, "b")
    assert not is_the_one(FILE, FOUND, "other")
    assert not is_the_one(FILE, None, "b")
    assert not is_the_one(FILE, msgspec.structs.replace(FOUND, zombie=True), "b")
    assert not is_the_one(FILE, msgspec.structs.replace(FOUND, started_ticks=101), "b")


def test_state_files_are_whole_or_reported(tmp_path: Path) -> None:
    """What was written is read back; what does not parse is named; old logs are thinned out."""
    folders = EngineFolders(tmp_path)
    assert folders.read_all() == ([], [])
    folders.forget("never")
    folders.write(FILE)
    broken = tmp_path / "engines/b/engine.json"
    broken.parent.mkdir()
    broken.write_text("{")
    assert folders.read_all() == ([FILE], [broken])
    for number in range(30):
        (tmp_path / f"engines/old-{number}").mkdir()
    folders.forget("r")
    left = [path.name for path in (tmp_path / "engines").iterdir()]
    assert len([name for name in left if name != "b"]) == 20


@pytest.mark.parametrize("rid", ["a/../../etc", "..", "", "a/b", ".x"])
def test_hostile_replica_ids_name_no_folder(rid: str) -> None:
    """A replica id from Redis cannot lead out of the state directory."""
    assert not is_folder_name(rid)
    assert is_folder_name("demo-3fa2b1")
