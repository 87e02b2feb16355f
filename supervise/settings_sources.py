"""Where settings come from: defaults < the user's TOML file < the environment < the command line.

typed-settings lists the settings, reads the file and merges the sources. What it leaves open is done here:
unknown names are errors; each value is checked by itself, so that a message can say where it came from; no
message holds a secret. Nothing is raised inside an `except`: a chained JSON or TOML error carries the whole text.
Nor does the traceback lead through frames whose variables hold secrets: some tools print those, too.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, get_args, get_origin

import attrs

from supervise.errors import MissingExtra, SettingsError
from supervise.settings import Settings, home_of_user

if TYPE_CHECKING:
    from typed_settings.types import LoadedSettings, OptionInfo

__all__ = ["load", "load_with_origins", "nearest", "settings_file"]

PREFIX: Final = "SUPERVISE_"
#: Names with our prefix that are no settings: the mark that we set in the environment of children.
NOT_SETTINGS: Final = frozenset({"SUPERVISE_MARK"})

COMMAND_LINE: Final = "command line"
DEFAULT: Final = "default"
FILE: Final = "file "
#: Longer files are not searched for the line of a bad value: that is slow.
SEARCHED: Final = 16 * 1024
_ABSENT: Final = object()
_BOOLEANS: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def load(
    *,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Settings:
    """The settings; see `Settings.load`."""
    loaded = _tried(config, environ, overrides)
    if isinstance(loaded, SettingsError):
        del environ, overrides  # a traceback may be printed with the variables of its frames
        raise loaded
    return loaded[0]


def load_with_origins(
    *,
    config: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> tuple[Settings, dict[str, str]]:
    """The settings, and for each dotted name where its value came from.

    An origin is `default`, `file PATH`, `environment SUPERVISE_…` or `command line`.

    Raises:
        SettingsError, MissingExtra: as `Settings.load`.
    """
    loaded = _tried(config, environ, overrides)
    if isinstance(loaded, SettingsError):
        del environ, overrides
        raise loaded
    return loaded


def settings_file(config: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path:
    """The file that is read: the one that was named, or the user's. It need not exist.

    Raises:
        SettingsError: the name is relative, and the working directory is gone.
    """
    home = _home(environ)
    if config is not None:
        path: Path = _absolute(config, Path(), home)
        return path
    return (_absolute_directory(environ, "XDG_CONFIG_HOME") or home / ".config") / "supervise/supervise.toml"


def _tried(
    config: str | os.PathLike[str] | None, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[Settings, dict[str, str]] | SettingsError:
    """What there is, or the error without its traceback."""
    try:
        return _load(config, environ, overrides)
    except SettingsError as error:
        return error.with_traceback(None)


def _load(
    config: str | os.PathLike[str] | None, environ: Mapping[str, str], overrides: Mapping[str, Any]
) -> tuple[Settings, dict[str, str]]:
    options = _options()
    from typed_settings.dict_utils import merge_settings

    home = _home(environ)
    sources = [
        _defaults(environ),
        *_file(settings_file(config, environ), config is not None, options),
        *_environment(environ, options),
        _command_line(overrides, options),
    ]
    merged = merge_settings(tuple(options.values()), sources)
    origins = dict.fromkeys(options, DEFAULT)
    values: dict[type, dict[str, Any]] = {option.parent_cls: {} for option in options.values()}
    for name, (value, meta) in merged.items():
        option = options[name]
        origins[name] = meta.name
        values[option.parent_cls][option.name] = _checked(option, value, meta.name, meta.base_dir, home)
    parts: dict[str, Any] = {
        field.name: field.type(**values[field.type])
        for field in attrs.fields(Settings)
        if field.type is not None and attrs.has(field.type)
    }
    return Settings(**values[Settings], **parts), origins


@lru_cache(1)
def _options() -> dict[str, OptionInfo]:
    """Every setting by its dotted name."""
    try:
        from typed_settings.cls_utils import deep_options
    except ImportError:
        raise MissingExtra("reading settings", "cli", "typed-settings") from None
    except FileNotFoundError:  # it looks for the working directory when it is imported
        raise SettingsError("the working directory is gone; change to one that is there: cd") from None
    return {option.path: option for option in deep_options(Settings)}


# --- the sources -------------------------------------------------------------------------------------------


def _loaded(values: dict[str, Any], origin: str, base: Path | None = None) -> LoadedSettings:
    from typed_settings.types import LoadedSettings, LoaderMeta

    return LoadedSettings(values, LoaderMeta(origin, base_dir=base or Path()))


def _defaults(environ: Mapping[str, str]) -> LoadedSettings:
    """The one default that the environment has a say in. All others are those of the classes."""
    state = _absolute_directory(environ, "XDG_STATE_HOME")
    home = _absolute_directory(environ, "HOME")
    if state is None and home is not None:
        state = home / ".local" / "state"
    return _loaded({} if state is None else {"state_dir": state / "supervise"}, DEFAULT)


def _file(path: Path, named: bool, options: Mapping[str, OptionInfo]) -> list[LoadedSettings]:
    """The file that was named, which must exist, or the user's, which may."""
    data, problem = _toml(path)
    if problem or (data is None and named):
        problem = problem or "does not exist; name another file or leave --config out"
        raise SettingsError(f"{path} {problem}")
    if data is None:
        return []
    _refuse_unknown(data, path, options)
    return [_loaded(data, f"{FILE}{path}", path.parent)]


