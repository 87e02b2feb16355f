"""Log lines: for people and as JSON, each with its job, and none with a secret."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.color import ColorSystem
from rich.text import Text

from supervise import JobSpec, LogSettings, MissingExtra, Settings, run_job
from supervise.cli import told as told_module
from supervise.cli import view
from supervise.cli.told import Told, console_for
from supervise.events import AgentText, StateChanged, published
from supervise.log_context import AboutFilter, about, telling_of, telling_only_of
from supervise.observe import logs
from supervise.secrets import Masker

log = logging.getLogger("supervise.test")


@contextmanager
def written(settings: LogSettings, masker: Masker | None = None) -> Iterator[Callable[[], list[str]]]:
    """What is logged inside, as lines."""
    stream = io.StringIO()
    with apart():
        logs.configure(settings, stream=stream, masker=masker)
        yield lambda: stream.getvalue().splitlines()


@contextmanager
def apart() -> Iterator[logging.Logger]:
    """The library's logger, as it is again afterwards. Nothing goes on to pytest, whose reports cannot hold it all."""
    logger = logging.getLogger("supervise")
    before = (logger.level, logger.propagate, logger.handlers[:])
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        logger.handlers[:] = before[2]


JSON = LogSettings(format="json")


def test_a_json_line_has_time_level_logger_and_job() -> None:
    with written(JSON) as lines, telling_of(job_id="j1"), telling_of(worker="w1", task_id="t1"):
        log.warning("it is %s", "Grüße")
    [line] = map(json.loads, lines())
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "supervise.test",
        "event": "it is Grüße",
        "job_id": "j1",
        "worker": "w1",
        "task_id": "t1",
    }


def test_a_line_for_people_has_the_same() -> None:
    with written(LogSettings()) as lines, telling_of(job_id="j1"):
        log.error("gone: %s", "x")
    [line] = lines()
    assert "\x1b" not in line
    assert [word in line for word in ("error", "gone: x", "job_id=j1", "supervise.test", "Z")] == [True] * 5


def test_what_begins_anew_tells_nothing_of_the_job() -> None:
    with written(JSON) as lines, telling_of(job_id="j1", task_id="t1"):
        with telling_only_of(index="/w"):
            log.warning("shared")
        log.warning("own")
        jobs = ["j1"]
        with telling_only_of(job_id=lambda: ",".join(jobs)):
            log.warning("of one")
            jobs.append("j2")
            log.warning("of two")
            jobs.clear()
            log.warning("of none")
    shared, own, of_one, of_two, of_none = map(json.loads, lines())
    assert (shared["index"], "job_id" in shared, "task_id" in shared) == ("/w", False, False)
    assert (of_one["job_id"], of_two["job_id"], "job_id" in of_none) == ("j1", "j1,j2", False)
    assert (own["job_id"], "index" in own) == ("j1", False)


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_filter_of_another_handler_puts_no_empty_names_into_lines(format: Any) -> None:
    with written(LogSettings(format=format)) as lines:
        for handler in logging.getLogger("supervise").handlers:
            handler.addFilter(AboutFilter())
        log.warning("alone")
        with telling_of(job_id="j1"):
            log.warning("in a job")
    alone, inside = lines()
    assert [name in alone for name in ("job_id", "task_id", "worker", "index")] == [False] * 4
    assert ("j1" in inside, "task_id" in inside) == (True, False)


def test_outside_of_a_job_there_is_none() -> None:
    with written(JSON) as lines:
        with telling_of(job_id="j1"):
            pass
        log.warning("alone")
    assert "job_id" not in lines()[0]
    assert about() == {}


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_leaves_out_what_is_less(level: Any, shown: int) -> None:
    with written(LogSettings(level=level)) as lines:
        for each in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            log.log(each, "line")
    assert len(lines()) == shown


@pytest.mark.parametrize("format", ["console", "json"])
def test_no_secret_is_in_a_line_a_field_or_a_traceback(format: Any) -> None:
    secret = 'sk-"quoted"-4711'

    def fail() -> None:
        local = secret
        raise ValueError(f"refused: {local}")

    with written(LogSettings(format=format), Masker([secret])) as lines, telling_of(task_id=f"t-{secret}"):
        log.warning("key %s", secret, extra={"more": secret})
        try:
            fail()
        except ValueError:
            log.exception("it failed")
    text = "\n".join(lines())
    assert "4711" not in text
    assert "***" in text
    assert "ValueError: refused" in text.replace('\\"', "")
    assert "in fail" in text
    assert "local = " not in text.replace("local = secret", "")  # no values of variables


