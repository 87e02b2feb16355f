"""A stand-in for Claude Code: `claude [any flags] < prompt`. It speaks stream-json, and does what the prompt says.

Standard library only. The kernel ends it after a minute, whatever it is doing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

SESSION = "5f0c3a52-6e0b-4c0f-9f9e-0d3a1f6f5b11"


def say(line: dict[str, object]) -> None:
    data = json.dumps({**line, "session_id": SESSION}, separators=(",", ":")).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def text(words: str) -> None:
    message = {"role": "assistant", "model": "fake", "content": [{"type": "text", "text": words}]}
    say({"type": "assistant", "message": message})


def result(words: str, **more: object) -> None:
    usage = {
        "input_tokens": 11,
        "output_tokens": 22,
        "cache_read_input_tokens": 33,
        "cache_creation_input_tokens": 44,
    }
    line = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "duration_ms": 5,
        "num_turns": 2,
        "total_cost_usd": 0.25,
        "usage": usage,
        "result": words,
        "permission_denials": [],
    }
    say({**line, **more})


def above() -> list[int]:
    """From our parent to the supervising process, which is the first that runs `-m supervise`."""
    pids = [os.getppid()]
    while True:
        with open(f"/proc/{pids[-1]}/cmdline", "rb") as file:
            if b"\0-m\0supervise\0" in file.read():
                return pids
        with open(f"/proc/{pids[-1]}/stat", "rb") as file:
            pids.append(int(file.read().rpartition(b") ")[2].split()[1]))


def environment(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().decode(errors="replace")
    except OSError as error:
        return f"refused: {error.strerror}"


def main() -> int:
    signal.alarm(60)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    verb, _, rest = sys.stdin.read().partition(" ")
    say({"type": "system", "subtype": "init", "cwd": os.getcwd(), "model": "fake", "tools": []})
    match verb:
        case "say":
            text(rest)
            result(rest)
        case "fail":
            result(rest, is_error=True)
            return 1
        case "silent":
            return 0
        case "big":
            result("é" + "x" * (int(rest) - 1))
        case "chatter":
            for number in range(int(rest)):
                text(f"{number} {'y' * 500}")
            result("done")
        case "hang":
            text("hanging")
            time.sleep(60)
        case "ask":  # about the environment: this one's, and those of all processes above
            theirs = [environment(pid) for pid in above()]
            seen = {"mine": dict(os.environ), "theirs": theirs, "argv": sys.argv[1:], "cwd": os.getcwd()}
            result(json.dumps(seen))
        case "tell":  # a key, everywhere
            key = os.environ["ANTHROPIC_API_KEY"]
            print(f"debug: the key is {key}", file=sys.stderr, flush=True)
            text(f"I found {key} in my environment")
            result(f"the key is {key}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
