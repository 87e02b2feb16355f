"""A small real code indexer with cidx's command line, for the demo and for tests.

    python -P -m supervise.demo.indexer [--debounce S] [--fault NAME] COMMAND

It works on the current directory. SQLite's full text stands where cidx has embeddings; what a supervisor sees
is the same: the readiness line, the flush on SIGINT, edits lost on SIGTERM, exit codes that prove nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

from supervise.demo.indexer_files import shown, walk
from supervise.demo.indexer_interrupt import Interrupt
from supervise.demo.indexer_store import Damaged, IndexLost, NotInitialised, Store, create, mend
from supervise.demo.indexer_sync import Cancelled, Sync

__all__ = ["FAULTS", "main"]

FAULTS = {
    "watch-start": "watch exits 1 at once",
    "watch-crash": "watch dies of SIGKILL at the first edit that it sees",
    "stubborn": "watch ignores SIGINT and SIGTERM, and so does a child in a session of its own",
    "reconcile": "watch exits 1 at once; index --reconcile fails for every file and exits 0",
}
_NO_INDEX = "No indexes found. Run 'cidx index' first."
_NO_DAEMON = "Daemon mode not enabled"
# Whatever becomes of its supervisor, a process that ignores signals ends itself after this many seconds.
_STUBBORN_FOR = 600
_MOST_ERRORS = 20  # lines that the fault "reconcile" prints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command in the current directory. Returns the exit code; usage errors exit with 2."""
    options = _parser().parse_args(arguments)
    workspace = Path.cwd()
    try:
        code: int = options.run(workspace, options)
    except NotInitialised:
        _say(f"Not initialised: {workspace} has no index. Run 'init' first.")
        return 1
    except Damaged as error:
        _say(f"ERROR the index cannot be used: {error}. Run 'fix-config --force', then 'index --reconcile'.")
        return 1
    except IndexLost as error:
        _say(f"ERROR the index is lost: {error}. Run 'init', then 'index'.")
        return 1
    except sqlite3.Error as error:
        _say(f"ERROR index database: {error}")
        return 1
    except BrokenPipeError:
        # Nobody reads our output any more. Python would try to flush it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _say(f"ERROR {error}")
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supervise.demo.indexer", description=__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version="supervise demo indexer 1")
    parser.add_argument("--debounce", type=_seconds, default=2.0, metavar="S", help="for watch; default 2")
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    parser.add_argument("--fault", choices=sorted(FAULTS), help=faults)
    commands = parser.add_subparsers(dest="command", required=True)

    commands.add_parser("init", help="create an empty index").set_defaults(run=_init)
    index = commands.add_parser("index", help="index all files")
    index.add_argument("--reconcile", action="store_true", help="only what differs from the index")
    index.set_defaults(run=_index)
    watch = commands.add_parser("watch", help="keep the index equal to the files until SIGINT")
    watch.add_argument("--debounce", type=_seconds, default=argparse.SUPPRESS, metavar="S")
    watch.set_defaults(run=_watch)
    for name in ("start", "stop"):
        commands.add_parser(name, help="there is no daemon").set_defaults(run=_daemon)
    fix = commands.add_parser("fix-config", help="check the index's own files")
    fix.add_argument("--force", action="store_true", help="and put them right")
    fix.set_defaults(run=_fix_config)
    commands.add_parser("status", help="how many files are indexed; exits 0").set_defaults(run=_status)
    query = commands.add_parser("query", help="files that hold all the words")
    query.add_argument("text")
    query.add_argument("--limit", type=int, default=10)
    query.set_defaults(run=_query)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not in 0-3600 s")
    return value


def _say(line: str) -> None:
    print(line, flush=True)


def _open_directory(workspace: Path) -> int:
    return os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _init(workspace: Path, options: argparse.Namespace) -> int:
    _say("Initialised" if create(workspace) else "Already initialised")
    return 0


def _daemon(workspace: Path, options: argparse.Namespace) -> int:
    _say(_NO_DAEMON)
    return 1


def _fix_config(workspace: Path, options: argparse.Namespace) -> int:
    wrong = mend(workspace, force=options.force)
    for what in wrong:
        _say(f"{'Repaired' if options.force else 'Wrong'}: {what}")
    if not wrong:
        _say("Configuration is valid")
    return 1 if wrong and not options.force else 0


def _status(workspace: Path, options: argparse.Namespace) -> int:
    """Exit 0 in every state, as cidx does: it is no check."""
    try:
        store = Store(workspace)
    except (NotInitialised, Damaged) as error:
        _say(f"No usable index: {str(error) or 'not initialised'}")
        return 0
    _say(f"{store.count()} files indexed")
    store.close()
    return 0


def _query(workspace: Path, options: argparse.Namespace) -> int:
    store = Store(workspace)
    for path, snippet in store.query(options.text, max(1, options.limit)):
        _say(f"{shown(path)}: {snippet}")
    store.close()
    return 0


def _index(workspace: Path, options: argparse.Namespace) -> int:
    interrupt = Interrupt()
    store = Store(workspace)
    root = _open_directory(workspace)
    if options.fault == "reconcile" and options.reconcile:
        return _index_nothing(root)
    sync = Sync(root, store, _say, stop=lambda: interrupt.noted)
    try:
        count = sync.plan("", trust_stamps=options.reconcile)
        _say(f"indexing {count} files")
        tally = sync.carry_out()
    except Cancelled:
        _say("cancelled")
        return 0
    finally:
        store.close()
    _say(f"Files removed: {tally.removed}")
    _say(f"Files processed: {tally.processed}")
    return 0  # also when files failed, as cidx does


def _index_nothing(root: int) -> int:
    """The reconcile of a day when the embedding service is down."""
    paths = [path for path, _ in walk(root, "", lambda path, error: None)]
    _say(f"indexing {len(paths)} files")
    for path in paths[:_MOST_ERRORS]:
        _say(f"ERROR {shown(path)}: embedding service answered 500")
    _say("Files processed: 0")
    return 0


def _watch(workspace: Path, options: argparse.Namespace) -> int:
    if options.fault in ("watch-start", "reconcile"):
        _say(_NO_INDEX)
        return 1
    interrupt = None
    if options.fault == "stubborn":
        _be_stubborn()
    else:
        interrupt = Interrupt(force_quit=True)
    from supervise.demo.indexer_watch import watch  # inotify_simple is an extra; only the watch needs it

    store = Store(workspace)
    try:
        return watch(
            _open_directory(workspace),
            store,
            _say,
            interrupt,
            debounce=options.debounce,
            on_edit=_crash if options.fault == "watch-crash" else None,
        )
    finally:
        store.close()


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _be_stubborn() -> None:
    """Ignore what asks to stop, here and in a child that no signal to our process group reaches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    signal.alarm(_STUBBORN_FOR)
    if child == 0:
        os.setsid()
        signal.pause()  # until SIGKILL or the alarm
        os._exit(1)
    _say(f"Stubborn child: {child}")


if __name__ == "__main__":
    sys.exit(main())