def test_json_stays_one_line_whatever_is_logged() -> None:
    with written(JSON) as lines:
        log.warning("two\nlines \x1b[31m %s", "\ud800", extra={"deep": {"a": [1, {2}]}})
        try:
            raise RuntimeError("x\ny")
        except RuntimeError:
            log.exception("it failed")
    first, second = map(json.loads, lines())
    assert first["event"].startswith("two\nlines")
    assert "x\ny" in second["exception"]


#: What steers a terminal, or its reader: ESC, BEL, C1, a link, the direction of writing, and lines that are none.
ODD = "\x1b[2J \x1b]0;t\x07 \x9b31m \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \u202e \r \u2028 \x85 \x0b \ud800"


def log_odd(words: str) -> None:
    """In each place where somebody's words may be."""
    with telling_of(task_id=words):
        log.warning(
            "said %s", words, extra={"more": words, "deep": {words: [words]}, f"k{words}": Path(words), "level": words}
        )
        logging.getLogger("supervise.x" + words).warning("by name")
        try:
            raise ExceptionGroup(words, [ValueError(words)])
        except ExceptionGroup as error:
            error.add_note(words)
            log.exception("it failed", stack_info=True)


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_terminal_is_not_steered(format: Any) -> None:
    stream = io.StringIO()
    with apart():
        logs.configure(LogSettings(format=format), stream=stream)
        log_odd(ODD)
        log_odd(ODD.replace("\ud800", ""))  # which is written in another way
    lines = stream.getvalue().split("\n")
    assert [line for line in lines if not line.isprintable()] == []
    assert "ValueError" in stream.getvalue()
    if format == "json":  # escaped, not lost
        assert json.loads(lines[0])["more"] == ODD


def test_on_a_terminal_colours_are_all_that_gets_there() -> None:
    words = ODD + "\n2026-01-01T00:00:00Z [error    ] forged"
    colour = re.compile(r"\x1b\[[0-9;]*m")  # ESC [ 2 J is none
    for colours in (False, True):
        stream = io.StringIO()
        console = told(LogSettings(), stream)
        console._force_terminal = colours
        console._color_system = ColorSystem.STANDARD if colours else None
        assert console.formatter is not None
        handler = told_module._Handler(console, Masker())
        with apart() as logger:
            logger.addHandler(handler)
            log_odd(words)
            log_odd("\x1b[2J\x9b31m\u202e")  # nothing in it that structlog would quote it for
        text = stream.getvalue()
        assert bool(colour.search(text)) is colours
        rest = colour.sub("", text)
        assert [line for line in rest.split("\n") if not line.isprintable()] == []
        assert not any(line.startswith("2026-01-01") for line in rest.split("\n"))


def test_every_line_that_begins_with_a_time_is_one() -> None:
    forged = "2026-01-01T00:00:00Z [error    ] forged [supervise.job] job_id=other"
    with written(LogSettings()) as lines:
        log_odd(f"x\n{forged}\r\n{forged}")
        log.error("a bug\n%s", "Traceback\n  of it")
    starts = [line for line in lines() if not line.startswith(" ")]
    assert len(starts) == 4
    assert not any(line.startswith("2026-01-01") for line in starts)
    assert lines()[-3:] == [starts[-1], "    Traceback", "      of it"]
    assert "a bug [supervise.test]" in starts[-1]
    assert "\\n2026-01-01" in starts[0]  # in a value: as it is written in a program


SECRETS = {
    "PEM": "-----BEGIN KEY-----\r\nQQ1'\"\tQQ2\x0b\r\nQQ3\r\n-----END KEY-----",
    "controls": "QQ1\tQQ2\x0b\x1bQQ3\u202eQQ4",
    "quotes": 'QQ1\'s "QQ2" \\QQ3',
}


