"""The example of a settings file: made of the definitions, and good as it is and with every line taken in."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from supervise.cli.settings_table import definitions, example_file, plain, toml_value
from supervise.secrets import Secret
from supervise.settings import Settings
from supervise.settings_sources import load_with_origins

#: Defaults that a file cannot say: a relative path in it is relative to the file.
RELATIVE = {"script_dirs"}


def taken_in() -> str:
    """The example with every value, which begins with "#" and no blank."""
    return re.sub(r"^#(?=\S)", "", example_file(), flags=re.MULTILINE)


def test_as_it_is_it_sets_nothing(tmp_path: Path) -> None:
    file = tmp_path / "supervise.toml"
    file.write_text(example_file(), "utf-8")
    environ = {"HOME": str(tmp_path)}
    settings, origins = load_with_origins(config=file, environ=environ, overrides={})
    assert settings == Settings(state_dir=tmp_path / ".local/state/supervise")
    assert set(origins.values()) == {"default"}


def test_with_every_line_taken_in_it_holds_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "supervise.toml"
    file.write_text(taken_in(), "utf-8")
    settings, origins = load_with_origins(config=file, environ={"HOME": str(tmp_path)}, overrides={})
    assert settings == Settings(state_dir=tmp_path / ".local/state/supervise")
    assert {name for name, origin in origins.items() if origin == "default"} == RELATIVE


def test_each_setting_is_told_with_its_help_and_unit() -> None:
    text = example_file()
    parts = {}
    for block in text.split("\n\n"):
        if found := re.search(r"^#(\w+) = (.*)|^# Default: (\w+) = ", block, re.MULTILINE):
            parts.setdefault(found[1] or found[3], []).append(" ".join(re.sub(r"(?m)^# ?", "", block).split()))
    for name, field in definitions():
        told = " ".join(parts[name.rpartition(".")[2]])
        assert " ".join(field.metadata["help"].split()) in told, name
        assert {"s": "; seconds", "B": "; bytes", "": ""}[field.metadata["unit"]] in told, name
    assert max(map(len, text.splitlines())) <= 120


def test_secrets_have_no_value() -> None:
    for name in ("voyage_api_key", "url", "token"):
        assert f'\n#{name} = ""\n' in example_file()


@pytest.mark.parametrize(
    "value",
    [
        'a "quoted" \\ back\\slash',
        "line\nend\ttab\r\x00\x01\x1f\x7f\x80",
        "ÄÖ → 😀 '''\"\"\" #[x]",
        "",
        True,
        False,
        0,
        -7,
        10**18,
        0.1,
        1e-07,
        1e300,
        5.0,
        float("inf"),
        ("a", "b, c", '"'),
        (),
        {"A B": "1", 'x"y': "=", "é.f": "\n"},
        {},
    ],
)
def test_a_value_comes_back_from_toml(value: object) -> None:
    [back] = tomllib.loads(f"x = {toml_value(value)}").values()
    assert back == (list(value) if isinstance(value, tuple) else value)
    assert type(back) is (list if isinstance(value, tuple) else type(value))


def test_paths_secrets_and_what_is_unset_are_texts_in_toml() -> None:
    assert toml_value((Path("/a b"), Path("~/x"))) == '["/a b", "~/x"]'
    assert toml_value(None) == '""'
    assert toml_value(Secret("key")) == '""'
    with pytest.raises(TypeError, match="complex"):
        toml_value(1j)


def test_what_is_shown_can_be_written_after_set(tmp_path: Path) -> None:
    pairs = {
        "jobs_max_age": ("2592000", 2592000.0),
        "kill_wait": ("0.25", 0.25),
        "agent.command": ('["a b", "c\\"d,e"]', ("a b", 'c"d,e')),
        "index.watch_enabled": ("false", False),
        "worker.root": (str(tmp_path), tmp_path),
    }
    for name, (text, value) in pairs.items():
        assert plain(value) == text
        settings, _ = load_with_origins(environ={}, overrides={name: text})
        part, _, key = name.rpartition(".")
        assert getattr(getattr(settings, part) if part else settings, key) == value


def test_nothing_steers_a_terminal() -> None:
    assert plain("a\x1b[31m") == '"a\\u001b[31m"'
    assert plain(("\x1b",)) == '["\\u001b"]'
    assert plain({"\x1b": "x"}) == '{"\\u001b": "x"}'
