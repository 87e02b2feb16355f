"""The help: each command names its options and shows an example; nobody is left without a hint."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from supervise.cli.reference import Command, commands, reference, with_reference
from tests.cli.conftest import Cli, Done, Root, refused

COMMANDS: list[Command] = list(commands())
DOC = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """What the help of each command says, all asked in one process."""
    root = Root(Cli(tmp_path_factory.mktemp("help")))
    asked = [[*words[1:], "--help"] for words, _ in COMMANDS] + [["dlq", "--help"], ["scripts", "--help"], [], ["-h"]]
    return {" ".join(words): done for words, done in zip(asked, root.many(asked), strict=True)}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[0][1:]))
def test_each_command_names_every_option_and_an_example(helps: dict[str, Done], command: Command) -> None:
    words, app = command
    done = helps[f"{' '.join(words[1:])} --help"]
    assert (done.code, done.err) == (0, "")
    for argument in app.assemble_argument_collection():
        assert f"{argument.names[0]} " in done.out
        assert argument.parameter.help, f"{argument.names[0]} is not explained"
        assert argument.parameter.help.split()[0] in done.out
    assert f"Example: {' '.join(words)}" in " ".join(done.out.split())
    assert "124 timed out" in done.out


@pytest.mark.parametrize("words", ["", "-h"])
def test_alone_it_lists_the_commands(helps: dict[str, Done], words: str) -> None:
    done = helps[words]
    assert (done.code, done.err) == (0, "")
    for command, _ in COMMANDS:
        assert f" {command[1]} " in done.out
    assert "Example: supervise run" in done.out
    assert "supervise demo" in done.out


@pytest.mark.parametrize("group", ["dlq", "scripts"])
def test_a_group_lists_its_commands(helps: dict[str, Done], group: str) -> None:
    done = helps[f"{group} --help"]
    assert (done.code, done.err) == (0, "")
    own = [words[2] for words, _ in COMMANDS if words[1] == group]
    assert own
    for name in own:
        assert f" {name} " in done.out


def test_the_version_is_told(cli: Cli) -> None:
    done = cli.do("--version")
    assert (done.code, done.out, done.err) == (0, importlib.metadata.version("trio-supervise") + "\n", "")


def test_a_small_alphabet_is_no_error(cli: Cli) -> None:
    done = cli.do("run", "--help", env={"PYTHONIOENCODING": "ascii"})
    assert (done.code, done.err) == (0, "")
    assert done.out.isascii()
    assert "dontAsk, ..." in done.out


def test_the_help_loads_neither_trio_nor_the_library() -> None:
    heavy = {"trio", "typed_settings", "structlog", "cattrs", "supervise.model", "supervise.job", "rich.markdown"}
    script = (
        "import sys\nfrom supervise.cli.app import main\nmain(['run', '--help'])\n"
        f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "[]\n")


# --- mistakes ----------------------------------------------------------------------------------------------

MISTAKES = {
    "runn": "Did you mean 'run'?",
    "dlq lst": "Did you mean 'list'?",
    "xyz": "There are: demo, run, timeline, scripts, worker, submit, logs, dlq, doctor, config, completion.",
    "--verison": "Did you mean --version?",
    "--json": "Options come after the command.",
    "run --timeout nan x": "--timeout is nan, but must be a number of seconds above 0",
    "run --max-turns -1 x": "--max-turns is -1, but must be",
    "run --workspace= x": "--workspace is '', but must be the path of a file or a directory",
    "worker w1 --root=": "--root is '', but must be the path of",
    "scripts run x --month 10": "An option of the script's own comes behind --",
    "config --example --json": "--example writes all settings, as TOML; leave NAME, --set, --config and --json out",
    "config --config -": "/- does not exist",
    "run --workspce . x": "Did you mean --workspace?",
    "worker w1 --max-concurent 3": "Did you mean --max-concurrent?",
    "run --timeout soon x": "--timeout is 'soon', but must be a number",
    "run --max-turns 2.5 x": "--max-turns is '2.5', but must be a whole number",
    "run --max-memory 1GB x": "--max-memory is '1GB', but must be a whole number",
    "demo --fault watch": 'Invalid value "watch" for --fault. Choose from: "watch-start", "watch-crash"',
    "worker": "supervise worker needs NAME: the worker's name",
    "worker w1 w2": "'w2' is one word too many for supervise worker",
    "run --timeout": "--timeout requires an argument",
    "completion tcsh": 'Choose from: "bash", "zsh", "fish"',
    "run --set index.mod=none x": "did you mean 'index.mode'?",
    "run --set index.mode=nothing x": "index.mode is 'nothing', but must be one of auto, cidx, none (command line)",
    "run --set state_dir x": "--set 'state_dir' is no name=value",
}


def test_a_mistake_is_told_in_one_line_with_what_is_right(cli: Cli) -> None:
    words = [mistake.split() for mistake in MISTAKES]
    for mistake, done, text in zip(words, Root(cli).many(words), MISTAKES.values(), strict=True):
        refused(done, mistake, 2, text)


def test_a_dash_is_a_dash_but_where_it_means_standard_input(cli: Cli) -> None:
    root = Root(cli)
    root.make()
    told = root.many(
        [
            ["submit", "w1", "--task-id", "t1", "--script", "s", "--script-arg=-", "--metadata", "a=-", "do it"],
            ["submit", "w1", "--task-id", "t2", "--", "-"],
        ]
    )
    assert [done.code for done in told] == [0, 2]
    assert "PROMPT" in told[1].err or "description" in told[1].err  # standard input is empty
    record = root.read("tasks", "t1")
    assert record is not None
    assert (record["args"], record["metadata"]) == (["-"], {"a": "-"})


def test_help_may_be_asked_for_as_a_command(cli: Cli) -> None:
    whole, of_one = Root(cli).many([["help"], ["help", "dlq", "list"]])
    assert (whole.code, "supervise demo" in whole.out) == (0, True)
    assert (of_one.code, "List the dead letters" in of_one.out) == (0, True)


def test_a_terminal_that_does_not_know_its_size_is_no_error(cli: Cli) -> None:
    done = cli.do("--help", env={"COLUMNS": "0", "LINES": "x"})
    assert (done.code, done.err) == (0, "")


def test_where_the_working_directory_is_gone_it_says_so(cli: Cli) -> None:
    gone = cli.root / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -P -m supervise scripts list"
    done = subprocess.run(["sh", "-c", script], env=cli.env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "supervise: the working directory is gone; change to one that is there: cd\n"


def test_a_mistake_is_a_log_line_where_those_are_json(cli: Cli) -> None:
    [done] = Root(cli).many([["logs", "nobody", "--set", "log.format=json"]])
    line = json.loads(done.err)
    assert (done.code, line["level"], line["logger"]) == (1, "error", "supervise.cli")
    assert "nobody" in line["event"]


# --- completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_by_the_script(cli: Cli, shell: str) -> None:
    done = cli.do("completion", shell)
    assert (done.code, done.err) == (0, "")
    for word in ("worker", "max-concurrent", "watch-crash"):
        assert word in done.out


def test_bash_completes_a_command_an_option_and_a_choice(cli: Cli) -> None:
    script = cli.root / "completion.bash"
    script.write_text(cli.do("completion", "bash").out)
    asked = {
        "supervise wor": "worker",
        "supervise run --max-tu": "--max-turns",
        "supervise demo --fault st": "stubborn",
    }
    for line, wanted in asked.items():
        words = line.split()
        quoted = " ".join(f"'{word}'" for word in words)
        shell = (
            f"source {script}\nfunction_of=$(complete -p supervise | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
            f"COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1} COMP_LINE='{line}' COMP_POINT={len(line)}\n"
            f"$function_of supervise '{words[-1]}' '{words[-2]}'\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
        )
        told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
        assert wanted in told.stdout.split(), (line, told)


# --- docs/cli.md -------------------------------------------------------------------------------------------


def test_the_document_is_current() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert text == with_reference(text), "run: python -m supervise.cli.reference --write docs/cli.md"


def test_an_old_document_is_noticed_and_mended(tmp_path: Path) -> None:
    copy = tmp_path / "cli.md"
    old = DOC.read_text(encoding="utf-8").replace("--max-turns", "--most-turns")
    copy.write_text(old, encoding="utf-8")
    assert with_reference(old) != old
    command = [sys.executable, "-m", "supervise.cli.reference", "--write", str(copy)]
    subprocess.run(command, check=True, timeout=60)
    assert copy.read_bytes() == DOC.read_bytes()


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        with_reference("nothing")


def test_the_reference_tells_of_every_option() -> None:
    text = reference()
    for words, command in COMMANDS:
        assert f"## {' '.join(words)}\n" in text
        for argument in command.assemble_argument_collection():
            assert argument.names[0] in text
