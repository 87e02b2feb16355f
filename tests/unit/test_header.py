"""Headers of scripts as people write them, in six languages, and each way to write one wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from supervise.catalogue.header import TASK_CLASSES, Header, parse, render

SH = """\
#!/bin/sh
# name: backup-db
# description: Dump the database
#   and copy it to the vault.
# inputs: DATABASE_URL; the first argument is a date
# outputs: backup-DATE.sql.gz
# tags: database, backup
# timeout: 900
# Copyright: whoever wrote it
# is not part of the value above, nor of any other.

set -eu
# tags: code, has, begun
pg_dump "$DATABASE_URL" | gzip
"""

BASH = """\
#!/usr/bin/env bash
#
# ----------------------------------------
# Name:        rotate-logs
# Description: Rotate logs: all of them.
#
#   Those of yesterday, too.
# ----------------------------------------
# Task-Class:  FAST_SCRIPT
# Tags:        logs nightly

set -o pipefail
"""

PY = '''\
#!/usr/bin/env python3
# -*- coding: utf-8 -*-
# name: summarize
# description: Sum up a report — in words
# inputs: a report
#
# on standard input
# outputs: three lines
# tags: [llm, report]
# task_class: llm-lite
"""A docstring is code.

# timeout: 5
"""
import sys
'''

RB = """\
# frozen_string_literal: true

# name: release
# description: Cut a release
# timeout: 2m
# name: another
require "json"
"""

PL = """\
#!/usr/bin/perl -w
## name: grep-mail
## description: Find letters: by sender
## outputs: their ids
use strict;
# inputs: too late
"""

JS = """\
#!/usr/bin/env node
// name: build-site
// description: Build the site
//   with all its pages.
// inputs: content/
// outputs: public/
// tags: site,web pages , site
// task class: Medium Script
/* tags: this is no line comment */
'use strict';
"""

REAL = {
    "sh": (
        SH,
        Header(
            name="backup-db",
            description="Dump the database and copy it to the vault.",
            inputs="DATABASE_URL; the first argument is a date",
            outputs="backup-DATE.sql.gz",
            tags=("database", "backup"),
            timeout=900.0,
        ),
    ),
    "bash": (
        BASH,
        Header(
            name="rotate-logs",
            description="Rotate logs: all of them. Those of yesterday, too.",
            tags=("logs", "nightly"),
            task_class="FAST_SCRIPT",
        ),
    ),
    "py": (
        PY,
        Header(
            name="summarize",
            description="Sum up a report — in words",
            inputs="a report on standard input",
            outputs="three lines",
            tags=("llm", "report"),
            task_class="LLM_LITE",
        ),
    ),
    "rb": (
        RB,
        Header(
            name="release",
            description="Cut a release",
            timeout=120.0,
            problems=("line 6: name is said again; line 3 counts",),
        ),
    ),
    "pl": (PL, Header(name="grep-mail", description="Find letters: by sender", outputs="their ids")),
    "js": (
        JS,
        Header(
            name="build-site",
            description="Build the site with all its pages.",
            inputs="content/",
            outputs="public/",
            tags=("site", "web pages"),
            task_class="MEDIUM_SCRIPT",
        ),
    ),
}


@pytest.mark.parametrize("language", REAL)
def test_a_real_header_is_understood(language: str) -> None:
    text, header = REAL[language]
    assert parse(text) == header


@pytest.mark.parametrize("language", REAL)
def test_line_ends_of_windows_and_a_byte_order_mark_change_nothing(language: str) -> None:
    text, header = REAL[language]
    assert parse("\ufeff" + text.replace("\n", "\r\n")) == header


@pytest.mark.parametrize("language", REAL)
def test_a_header_that_was_cut_off_after_its_end_is_whole(language: str) -> None:
    text, header = REAL[language]
    assert parse(text, whole=False) == header


@pytest.mark.parametrize(
    ("text", "description"),
    [
        ("# description: a\n# b\n", "a b"),
        ("# description:\n# a\n", "a"),
        ("# description: a\n\n# b\n", "a"),  # an empty line ends a value
        ("\n\n# description: a\n", "a"),  # and not the header
        ("# description: a\n#\n# b\n", "a b"),
        ("# description: a\n####\n# b\n", "a b"),
        ("# description: a\n# ====\n# b\n", "a b"),
        ("# description: a\n# - b\n", "a - b"),
        ("# description: a\n# see: b\n# c\n", "a"),  # an unknown key ends a value
        ("# description: a\n# name: n\n# b\n", "a"),  # what goes on is the name
        ("# description: a\nx=1\n# b\n", "a"),
        ("# description: http://a: b\n", "http://a: b"),
        ("#description:a\n", "a"),
        ("  # description : a\n", "a"),
        ("# DESCRIPTION:\ta \t b\n", "a b"),
        ("// description: a\n# b\n", "a b"),
        ("#!/bin/sh\n#! description: a\n", ""),
        ("#!/bin/sh", ""),
        ("#! description: a", ""),
        ("/ description: a\n", ""),
        ("echo\n# description: a\n", ""),
        ('"""\n# description: a\n', ""),
        ("# description: a\n# description: b\n# c\n", "a"),
        ("# description: \u2028\n", ""),
    ],
)
def test_what_belongs_to_a_value(text: str, description: str) -> None:
    assert parse(text).description == description


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("a, b", ("a", "b")),
        ("a b", ("a", "b")),
        ("a b,", ("a b",)),
        ("[a, b]", ("a", "b")),
        ("[a b]", ("a", "b")),
        ("[]", ()),
        (" , ,", ()),
        ("a, a,A", ("a", "A")),
        ("a,\n# b", ("a", "b")),
        ("[[a, b]]", ("[a", "b]")),
        ("a]", ("a]",)),
    ],
)
def test_tags_are_divided(text: str, tags: tuple[str, ...]) -> None:
    assert parse(f"# tags: {text}\n").tags == tags


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("90s", 90.0),
        ("90 seconds", 90.0),
        ("2m", 120.0),
        ("5 min", 300.0),
        ("1h", 3600.0),
        ("1.5 H", 5400.0),
        (".5", 0.5),
        ("1e3", 1000.0),
    ],
)
def test_a_timeout_has_a_unit_or_is_in_seconds(text: str, seconds: float) -> None:
    header = parse(f"# task_class: FAST_SCRIPT\n# timeout: {text}\n")
    assert (header.timeout, header.limit, header.problems) == (seconds, seconds, ())


