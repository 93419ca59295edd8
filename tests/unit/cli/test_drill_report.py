"""The reports: what a newcomer and a manager read, and that it needs nothing from elsewhere."""

import re
from html.parser import HTMLParser

import msgspec
import pytest

from services.cli.drill import chart, judge, page, told
from services.cli.drill.catalogue import DRILLS
from services.cli.drill.chart import Line
from services.cli.drill.records import Mark, Second, Seen, Traffic
from services.cli.drill.report import Report, headline

DRILL = DRILLS["replica-kill"]


def report(*, broken: int = 0, seconds: int = 12) -> Report:
    """Make the report of a run that lost `broken` streams."""
    traffic = Traffic(
        driven=True,
        count=90 + broken,
        ok=90,
        failed=0,
        broken=broken,
        own=0,
        resent=0,
        outcomes={"ok": 90},
        details=("5.0 s, http://p: reset after <1 s> & more",) if broken else (),
        ttft_before_ms=(40.0, 60.0),
        ttft_after_ms=(45.0, 90.0),
        compared=True,
    )
    seen = Seen(
        fault_s=4.0,
        heal_s=4.0,
        answers_s=None,
        recovered_s=4.25,
        whole_s=7.0,
        exact_s=5.5,
        drift=0,
        left=0,
        sign="after 0.10 s",
        traffic=traffic,
    )
    return Report(
        drill=DRILL.name,
        what=DRILL.what,
        expects=DRILL.expects,
        recovery=DRILL.recovery.value,
        struck="SIGKILL to <script>alert(1)</script>",
        model="m",
        mesh="3 replicas of m",
        load="8 users",
        version="0",
        started="2026-01-01T00:00:00+00:00",
        length_s=12.0,
        budget=DRILL.budget,
        verdict=judge.judge(DRILL.recovery, DRILL.sign, DRILL.budget, seen),
        seen=seen,
        seconds=tuple(
            Second(
                at_s=n,
                requests=7,
                failed=broken if n == 4 else 0,
                tokens=300,
                ttft_ms=None if n == 5 else 40.0,
                in_flight=8,
            )
            for n in range(seconds)
        ),
        marks=(
            Mark(at_s=4.0, kind="fault", text="SIGKILL"),
            *(Mark(at_s=5.0, kind="event", text=f"event {n}") for n in range(99)),
        ),
    )


def test_the_text_says_what_was_done_expected_and_seen() -> None:
    """Verdict first; each check with both sides; a missed one with what it means."""
    good = "\n".join(told.lines(report()))
    assert good.startswith("Drill replica-kill: PASSED")
    assert "nothing was lost" in good
    assert re.search(r"ok +out of routing within 1 s +0\.25 s", good)
    bad = "\n".join(told.lines(report(broken=2)))
    assert bad.startswith("Drill replica-kill: MISSED ITS BUDGET")
    assert re.search(r"MISSED +no streams broken +2", bad)
    assert told.WHY["broken"] in bad
    assert "and 87 more events" in bad


def test_every_check_is_explained() -> None:
    """No check of a verdict lacks its sentence for a newcomer."""
    assert {check.name for check in report().verdict.checks} <= set(told.WHY)


class Page(HTMLParser):
    """Reads a page: its tags, balanced or not, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag, and what it loads."""
        self.tags.append(tag)
        self.loads += [name for name, _ in attrs if name in {"src", "href"}]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself."""
        del attrs
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes what was opened last."""
        assert self.open.pop() == tag


@pytest.mark.parametrize("broken", [0, 3])
def test_the_page_is_whole_and_needs_nothing_from_elsewhere(broken: int) -> None:
    """Balanced tags, four charts, no script, nothing loaded, and text is escaped."""
    text = page.html(report(broken=broken))
    read = Page()
    read.feed(text)
    assert read.open == []
    assert read.tags.count("svg") == 5
    assert not read.loads
    assert "script" not in read.tags
    assert "url(" not in text
    assert ("BUDGET MISSED" in text) == (broken > 0)
    assert "&lt;script&gt;" in text
    assert text.count('class="mark fault"') == 5


def test_a_run_without_traffic_has_a_page_too() -> None:
    """A report of no seconds is written all the same."""
    empty = msgspec.structs.replace(report(), seconds=())
    assert "There was no traffic" in page.html(empty)
    assert list(told.lines(empty))


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (0.4, 1), (1, 1), (3, 5), (10, 10), (11, 20), (501, 1000)]
)
def test_axes_end_at_round_numbers(value: float, top: float) -> None:
    """The top of an axis is 1, 2 or 5 times a power of ten, and not below the value."""
    assert chart.nice(value) == top


def test_names_of_marks_do_not_cover_each_other() -> None:
    """Marks that are close together are named in rows of their own."""
    lines = [Line(at_s=at, kind="fault", text="something long") for at in (4.0, 4.1, 4.2, 9.9)]
    rows = re.findall(r'<text class="name fault" x="[0-9.]+" y="(\d+)"', chart.axis(lines, 10))
    assert len(set(rows[:3])) == 3


def test_the_headline_says_what_became_of_requests() -> None:
    """One sentence: how many were answered, and what was missed."""
    assert headline(report()) == "90 of 90 requests were answered well; nothing was lost"
    assert headline(report(broken=2)).endswith("missed: broken")