def _toml(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What the file holds, or else a problem; neither if there is no file."""
    from typed_settings.exceptions import ConfigFileLoadError, ConfigFileNotFoundError
    from typed_settings.loaders import TomlFormat

    try:
        return dict(TomlFormat(None)(path, Settings, ())), ""
    except (ConfigFileNotFoundError, NotADirectoryError):
        return None, ""
    except ConfigFileLoadError as error:
        if isinstance(error.__cause__, OSError):
            return None, f"cannot be read: {error.__cause__.strerror}"
        return None, f"is no TOML: {_placed(str(error), path)}"
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        line, column = _position(error.object[: error.start])
        return None, f"is no TOML: not UTF-8 (at line {line}, column {column})"
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets a thousand deep
        return None, f"cannot be understood: {error}"


def _placed(reason: str, path: Path) -> str:
    """`reason` with line and column also where tomllib says only that the text has ended too early."""
    end = "(at end of document)"
    if not reason.endswith(end):
        return reason
    line, column = _position(path.read_bytes())
    return f"{reason.removesuffix(end)}(at line {line}, column {column}, the end)"


def _position(before: bytes) -> tuple[int, int]:
    """Line and column behind the text `before`."""
    last = before[before.rfind(b"\n") + 1 :]
    return before.count(b"\n") + 1, len(last.decode("utf-8", "replace")) + 1


def _refuse_unknown(data: Mapping[str, Any], path: Path, options: Mapping[str, OptionInfo]) -> None:
    tables = {name.partition(".")[0] for name in options if "." in name}
    for key, value in data.items():
        if key in tables and not isinstance(value, dict):
            raise SettingsError(f"{path}{_line(path, key)}: {key!r} must be a table, written as [{key}]")
        for name in [f"{key}.{inner}" for inner in value] if key in tables else [key]:
            if name not in options:
                raise SettingsError(f"{path}{_line(path, name)}: {_unknown(name, [*options, *tables])}")
        if "." in key:  # a quoted key: the merge would not find it
            table, _, name = key.partition(".")
            place = f"{path}{_line(path, key, quoted=True)}"
            raise SettingsError(f"{place}: write {key!r} without quotes, or as {name!r} under [{table}]")


def _environment(environ: Mapping[str, str], options: Mapping[str, OptionInfo]) -> list[LoadedSettings]:
    """One source a variable, since each is the origin of its own value."""
    from typed_settings.dict_utils import set_path
    from typed_settings.loaders import EnvLoader

    variable = EnvLoader(PREFIX, nested_delimiter="__").get_envvar
    known = {variable(option): option for option in options.values()}
    sources = []
    for name in sorted(environ):
        if name in known:
            values: dict[str, Any] = {}
            set_path(values, known[name].path, environ[name])
            sources.append(_loaded(values, f"environment {name}"))
        elif name.startswith(PREFIX) and name not in NOT_SETTINGS:
            raise SettingsError(f"environment: {_unknown(name, known)}")
    return sources


def _command_line(overrides: Mapping[str, Any], options: Mapping[str, OptionInfo]) -> LoadedSettings:
    from typed_settings.dict_utils import set_path

    values: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in options:
            raise SettingsError(f"{COMMAND_LINE}: {_unknown(name, options)}")
        set_path(values, name, value)
    return _loaded(values, COMMAND_LINE)


def _unknown(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else "docs/settings.md lists the settings"
    return f"{name!r} is no setting; {hint}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The names that may have been meant, quoted and joined by "or"; empty if none is near.

    First those that differ in case and separators only, then those of another table, then what is spelled alike.
    """
    names = [*known]
    found = [each for each in names if _letters(each) == _letters(name)]
    found = found or [each for each in names if _letters(_last(each)) == _letters(_last(name))]
    found = found or difflib.get_close_matches(name, names, n=1)
    if not found:
        of_last = {_last(each): each for each in reversed(names)}
        found = [of_last[each] for each in difflib.get_close_matches(_last(name), of_last, n=1, cutoff=0.75)]
    return " or ".join(map(repr, found))


def _last(name: str) -> str:
    """The name within its table, of a dotted name or one of the environment."""
    return re.split(r"\.|__", name.removeprefix(PREFIX))[-1]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _line(path: Path, name: str, *, quoted: bool = False) -> str:
    """ ", line 3" for the place in the file where `name` gets its value; empty if that cannot be told.

    tomllib tells no places. But the beginning of a file, up to the end of a line, is TOML as well, unless it ends
    within a value: the place is behind the longest beginning without the name.
    """
    keys = [name] if quoted else name.split(".")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    lines = text.split("\n") if len(text) <= SEARCHED else []
    before = 0
    for number in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:number]))
        except (ValueError, RecursionError):
            continue
        for key in keys:
            found = found.get(key, _ABSENT) if isinstance(found, dict) else _ABSENT
        if found is not _ABSENT:
            return f", line {before + 1}"
        before = number
    return ""