@pytest.mark.parametrize(
    "text",
    [
        *("soon", "0", "-5", "0s", "1e999", "9e307h", "nan", "inf", "5 d", "1:30", "٣", "1_0", "5s # more", "1 2"),
        *("5.", ".", "1.2.3", "1e", "1e+", "1em", "e5", "5 ss"),
    ],
)
def test_a_timeout_that_is_none_is_a_problem_with_its_line_and_the_rule(text: str) -> None:
    header = parse(f"#!/bin/sh\n# task_class: FAST_SCRIPT\n# timeout: {text}\n")
    assert header.timeout is None
    assert header.problems == (f"line 3: timeout is {text!r}, but must be seconds above 0, as 90, 90s, 2m or 1h",)
    assert header.limit_problem == header.problems[0]


def test_each_task_class_has_its_limit() -> None:
    assert TASK_CLASSES == {"FAST_SCRIPT": 120, "MEDIUM_SCRIPT": 600, "LLM_LITE": 480, "LLM_HEAVY": 1200}
    for name, seconds in TASK_CLASSES.items():
        assert parse(f"# task_class: {name}").limit == seconds
    assert parse("# name: x").limit is None


def test_an_unknown_task_class_is_a_problem_that_tells_the_nearest() -> None:
    header = parse("# task_class: MEDIUM_SCRPT\n")
    assert header.task_class is None
    assert header.problems == (
        "line 1: task_class is 'MEDIUM_SCRPT', but must be one of FAST_SCRIPT, MEDIUM_SCRIPT, LLM_LITE, LLM_HEAVY; "
        "did you mean MEDIUM_SCRIPT?",
    )
    assert header.limit_problem == header.problems[0]
    assert "did you mean" not in parse("# task_class: 12345\n").limit_problem


