"""What a type checker says to those who use the library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_a_type_checker_allows_what_the_converters_do() -> None:
    pytest.importorskip("mypy")
    program = """
from supervise import AgentReport, AgentSettings, IndexSettings, Settings
from supervise.settings import HttpSettings, WorkerSettings
AgentSettings(command="x", pass_env=["A"])
IndexSettings(command="cidx", voyage_api_key="x")
Settings(state_dir="/tmp/x", http=HttpSettings(token="x"))
WorkerSettings(root="/x", workspaces=["/x"], lock_file=None)
AgentReport(failure_kind="auth")
Settings(state_dir=7)
"""
    # A process of its own: mypy raises the recursion limit of the one that it runs in.
    words = ("--strict", "--config-file=", f"--cache-dir={os.devnull}", "-c", program.strip())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert [line.partition(":")[2] for line in done.stdout.splitlines()[:-1]] == [
        '8: error: Argument "state_dir" to "Settings" has incompatible type "int"; '
        'expected "str | PathLike[str]"  [arg-type]'
    ]
