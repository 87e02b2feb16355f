"""Secrets do not show themselves, and are found in what others print."""

from __future__ import annotations

import json
import logging
import traceback

import pytest

from supervise.secrets import MASK, Masker, Secret, is_secret_name, secret_values

KEY = "sk-ant-0123456789"


# --- Secret ------------------------------------------------------------------------------------------------


def test_a_secret_shows_itself_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    secret = Secret(KEY)
    logging.getLogger("test").warning("key %s %r", secret, [secret])
    shown = [str(secret), repr(secret), f"{secret} {secret!r} {secret:>20}", f"{[secret]} {(secret,)}", caplog.text]
    assert not any(KEY in text for text in shown)
    assert f"{secret:>5}" == "  ***"
    assert secret.reveal() == KEY


def test_secrets_are_compared_by_value_with_secrets_only() -> None:
    assert Secret(KEY) == Secret(KEY)
    assert hash(Secret(KEY)) == hash(Secret(KEY))
    assert Secret(KEY) != Secret("other")
    assert Secret(KEY) != KEY
    assert Secret(KEY)
    assert not Secret("")


def test_a_secret_is_a_text_and_the_refusal_does_not_show_it() -> None:
    with pytest.raises(TypeError) as caught:
        Secret(KEY.encode())  # type: ignore[arg-type]  # a bad value, on purpose
    assert KEY not in "".join(traceback.format_exception_only(caught.value))


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ANTHROPIC_API_KEY",
        "VOYAGE_API_KEY",
        "CLAUDE_CODE_OAUTH_TOKEN",
        "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_CUSTOM_HEADERS",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "PGPASSWORD",
        "SENTRY_DSN",
        "OPENAI_APIKEY",
        "secret",
        "GOOGLE_CREDENTIALS",
        "SSH_PASSPHRASE",
        "SUPERVISE_HTTP__TOKEN",
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PATH", "HOME", "MONKEY", "KEYBOARD", "AUTHOR", "LANG", "PWD", "SECRETARY"])
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


def test_values_that_hide_nothing_are_no_secrets() -> None:
    environment = {"API_KEY": KEY, "MAX_THINKING_TOKENS": "32000", "SKIP_BEDROCK_AUTH": "true", "HOME": "/root"}
    assert secret_values(environment) == {KEY}


# --- Masker ------------------------------------------------------------------------------------------------


def test_text_is_masked() -> None:
    masker = Masker([Secret(KEY), "other-secret"])
    assert masker.text(f"{KEY} and other-secret, {KEY}{KEY}") == "*** and ***, ******"
    assert masker.text("nothing here") == "nothing here"


def test_short_values_are_left_alone() -> None:
    assert Masker(["abc", ""]).text("abcabc") == "abcabc"
    assert Masker().text("abc") == "abc"
    assert Masker().stream().feed(b"abc") == b"abc"


@pytest.mark.parametrize("secret", ['p"ss\\word', "pä/ss/wörd", "tab\tand\nline", "snow☃/man", "🔑🔑🔑🔑", "a/b/c/d"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("slashes", [True, False])
def test_json_escaped_forms_are_masked(secret: str, ascii_only: bool, slashes: bool) -> None:
    line = json.dumps({"text": f"<{secret}>"}, ensure_ascii=ascii_only)
    line = line.replace("/", r"\/") if slashes else line
    masker = Masker([secret])
    stream = masker.stream()
    assert json.loads(masker.text(line)) == {"text": f"<{MASK}>"}
    assert json.loads(stream.feed(line.encode()) + stream.close()) == {"text": f"<{MASK}>"}


def test_the_longest_secret_wins() -> None:
    masker = Masker(["inner", "outer-inner-outer"])
    assert masker.text("outer-inner-outer inner") == "*** ***"
    stream = masker.stream()
    # "inner" must not be replaced before it is known whether it is a part of the longer one.
    shown = [stream.feed(b"outer-inner"), stream.feed(b"-outer"), stream.feed(b" outer-inner"), stream.close()]
    assert b"".join(shown) == b"*** outer-***"
    assert shown[0] == b""


def test_a_secret_cut_at_every_byte_is_found() -> None:
    text = f"before {KEY} after".encode()
    for cut in range(len(text)):
        stream = Masker([KEY]).stream()
        assert stream.feed(text[:cut]) + stream.feed(text[cut:]) + stream.close() == b"before *** after"


def test_what_only_begins_like_a_secret_comes_out_at_the_end() -> None:
    stream = Masker([KEY]).stream()
    assert stream.feed(b"sk-ant-") == b""
    assert stream.close() == b"sk-ant-"
    assert stream.close() == b""


def test_secrets_that_are_no_utf8_are_masked() -> None:
    undecoded = b"pass\xff\xfeword".decode("utf-8", "surrogateescape")  # as os.environ has it
    stream = Masker([undecoded, "lone\ud800surrogate"]).stream()
    assert stream.feed(b"<pass\xff\xfeword>") + stream.close() == b"<***>"
    assert Masker(["lone\ud800surrogate"]).text("<lone\ud800surrogate>") == "<***>"


def test_output_that_is_no_text_passes() -> None:
    noise = bytes(range(256)) * 3
    stream = Masker([KEY]).stream()
    assert stream.feed(noise) + stream.close() == noise