def test_where_the_timeout_is_said_an_unknown_task_class_is_in_nobodys_way() -> None:
    header = parse("# timeout: 5\n# task_class: SLOW\n")
    assert (header.limit, header.limit_problem, len(header.problems)) == (5.0, "", 1)


@pytest.mark.parametrize("name", ["-rf", "x" * 101, "a\x1b[2Jb", "a\u202eb", "a\0"])
def test_a_name_that_cannot_be_typed_is_a_problem(name: str) -> None:
    header = parse(f"# name: {name}\n")
    assert header.name == ""
    assert "line 1: name is" in header.problems[0]
    assert header.problems[0].isprintable()


def test_a_header_without_end_is_told_if_the_text_was_cut() -> None:
    text = "# description: a\n" + "# b\n" * 9
    assert parse(text).problems == ()
    assert "too long" in parse(text, whole=False).problems[0]


@pytest.mark.parametrize("language", REAL)
@pytest.mark.parametrize("comment", ["#", "//"])
def test_what_is_rendered_is_parsed_back(language: str, comment: str) -> None:
    header = REAL[language][1]
    again = parse("#!/bin/sh\n" + render(header, comment) + "echo\n")
    assert again.problems == ()
    assert [getattr(again, name) for name in ("name", "description", "inputs", "outputs", "tags", "limit")] == [
        getattr(header, name) for name in ("name", "description", "inputs", "outputs", "tags", "limit")
    ]


def test_the_example_of_the_page_about_scripts_is_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text()
    example = page.split("```sh\n", 1)[1].split("```", 1)[0]
    header = parse(example)
    assert header.problems == ()
    assert all((header.name, header.description, header.inputs, header.outputs, header.tags, header.limit))


def test_a_timeout_that_is_too_long_to_be_one_is_a_problem() -> None:
    assert parse(f"# timeout: {'1' * 64}\n").timeout == float("1" * 64)
    header = parse(f"# timeout: {'1' * 65}\n")
    assert header.timeout is None
    assert "but must be seconds" in header.limit_problem


#: Of any length, and each of a kind that a search which tries again and again would be slow with.
HOSTILE: dict[str, Callable[[int], str]] = {
    "digits": lambda n: "# timeout: " + "1" * n + "!",
    "digits around a point": lambda n: "# timeout: " + "1" * (n // 2) + "." + "1" * (n // 2) + "!",
    "an exponent": lambda n: "# timeout: 1e" + "1" * n + "!",
    "a far unit": lambda n: "# timeout: 1" + " " * n + "s",
    "a number in pieces": lambda n: "# timeout: 1\n" + "# 1\n" * (n // 4),
    "slashes": lambda n: "/" * n,
    "hashes": lambda n: "#" * n,
    "blanks": lambda n: " " * n + "x",
    "blanks in a comment": lambda n: "# " + " \t" * (n // 2) + "x",
    "no colon": lambda n: "# " + "x" * n,
    "a long key": lambda n: "# " + "a-_ " * (n // 4) + ":",
    "keys": lambda n: "# a:\n# name: x\n" * (n // 14),
    "continuations": lambda n: "# name: a\n" + "# b\n" * (n // 4),
    "a rule": lambda n: "# name: a\n#" + "-" * n + "x",
    "blanks after a rule": lambda n: "# name: a\n# ---" + " " * n + "x",
    "commas": lambda n: "# tags: " + "," * n,
    "tags": lambda n: "# tags: " + ",".join(map(str, range(n // 5))),
    "brackets": lambda n: "# tags: " + "[" * (n // 2) + "]" * (n // 2),
    "a class": lambda n: "# task_class: " + "A_" * (n // 2),
    "a class that grows": lambda n: "# task_class: " + "ß" * n,
    "control characters": lambda n: "# name: " + "\x1b" * n,
    "line ends": lambda n: "\r\n" * (n // 2),
}


@pytest.mark.parametrize("shape", HOSTILE)
def test_no_header_takes_long(shape: str) -> None:
    """One that does would hold up everybody: matching lets no other thread run. They take some milliseconds."""
    for size in (4 * 1024, 16 * 1024):  # no more of a file is read
        began = time.thread_time()
        parse(HOSTILE[shape](size))
        assert time.thread_time() - began < 0.5
