"""Headers: no text makes the parser raise, and what it has understood can be written and read again."""

from __future__ import annotations

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from supervise.catalogue.header import KEYS, TASK_CLASSES, Header, parse, render

#: Lone surrogates, too: a file's name may bring them.
ANY = st.text(st.characters(codec=None, exclude_categories=()), max_size=40)

#: Pieces of headers, right and wrong.
PIECES = st.one_of(
    ANY,
    st.sampled_from(
        ["#", "//", "#!", ":", ",", "[", "]", "\n", "\r\n", "\r", "\ufeff", "\0", "\u2028", " ", "- ", "1e"]
    ),
    st.sampled_from([f"\n# {key}: " for key in KEYS]),
    st.sampled_from([*TASK_CLASSES, "timeout: 5", "Task Class : llm", "90s", "# ===="]),
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)


def line(text: str) -> str:
    return " ".join(text.split())


LINES = ANY.map(line)
NAMES = st.text(st.characters(), max_size=30).map(line).filter(lambda text: text.isprintable() and text[:1] != "-")
#: Words, spaces and what tags are divided by, so that they meet often.
TAG = st.one_of(st.text("ab []", min_size=1, max_size=5), ANY).map(lambda text: line(text.replace(",", " ")))
TAGS = st.lists(TAG.filter(bool), max_size=3, unique=True).map(tuple)
HEADERS = st.builds(
    Header,
    name=NAMES,
    description=LINES,
    inputs=LINES,
    outputs=LINES,
    tags=TAGS,
    timeout=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    task_class=st.sampled_from([None, *TASK_CLASSES]),
)


@given(TEXTS, st.booleans())
def test_no_text_makes_the_parser_raise(text: str, whole: bool) -> None:
    header = parse(text, whole=whole)
    assert all(problem.isprintable() for problem in header.problems)
    assert header.limit is None or header.limit > 0
    assert not header.limit_problem or header.limit_problem in header.problems
    for value in (header.name, header.description, header.inputs, header.outputs, *header.tags):
        assert value == line(value)


@given(HEADERS, st.sampled_from(["#", "//"]))
def test_a_header_that_is_rendered_is_parsed_back(header: Header, comment: str) -> None:
    assert parse(render(header, comment)) == header
    assert parse("#!/bin/sh\r\n" + render(header, comment).replace("\n", "\r\n") + "echo: 1\n") == header


@given(TEXTS)
def test_what_was_parsed_can_be_rendered_and_parsed_again(text: str) -> None:
    header = evolve(parse(text), problems=(), limit_problem="")
    assert parse(render(header)) == header
