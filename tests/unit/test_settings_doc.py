"""docs/settings.md tells of every setting as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from supervise.cli.settings_table import settings_table, with_table
from supervise.settings_sources import load_with_origins

DOC = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_document_is_current() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m supervise.cli.settings_table --write docs/settings.md"


def test_each_setting_has_its_row() -> None:
    rows = [[cell.strip(" `") for cell in line.split(" |")] for line in settings_table().splitlines()[2:]]
    _, origins = load_with_origins(environ={}, overrides={})
    assert sorted(row[0].strip("| `") for row in rows) == sorted(origins)
    for row in rows:
        assert row[1].strip("| `").startswith("SUPERVISE_")
        assert row[2].strip("| `"), row
        assert row[4].strip("| `"), row


def test_the_names_in_the_environment_are_right(tmp_path: Path) -> None:
    table = settings_table()
    values = {"SUPERVISE_INDEX__STARTUP_TIMEOUT": "5", "SUPERVISE_STATE_DIR": str(tmp_path)}
    assert all(f"`{name}`" in table for name in values)
    settings, _ = load_with_origins(environ=values, overrides={})
    assert settings.index.startup_timeout == 5.0


def test_the_examples_in_the_document_are_good(tmp_path: Path) -> None:
    text = DOC.read_text(encoding="utf-8")
    file = tmp_path / "supervise.toml"
    file.write_text(text.split("```toml\n")[1].split("```")[0])
    from_file, _ = load_with_origins(config=file, environ={"HOME": str(tmp_path)}, overrides={})
    script = text.split("```sh\n")[1].split("```")[0] + "env -0"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    environ = dict(item.decode().split("=", 1) for item in done.stdout.split(b"\0") if item)
    from_environment, _ = load_with_origins(environ=environ, overrides={})
    assert from_file == from_environment


def test_an_old_document_is_noticed_and_mended(tmp_path: Path) -> None:
    copy = tmp_path / "settings.md"
    shutil.copy(DOC, copy)
    copy.write_text(copy.read_text(encoding="utf-8").replace("| `30` |", "| `31` |"), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != with_table(copy.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "supervise.cli.settings_table", "--write", str(copy)]
    subprocess.run(command, check=True, timeout=60)
    assert copy.read_bytes() == DOC.read_bytes()


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        with_table("nothing")
