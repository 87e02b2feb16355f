"""`import supervise` is cheap, and the base needs none of the extras."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What the extras bring. typed_settings is imported when settings are loaded, the others by their own parts.
EXTRAS = ["rich", "cyclopts", "structlog", "typed_settings", "inotify_simple"]
#: What is loaded when it is first used.
HEAVY = ["trio", "anyio", "cattrs", "orjson", "psutil", "asyncio", "subprocess", *EXTRAS]


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_of_weight() -> None:
    assert run(f"import sys, supervise; print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


@pytest.mark.parametrize("name", ["Settings", "JobSpec", "Event", "Secret", "SettingsError"])
def test_the_ground_loads_nothing_but_attrs(name: str) -> None:
    loaded = run(f"import sys, supervise; supervise.{name}; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded == "[]\n"


def test_the_ground_can_be_read_without_the_package() -> None:
    assert "JobSpec" in run("import supervise; print(dir(supervise))")
    assert run("import supervise; print(supervise.events.Event is supervise.Event)") == "True\n"
    run("import supervise\ntry: supervise.no_such\nexcept AttributeError: pass\nelse: raise SystemExit(1)")


def test_no_public_name_needs_an_extra() -> None:
    run(
        f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import supervise
for name in supervise.__all__:
    getattr(supervise, name)
try:
    supervise.Settings.load(environ={{}})
except supervise.MissingExtra as error:
    assert "pip install 'trio-supervise[cli]'" in str(error), error
else:
    raise SystemExit("settings were loaded without typed-settings")
"""
    )
