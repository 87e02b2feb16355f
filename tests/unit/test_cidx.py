"""What the indexer's lines mean, and when its reconcile is believed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervise.index.cidx import Cidx, Line, ReconcileVerdict, meaning, says_already_running
from supervise.model import ExitStatus

OK = ExitStatus(code=0)


def test_the_command_lines() -> None:
    tool = Cidx(("uvx", "cidx"))
    assert tool.start == ("uvx", "cidx", "start")
    assert tool.stop == ("uvx", "cidx", "stop")
    assert tool.fix_config == ("uvx", "cidx", "fix-config", "--force")
    assert tool.watch == ("uvx", "cidx", "watch")
    assert tool.reconcile == ("uvx", "cidx", "index", "--reconcile")


@pytest.mark.parametrize(
    "line",
    [
        "Watchdog observer started monitoring: /home/me/project",
        "2026-11-21 05:43:07,120 - code_indexer.watch - INFO - Watchdog observer started monitoring: /w",
        "\x1b[32mWatchdog observer started monitoring:\x1b[0m \x1b[1m/w\x1b[0m",
        "👀 \x1b[1;38;5;42mStarting git-aware watch on\x1b[0m /w",
        "Starting git-aware watch on main",
        "preparing… 99%\rWatchdog observer started monitoring: /w",
    ],
)
def test_readiness(line: str) -> None:
    assert meaning(line) is Line.READY


@pytest.mark.parametrize(
    "line",
    [
        "ERROR embedding service answered 401",
        "ERROR: no such collection",
        "ERROR:code_indexer.services:upsert failed",
        "ERROR    code_indexer.services:voyage.py:112 HTTP 500",
        "  ERROR - upsert failed",
        "[ERROR] upsert failed",
        "❌ ERROR upsert failed",
        "\x1b[31mERROR\x1b[0m upsert failed",
        "2026-11-21 05:43 ERROR upsert failed",
        "2026-11-21 05:43:07,120 ERROR upsert failed",
        "2026-11-21T05:43:07Z ERROR upsert failed",
        "2026-11-21T05:43:07.120+00:00 ERROR upsert failed",
        "2026-11-21T05:43:07 [ERROR] upsert failed",
        "2026-11-21 05:43:07Z ERROR upsert failed",
        "[05:43:07] ERROR    upsert failed",
        "2026-11-21 05:43:07,120 - code_indexer.services - ERROR - upsert failed",
        "code_indexer - ERROR - src/a.py: HTTP 500",
        "ERROR",
        "indexing 40%\rERROR upsert failed",
    ],
)
def test_errors(line: str) -> None:
    assert meaning(line) is Line.ERROR


@pytest.mark.parametrize(
    "line",
    [
        "",
        "indexed ERROR.md",
        "ERROR.md",
        "  - ERROR.md: 3 chunks",
        "✓ ERROR/handler.py",
        "- ERROR-codes.txt",
        "0 errors",
        "Errors: 0",
        "ERRORS: 0",
        "No ERROR was found",
        "src/error.py",
        "src/cancelled.py",
        "processing ERROR_CODES.h",
        "Started watching",
        "INFO retrying after error",
        "Files processed: 12",
    ],
)
def test_innocent_lines(line: str) -> None:
    assert meaning(line) is Line.OTHER


def test_already_running() -> None:
    assert says_already_running("ℹ️ The daemon is Already Running (pid 12)")
    assert not says_already_running("Daemon mode not enabled")


# --- the verdict -------------------------------------------------------------------------------------------


def against(status: ExitStatus | None, *lines: str) -> str:
    verdict = ReconcileVerdict()
    for line in lines:
        verdict.line(line)
    return verdict.against(status)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["All files are up to date"],
        ["indexing 0 files", "Files processed: 0"],
        ["Files processed: 0"],
        ["Reconcile: indexing 5 files", "Files processed: 5"],
        ["indexing 1,234 files", "Files processed: 1,234"],
        ["\x1b[1mindexing 5 files\x1b[0m", "✅ Files processed: \x1b[32m5\x1b[0m"],
        ["indexing 5 files", "Files processed: 2\rFiles processed: 5"],
        ["indexing 5 files", "Files processed: 5", "0 errors", "indexed src/cancelled.py", "cancelled.txt: 2 chunks"],
        ["indexing 5 files", "Files processed: 6"],
    ],
)
def test_a_reconcile_that_is_believed(lines: list[str]) -> None:
    assert against(OK, *lines) == ""


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["indexing 5 files", "Files processed: 0"], "it was to index 5 files and says that it processed 0"),
        (["indexing 5 files"], "it was to index 5 files and says that it processed 0"),
        (["indexing 1,234 files", "Files processed: 1,233"], "1234 files and says that it processed 1233"),
        (["indexing 5 files\rFiles processed: 4"], "5 files and says that it processed 4"),
        (["Indexing cancelled"], "it says that it was cancelled"),
        (["🛑 Canceled by user"], "it says that it was cancelled"),
        (["indexing 5 files … cancelled", "Files processed: 5"], "it says that it was cancelled"),
        (["ERROR a.py: HTTP 500"], "it printed errors: ERROR a.py: HTTP 500"),
        (["ERROR a.py", "fine", "ERROR b.py", "ERROR c.py"], "it printed errors: ERROR a.py (and 2 more)"),
        (["indexing 5 files", "ERROR cancelled", "Files processed: 5"], "it printed errors: ERROR cancelled"),
    ],
)
def test_an_exit_code_0_that_is_contradicted(lines: list[str], why: str) -> None:
    assert why in against(OK, *lines)


@pytest.mark.parametrize("lines", [[], ["indexing 5 files", "Files processed: 5"]])
def test_no_good_output_mends_a_bad_end(lines: list[str]) -> None:
    assert against(ExitStatus(code=1), *lines) == "it ended with exit code 1"
    assert against(ExitStatus(signal="SIGKILL"), *lines) == "it ended with signal SIGKILL"
    assert against(None, *lines) == "it did not end in time"
    assert against(ExitStatus(), *lines) != ""


def test_a_bad_end_is_told_with_its_first_error() -> None:
    assert against(ExitStatus(code=1), "ERROR no key", "ERROR more") == "it ended with exit code 1: ERROR no key"
    assert len(against(OK, "ERROR " + "x" * 10_000)) < 300


#: Lines that look for trouble: numbers without end, commas alone, escapes cut short.
nasty = st.one_of(
    st.text(max_size=200),
    st.lists(
        st.sampled_from(
            [
                *("indexing ", "Files processed: ", "9" * 5000, ",", "²", "٣", " files", "ERROR", " - ", "cancelled"),
                *("\r", "\x1b[", "31m", "T", "Z", "0", "\ud800", "Watchdog observer started monitoring:", "\x00"),
            ]
        ),
        max_size=12,
    ).map("".join),
)


@settings(deadline=None)
@given(st.lists(nasty, max_size=5), st.none() | st.builds(ExitStatus, code=st.integers(0, 255)))
def test_no_line_raises(lines: list[str], status: ExitStatus | None) -> None:
    assert all(meaning(line) in Line for line in lines)
    assert isinstance(against(status, *lines), str)
    assert says_already_running("".join(lines)) in (True, False)


@settings(deadline=None)
@given(st.text(alphabet="0123456789 -:T,", max_size=3000))
def test_a_long_line_takes_no_long_time(line: str) -> None:
    assert meaning(line * 20) is Line.OTHER
