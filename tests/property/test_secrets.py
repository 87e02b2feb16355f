"""A masked stream never shows a secret, however the text is cut, and changes nothing else."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from supervise.secrets import MASK, SHORTEST, Masker

# Of few letters, so that secrets overlap, repeat and hold each other. "*" is left out: of a secret such as
# "***a" the mask itself could complete a copy, which tells nobody anything.
letters = st.sampled_from('ab"/é\\')
any_letter = st.characters(exclude_characters="*", exclude_categories=["Cs"])
secrets = st.text(letters, min_size=SHORTEST, max_size=9) | st.text(any_letter, min_size=SHORTEST, max_size=30)
fillers = st.text(letters, max_size=12) | st.text(any_letter, max_size=30)


def forms(secret: str) -> set[bytes]:
    return {
        secret.encode(),
        json.dumps(secret)[1:-1].encode(),
        json.dumps(secret, ensure_ascii=False)[1:-1].encode(),
    }


@st.composite
def chunked(draw: st.DrawFn, text: bytes) -> list[bytes]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


@st.composite
def leaks(draw: st.DrawFn) -> tuple[list[str], bytes, list[bytes]]:
    """Secrets, a text that holds some of them (plain and escaped), and a cut of it."""
    hidden = draw(st.lists(secrets, min_size=1, max_size=3))
    parts: list[bytes] = []
    for _ in range(draw(st.integers(1, 4))):
        parts.append(draw(fillers).encode())
        parts.append(draw(st.sampled_from(sorted(forms(draw(st.sampled_from(hidden)))))))
    parts.append(draw(fillers).encode())
    text = b"".join(parts)
    return hidden, text, draw(chunked(text))


@given(leaks())
def test_no_secret_leaves_the_stream(leak: tuple[list[str], bytes, list[bytes]]) -> None:
    hidden, _, chunks = leak
    stream = Masker(hidden).stream()
    shown = b"".join([*(stream.feed(chunk) for chunk in chunks), stream.close()])
    for secret in hidden:
        for form in forms(secret):
            assert form not in shown
    assert MASK.encode() in shown


@given(leaks())
def test_the_cuts_make_no_difference(leak: tuple[list[str], bytes, list[bytes]]) -> None:
    hidden, text, chunks = leak
    stream = Masker(hidden).stream()
    shown = b"".join([*(stream.feed(chunk) for chunk in chunks), stream.close()])
    assert shown.decode() == Masker(hidden).text(text.decode())


@given(st.lists(secrets, max_size=3), st.binary(max_size=60), st.data())
def test_what_holds_no_secret_is_unchanged(hidden: list[str], text: bytes, data: st.DataObject) -> None:
    assume(not any(form in text for secret in hidden for form in forms(secret)))
    stream = Masker(hidden).stream()
    assert b"".join([*map(stream.feed, data.draw(chunked(text))), stream.close()]) == text


@given(leaks())
def test_what_is_held_back_is_shorter_than_the_longest_secret(leak: tuple[list[str], bytes, list[bytes]]) -> None:
    hidden, _, chunks = leak
    # "/" may be escaped, too: one byte more for each.
    longest = max(len(form) + form.count(b"/") for secret in hidden for form in forms(secret))
    stream = Masker(hidden).stream()
    for chunk in chunks:
        stream.feed(chunk)
        assert len(stream._held) < longest


@given(leaks())
def test_text_is_masked_too(leak: tuple[list[str], bytes, list[bytes]]) -> None:
    hidden, text, _ = leak
    shown = Masker(hidden).text(text.decode())
    assert not any(form.decode() in shown for secret in hidden for form in forms(secret))
