"""The small Python project that the demo's agent works on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["FILES", "NAME", "lay_down"]

NAME = "orchard-demo"

FILES = {
    "README.md": """# Orchard

Keeps the books of a small orchard: which trees bear what, and what the harvest is worth.

See `docs/usage.md`.
""",
    "pyproject.toml": f"""[project]
name = "{NAME}"
version = "0.1.0"
requires-python = ">=3.11"
""",
    "orchard/__init__.py": '"""The books of a small orchard."""\n',
    "orchard/trees.py": '''"""Trees and what they bear."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tree:
    kind: str
    planted: int
    kilos: float

    def age(self, year: int) -> int:
        return year - self.planted
''',
    "orchard/util.py": '''"""Things that found no better place."""


def to_cents(euros: str) -> int:
    whole, _, part = euros.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0")[:2])


def as_euros(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
''',
    "orchard/prices.py": '''"""What a kilo is worth."""

from orchard.util import to_cents

PRICES = {"apple": "2.40", "pear": "3.10", "quince": "4.05"}


def price_of(kind: str) -> int:
    """Cents for a kilo."""
    return to_cents(PRICES[kind])
''',
    "orchard/report.py": '''"""The harvest as text."""

from orchard.prices import price_of
from orchard.trees import Tree
from orchard.util import as_euros, plural


def report(trees: list[Tree]) -> str:
    worth = sum(round(tree.kilos * price_of(tree.kind)) for tree in trees)
    return f"{plural(len(trees), 'tree')}, worth {as_euros(worth)} euros"
''',
    "tests/__init__.py": "",
    "tests/test_prices.py": """import unittest

from orchard.prices import price_of


class PricesTest(unittest.TestCase):
    def test_price_in_cents(self) -> None:
        self.assertEqual(price_of("quince"), 405)
""",
    "tests/test_report.py": """import unittest

from orchard.report import report
from orchard.trees import Tree


class ReportTest(unittest.TestCase):
    def test_one_tree(self) -> None:
        self.assertEqual(report([Tree("apple", 1999, 10.5)]), "1 tree, worth 25.20 euros")
""",
    "docs/usage.md": """# Usage

    from orchard.report import report
    from orchard.trees import Tree

    print(report([Tree("apple", 1999, 10.5)]))
""",
    "docs/history.md": "# History\n\nThe first tree, an apple, was planted in 1999.\n",
}


def lay_down(workspace: Path) -> None:
    """Write the project into the directory `workspace`, which may exist."""
    for name, text in FILES.items():
        file = workspace / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