# --- the values --------------------------------------------------------------------------------------------


def _checked(option: OptionInfo, value: Any, origin: str, base: Path, home: Path) -> Any:
    """`value` as its class wants it: converted, and passed by the validator."""
    try:
        if value == "" and NoneType in get_args(option.cls):
            value = None
        elif isinstance(value, str) and not origin.startswith(FILE):  # a file has types of its own
            value = _from_text(value, option)
        if Path in (option.cls, *get_args(option.cls)):
            if isinstance(value, list | tuple):
                value = [_absolute(v, base, home) for v in value]
            elif get_origin(option.cls) is not tuple:  # what should be a list is left to the validator as it is
                value = _absolute(value, base, home)
        # The other settings of its class have their defaults here, which are good: only this one can be refused.
        value = getattr(option.parent_cls(**{option.name: value}), option.name)
        return float(value) if option.cls is float else value
    except SettingsError as error:
        problem = str(error)
    place = origin
    if origin.startswith(FILE):
        place += _line(Path(origin.removeprefix(FILE)), option.path)
    raise SettingsError(f"{problem} ({place})")


def _from_text(text: str, option: OptionInfo) -> Any:
    """The value that `text` stands for. What it cannot be stays a text: the validator knows what is allowed."""
    kind = get_origin(option.cls) or option.cls
    if kind is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    if kind not in (int, float):  # a number, or nothing
        kind = next((each for each in get_args(option.cls) if each in (int, float)), kind)
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            return text
    if kind is tuple:
        if text.lstrip().startswith("["):
            return _from_json(text, option, "list of texts")
        return [item.strip() for item in text.split(",")] if text.strip() else []
    if kind is dict:
        if text.lstrip().startswith("{"):
            return _from_json(text, option, "object of texts")
        pairs = [item.partition("=") for item in text.split(",")] if text.strip() else []
        if not all(equals for _, equals, _ in pairs):
            raise SettingsError(f"{option.path} must be A=1,B=2 or a JSON object of texts")
        return {name.strip(): value for name, _, value in pairs}
    return text


def _from_json(text: str, option: OptionInfo, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise SettingsError(f"{option.path} must be a JSON {what}: {reason}")


# --- places ------------------------------------------------------------------------------------------------


def _home(environ: Mapping[str, str]) -> Path:
    return _absolute_directory(environ, "HOME") or home_of_user()


def _absolute_directory(environ: Mapping[str, str], name: str) -> Path | None:
    """The directory that a variable names. A relative one is ignored: it would be in the working directory."""
    value = environ.get(name, "")
    return Path(value) if os.path.isabs(value) else None


def _absolute(value: Any, base: Path, home: Path) -> Any:
    """The path `value` without `~`, relative ones taken from `base`. What is no path is left to the validator."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        return value
    text = str(value)
    text = f"{home}{text[1:]}" if text == "~" or text.startswith("~/") else os.path.expanduser(text)
    try:
        return Path(os.path.abspath(base / text))
    except FileNotFoundError:
        problem = f"{text!r} is relative, but the working directory is gone; write the whole path"
    raise SettingsError(problem)