@pytest.mark.parametrize("format", ["console", "json"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_with_line_ends_or_quotes_is_masked_everywhere(format: Any, name: str) -> None:
    stream = io.StringIO()
    with apart():
        logs.configure(LogSettings(format=format), stream=stream, masker=Masker([SECRETS[name]]))
        log_odd(SECRETS[name])
    assert stream.getvalue().count("***") >= 8
    assert "QQ" not in stream.getvalue()


@pytest.mark.parametrize("trouble", ["full", "arguments", "bug"])
def test_what_cannot_be_written_is_told_once_and_not_repeated(
    trouble: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)
    stream = io.StringIO()

    def refuse(text: str) -> int:
        raise OSError(28, f"hunter2secret {text}") if trouble == "full" else RuntimeError(text)

    if trouble != "arguments":
        stream.write = refuse  # type: ignore[method-assign]  # of this one
    with apart():
        logs.configure(JSON, stream=stream, masker=Masker(["hunter2secret"]))
        for _ in range(3):
            log.warning("hunter2secret %d", "hunter2secret" if trouble == "arguments" else 1)
    kinds = {"full": "OSError, No space left on device", "arguments": "TypeError", "bug": "RuntimeError"}
    told = f"supervise: a line of the log could not be written ({kinds[trouble]}); no more is told of such\n"
    assert capsys.readouterr().err == told


def test_a_handler_of_ones_own_gets_the_job() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(AboutFilter())
    handler.setFormatter(logging.Formatter("%(job_id)s|%(task_id)s|%(message)s"))
    log.addHandler(handler)
    try:
        with telling_of(job_id="j1"):
            log.warning("a")
        log.warning("b")
    finally:
        log.removeHandler(handler)
    assert stream.getvalue() == "j1||a\n||b\n"


def test_without_structlog_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "structlog", None)
    with pytest.raises(MissingExtra, match=r"pip install 'trio-supervise\[cli\]'"):
        logs.formatter(JSON)


async def test_a_job_and_its_threads_log_with_its_id(tmp_path: Path) -> None:
    async def play(run: Any) -> None:
        log.warning("in the agent")
        await trio.to_thread.run_sync(lambda: log.warning("in a thread"))
        raise RuntimeError("bug")

    class Agent:
        name = "own"
        run = staticmethod(play)

    settings = Settings(state_dir=tmp_path / "state", containment="process-group")
    with written(JSON) as lines:
        async with trio.open_nursery() as nursery:
            for job_id in ("one", "two"):
                spec = JobSpec(prompt="x", workspace=tmp_path, job_id=job_id, agent=Agent(), index=None)
                nursery.start_soon(lambda spec=spec: run_job(spec, settings=settings))
    found = [json.loads(line) for line in lines()]
    for words in ("in the agent", "in a thread", "the agent raised"):
        assert sorted(line["job_id"] for line in found if words in line["event"]) == ["one", "two"]


# --- on the screen of a command ----------------------------------------------------------------------------


def told(settings: LogSettings, console_stream: io.StringIO) -> Told:
    return Told(console_stream, settings, Masker(["hidden"]))


def test_what_is_said_is_logged_where_json_is_wanted() -> None:
    stream = io.StringIO()
    console = told(JSON, stream)
    view.say(console, "supervise: hidden is gone", "red")
    view.tell(console, "fine", "bold green")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["event"], first["logger"]) == ("error", "supervise: *** is gone", "supervise.cli")
    assert (second["level"], second["event"]) == ("info", "fine")


async def test_events_are_logged_where_json_is_wanted() -> None:
    stream = io.StringIO()
    events = [published(StateChanged(state="running"), time=1.0, job_id="j1")]
    events.append(published(AgentText(text="hello"), time=2.0, job_id="j1"))

    async def each() -> Any:
        for event in events:
            yield event

    await view.follow(each(), told(JSON, stream), "title")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["type"], line["who"], line["event"], line["job_id"]) for line in lines] == [
        ("state", "job", "running", "j1"),
        ("agent_text", "agent", "hello", "j1"),
    ]


@pytest.mark.parametrize("format", ["console", "json"])
def test_what_is_less_important_is_left_out(format: Any) -> None:
    stream = io.StringIO()
    console = told(LogSettings(format=format, level="warning"), stream)
    view.say(console, "a notice", "dim")
    view.say(console, "a warning", "yellow")
    view.say(console, "an error", "bold red")
    assert "a notice" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 2


def test_the_log_is_on_the_console_for_the_length_of_the_block() -> None:
    stream = io.StringIO()
    before = logging.getLogger("supervise").handlers[:]
    with console_for(stream, Settings(log=JSON), Masker()) as console:
        log.info("inside")
        console.print(Text("beside"))
    log.warning("outside")
    assert "inside" in stream.getvalue()
    assert "outside" not in stream.getvalue()
    assert logging.getLogger("supervise").handlers == before


def test_a_console_that_cannot_be_written_harms_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with apart(), console_for(Broken(), Settings(log=JSON), Masker()):
        log.warning("lost hunter2")
        log.warning("lost hunter2")
    told = capfd.readouterr().err
    assert told.count("Input/output error") == 1
    assert "hunter2" not in told
