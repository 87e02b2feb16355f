"""A stand-in for Claude Code that does, one after the other, what the lines of its prompt say.

    text WORDS       says so
    error WORDS      prints so on its standard error
    write PATH TEXT  writes a file
    move FROM TO     renames one
    remove PATH      removes one
    wait PATH        goes on as soon as there is such a file
    first WORDS      fails with these words, unless a run of this prompt has failed before in this workspace
    fail WORDS       fails with these words
    done WORDS       ends well
    hang             does nothing more
    deaf             takes no notice of SIGTERM from here on

It speaks stream-json, uses the standard library only, and is ended by the kernel after half a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time

SESSION = "5f0c3a52-6e0b-4c0f-9f9e-0d3a1f6f5b12"


def say(line: dict[str, object]) -> None:
    os.write(1, json.dumps({**line, "session_id": SESSION}).encode() + b"\n")


def text(words: str) -> None:
    message = {"role": "assistant", "model": "fake", "content": [{"type": "text", "text": words}]}
    say({"type": "assistant", "message": message})


def end(words: str, *, is_error: bool = False) -> None:
    usage = {
        "input_tokens": 11,
        "output_tokens": 22,
        "cache_read_input_tokens": 33,
        "cache_creation_input_tokens": 44,
    }
    line = {"type": "result", "subtype": "success", "is_error": is_error, "duration_ms": 5, "num_turns": 1}
    say({**line, "total_cost_usd": 0.25, "usage": usage, "result": words, "permission_denials": []})
    sys.exit(1 if is_error else 0)


def step(verb: str, rest: str, failed: str) -> None:
    path, _, words = rest.partition(" ")
    match verb:
        case "text":
            text(rest)
        case "error":
            os.write(2, rest.encode() + b"\n")
        case "write":
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w") as file:
                file.write(words + "\n")
        case "move":
            os.rename(path, words)
        case "remove":
            os.unlink(path)
        case "wait":
            while not os.path.exists(path):
                time.sleep(0.01)
        case "first" if not os.path.exists(failed):
            open(failed, "x").close()
            end(rest, is_error=True)
        case "fail":
            end(rest, is_error=True)
        case "done":
            end(rest)
        case "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "hang":
            time.sleep(60)


def main() -> None:
    signal.alarm(30)
    prompt = sys.stdin.read()
    failed = f".failed.{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"
    say({"type": "system", "subtype": "init", "cwd": os.getcwd(), "model": "fake", "tools": []})
    for line in prompt.splitlines():
        verb, _, rest = line.partition(" ")
        step(verb, rest, failed)
    end("done")


if __name__ == "__main__":
    main()
