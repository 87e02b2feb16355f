"""Claude Code as an agent: `claude -p --output-format stream-json --verbose`, the prompt on standard input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from attrs import field, frozen

from supervise.agents.command import run_command
from supervise.agents.protocol import AgentRun
from supervise.agents.stream_json import StreamJsonParser
from supervise.codec import register_agent
from supervise.errors import SpecError
from supervise.rules import rules

__all__ = ["ClaudeAgent"]

_r = rules(SpecError)


def _command(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return value if value is None else (value,) if isinstance(value, str) else tuple(value)


def _texts(value: Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise SpecError(f"a list of texts is wanted, not the text {value!r}: write [{value!r}]")
    return tuple(value)


_maybe_text = _r.check(
    lambda v: v is None or (isinstance(v, str) and bool(v) and "\0" not in v), "a text without NUL, or None"
)
_all_texts = _r.check(
    lambda v: v is None or all(isinstance(t, str) and "\0" not in t for t in v), "a list of texts without NUL"
)


def _text() -> Any:
    return field(default=None, validator=_maybe_text)


@final
@frozen(kw_only=True)
class ClaudeAgent:
    """Runs Claude Code on the job's prompt.

    Attributes:
        command: program and first arguments; `None` takes `Settings.agent.command`.
        model: model or alias.
        max_turns: turns after which the run fails with `max_turns`.
        max_budget_usd: dollars after which the run fails with `budget`.
        allowed_tools: tools that need no permission, such as `Edit` or `Bash(git *)`.
        permission_mode: `acceptEdits`, `plan`, `dontAsk`, …
        resume: id of a session to go on with.
        session_id: id (a UUID) for a new session.
        system_prompt_file: file that replaces the system prompt.
        append_system_prompt_file: file that is added to the system prompt.
        extra_args: further arguments, as they are.

    Raises:
        SpecError: a bad value; the message names field, value and rule.
    """

    command: tuple[str, ...] | None = field(
        default=None,
        converter=_command,
        validator=[_all_texts, _r.check(lambda v: v is None or bool(v), "a program and its arguments, or None")],
    )
    model: str | None = _text()
    max_turns: int | None = field(
        default=None,
        validator=_r.check(
            lambda v: v is None or (isinstance(v, int) and not isinstance(v, bool) and v >= 1), "1 or more, or None"
        ),
    )
    max_budget_usd: float | None = field(
        default=None,
        validator=_r.check(lambda v: v is None or (isinstance(v, int | float) and v > 0), "dollars above 0, or None"),
    )
    allowed_tools: tuple[str, ...] = field(default=(), converter=_texts, validator=_all_texts)
    permission_mode: str | None = _text()
    resume: str | None = _text()
    session_id: str | None = _text()
    system_prompt_file: str | None = _text()
    append_system_prompt_file: str | None = _text()
    extra_args: tuple[str, ...] = field(default=(), converter=_texts, validator=_all_texts)

    @property
    def name(self) -> str:
        """See `Agent.name`."""
        return "claude"

    def arguments(self) -> tuple[str, ...]:
        """The command line after the program."""
        argv = ["-p", "--output-format", "stream-json", "--verbose"]
        options: list[tuple[str, Any]] = [
            ("--model", self.model),
            ("--max-turns", self.max_turns),
            ("--max-budget-usd", self.max_budget_usd),
            ("--permission-mode", self.permission_mode),
            ("--resume", self.resume),
            ("--session-id", self.session_id),
            ("--system-prompt-file", self.system_prompt_file),
            ("--append-system-prompt-file", self.append_system_prompt_file),
            # One word: the option takes any number of words, and would take those that follow, too.
            ("--allowedTools", ",".join(self.allowed_tools) or None),
        ]
        for option, value in options:
            if value is not None:
                argv += [option, f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)]
        return (*argv, *self.extra_args)

    async def run(self, run: AgentRun) -> None:
        """See `Agent.run`."""
        command = self.command or run.settings.command
        await run_command(
            run,
            (*command, *self.arguments()),
            StreamJsonParser(max_line=run.settings.max_line),
            stdin=run.spec.prompt.encode("utf-8", "replace"),
        )


register_agent(ClaudeAgent, "claude")
