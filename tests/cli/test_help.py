"""The help: each command names its options and shows an example; nobody is left without a hint."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

from supervise.cli import app
from tests.cli.conftest import Cli

COMMANDS = {
    "run": app.run,
    "demo": app.demo,
    "doctor": app.doctor,
    "worker": app.worker,
    "submit": app.submit,
    "logs": app.logs,
    "dlq list": app.dlq_list,
    "dlq show": app.dlq_show,
    "dlq retry": app.dlq_retry,
    "dlq drop": app.dlq_drop,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_names_every_option_and_an_example(cli: Cli, name: str) -> None:
    done = cli.do(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    for parameter in inspect.signature(COMMANDS[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            option = {"every": "all"}.get(parameter.name, parameter.name)
            assert f"--{option.replace('_', '-')} " in done.out
    assert f"Example: supervise {name} " in done.out
    assert "124 timed out" in done.out


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_alone_it_lists_the_commands(cli: Cli, words: list[str]) -> None:
    done = cli.do(*words)
    assert (done.code, done.err) == (0, "")
    for name in COMMANDS:
        assert f" {name.split()[0]} " in done.out
    assert "Example: supervise demo" in done.out


def test_the_commands_for_dead_letters_are_listed(cli: Cli) -> None:
    done = cli.do("dlq", "--help")
    assert (done.code, done.err) == (0, "")
    for name in ("list", "show", "retry", "drop"):
        assert f" {name} " in done.out


def test_the_version_is_told(cli: Cli) -> None:
    done = cli.do("--version")
    assert (done.code, done.out, done.err) == (0, importlib.metadata.version("trio-supervise") + "\n", "")


def test_a_small_alphabet_is_no_error(cli: Cli) -> None:
    done = cli.do("run", "--help", env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert "dontAsk, ..." in done.out
