"""A timeline as SVG: one file, no scripts, no fonts of its own, dark where its viewer is. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final
from xml.sax.saxutils import escape

from attrs import frozen

from supervise.codec import rfc3339
from supervise.observe.timeline import Lane, Mark, Span, Timeline, clock

__all__ = ["svg", "tick_label", "ticks"]

WIDTH: Final = 1200
LEFT: Final = 120
RIGHT: Final = 24
TOP: Final = 78
ROW: Final = 22
GAP: Final = 8
#: Between two rows of labels of marks.
LABELS: Final = 17
#: Of a letter of the labels, about. Pixels.
LETTER: Final = 6.5

#: Of a lane: rows for spans at one time, and for labels of marks.
MOST_ROWS: Final = 4
#: Spans drawn in one lane; of more, the longest.
MOST_SPANS: Final = 300
#: Marks nearer to each other are drawn as one. Pixels.
NEAR: Final = 6.0

STYLE: Final = """
.page{fill:#ffffff}.grid{stroke:#e3e6ea;stroke-width:1}.end{stroke:#8a929c;stroke-width:1}
.stripe{fill:#f6f7f9}text{font:11px ui-sans-serif,system-ui,"Segoe UI","DejaVu Sans",sans-serif;fill:#24292f}
.title{font-size:16px;font-weight:600}.faint{fill:#656d76}.name{font-weight:600}
.span{fill:#c9d1d9;stroke:#8a929c}.good{fill:#bfe5c6;stroke:#3f9a52}.warn{fill:#fbe3a8;stroke:#b98a14}
.bad{fill:#ffc9c5;stroke:#cf3d35}.dot{fill:#57606a;stroke:none}.dot.good{fill:#2c8a43}.dot.warn{fill:#b07c00}
.dot.bad{fill:#c9302c}.torn{stroke:#57606a;stroke-width:1.5;stroke-dasharray:2 2}
@media (prefers-color-scheme:dark){.page{fill:#0d1117}.grid{stroke:#262c36}.end{stroke:#6e7681}.stripe{fill:#141a22}
text{fill:#e6edf3}.faint{fill:#9198a1}.span{fill:#30363d;stroke:#6e7681}.good{fill:#1b4526;stroke:#3fb950}
.warn{fill:#4d3a08;stroke:#d29922}.bad{fill:#5a1e1c;stroke:#f85149}.dot{fill:#9198a1}.dot.good{fill:#3fb950}
.dot.warn{fill:#d29922}.dot.bad{fill:#f85149}.torn{stroke:#9198a1}}
"""


@frozen
class Scale:
    """Moments to places: `began` is at `left`, and `seconds` later is `width` further."""

    began: float
    seconds: float
    left: float
    width: float

    def __call__(self, at: float) -> float:
        """Where `at` is; never beside the picture."""
        return self.left + self.width * min(1.0, max(0.0, (at - self.began) / self.seconds))


def ticks(seconds: float, most: int) -> list[float]:
    """At most so many round moments between 0 and `seconds`, evenly apart."""
    least = max(seconds, 0.001) / max(1, most)
    steps = [unit * 10.0**power for power in range(-3, 1) for unit in (1, 2, 5)]
    steps += [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]
    step = next((each for each in steps if each >= least), 86400.0 * math.ceil(least / 86400))
    return [number * step for number in range(int(seconds / step + 1e-9) + 1)]


def tick_label(seconds: float) -> str:
    """A moment of the axis, without a fraction that says nothing."""
    whole = clock(seconds)
    if whole.endswith(" s"):
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + " s"
    return whole.removesuffix(".000")


def svg(timeline: Timeline) -> str:
    """The picture, as the text of an SVG file in UTF-8.

    Its size is bounded: marks that are nearly at one place are drawn as one, and of very many spans the longest are
    drawn; tooltips and the lane's name tell of it.
    """
    seconds = max(timeline.seconds, 0.001)
    scale = Scale(timeline.began, seconds, LEFT, WIDTH - LEFT - RIGHT)
    stripes: list[str] = []
    body: list[str] = []
    y = float(TOP)
    for number, lane in enumerate(timeline.lanes):
        drawn, height = _lane(lane, timeline, scale, y)
        if number % 2 == 0:
            stripes.append(f'<rect class="stripe" x="0" y="{y:.0f}" width="{WIDTH}" height="{height:.0f}"/>')
        body += drawn
        y += height
    height = y + 16
    grid: list[str] = []
    for tick in ticks(seconds, 12):
        x = scale(timeline.began + tick)
        grid.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{y:.0f}"/>')
        if x < WIDTH - RIGHT - 10:
            grid.append(_label(x, TOP - 12, tick_label(tick), "faint", anchor="middle" if tick else "start"))
    title = timeline.job_id or "a job"
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            f'viewBox="0 0 {WIDTH} {height:.0f}" role="img">',
            f"<title>{_safe(f'The life of job {title}')}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" x="0" y="0" width="{WIDTH}" height="{height:.0f}"/>',
            _label(16, 26, title, "title"),
            _label(16, 46, _cut(_about(timeline), WIDTH - 32), "faint"),
            *stripes,
            *grid,
            *body,
            "</svg>",
            "",
        ]
    )


def _about(timeline: Timeline) -> str:
    if timeline.ended is None:
        how = f"no end in its log; so far {clock(timeline.seconds)}"
    else:
        how = f"{timeline.outcome} after {clock(timeline.seconds)}"
    left_out = f" · {timeline.left_out} events are not in its log" if timeline.left_out else ""
    left_out += f" · {timeline.not_kept} marks and spans are not drawn" if timeline.not_kept else ""
    detail = f" · {timeline.detail}" if timeline.detail else ""
    return f"{how} · began {rfc3339(timeline.began)[:-4]}Z{left_out}{detail}"


def _lane(lane: Lane, timeline: Timeline, scale: Scale, top: float) -> tuple[list[str], float]:
    """Its elements, and its height."""
    spans: Sequence[Span] = lane.spans
    note = ""
    if len(spans) > MOST_SPANS:
        longest = sorted(spans, key=lambda each: timeline.end_of(each) - each.began, reverse=True)[:MOST_SPANS]
        spans = sorted(longest, key=lambda each: each.began)
        note = f"the {MOST_SPANS} longest of {len(lane.spans)} spans"
    out: list[str] = []
    y = top + GAP / 2
    rows = timeline.rows_of(spans, MOST_ROWS)
    for row in rows:
        for span in row:
            out += _span(span, timeline, scale, y)
        y += ROW
    if lane.marks:
        drawn, height = _marks(lane, timeline, scale, y)
        out += drawn
        y += height
    elif not rows:
        y += ROW
    height = y - top + GAP / 2
    out.append(_label(16, top + GAP / 2 + 15, _cut(lane.name, LEFT - 24), "name", title=note or lane.name))
    if note:
        out.append(_label(LEFT + 2, y - 2, note, "faint"))
        height += 6
    return out, height


def _span(span: Span, timeline: Timeline, scale: Scale, y: float) -> list[str]:
    end = timeline.end_of(span)
    x = scale(span.began)
    width = max(1.5, scale(end) - x)
    start, until = clock(span.began - timeline.began), clock(end - timeline.began)
    how = ""
    if span.ended is None:
        how = ", its end is not in the log"
    if span.late:
        how += ", it began before the log"
    told = f"{span.label}: {start} to {until} ({clock(end - span.began)}){how}"
    told += f"\n{span.detail}" if span.detail else ""
    kind = f"span {span.mood}".strip()
    out = [
        f'<g><title>{_safe(told)}</title><rect class="{kind}" x="{x:.1f}" y="{y + 2:.1f}" width="{width:.1f}" '
        f'height="{ROW - 5}" rx="2"/>'
    ]
    for edge, torn in ((x, span.late), (x + width, span.ended is None)):
        if torn:
            out.append(f'<line class="torn" x1="{edge:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{y + ROW - 1:.1f}"/>')
    shown = _fitting((f"{span.label} · {clock(end - span.began)}", span.label), width - 8)
    if shown:
        out.append(_label(x + 4, y + 14.5, shown))
    out.append("</g>")
    return out


def _marks(lane: Lane, timeline: Timeline, scale: Scale, y: float) -> tuple[list[str], float]:
    """The marks, those at one place as one; and their height. A label is left out where there is no room for it."""
    groups: list[list[Mark]] = []
    for mark in lane.marks:
        if groups and scale(mark.at) - scale(groups[-1][0].at) < NEAR:
            groups[-1].append(mark)
        else:
            groups.append([mark])
    out: list[str] = []
    # What is taken of each row of labels, from and to. The dots are in the first one.
    taken = [
        [(scale(group[0].at) - 5, scale(group[0].at) + 5) for group in groups],
        *([] for _ in range(MOST_ROWS - 1)),
    ]
    places = MOST_ROWS if lane.name in ("signals", "cancel") else 1
    used = 1
    for group in groups:
        x = scale(group[0].at)
        first = min(group, key=_importance)
        lines = [_told(mark, timeline) for mark in group[:12]]
        if len(group) > len(lines):
            lines.append(f"and {len(group) - len(lines)} more until {clock(group[-1].at - timeline.began)}")
        kind = f"dot {first.mood}".strip()
        out.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y + ROW / 2 - 1:.1f}" r="{3.2 if len(group) == 1 else 4}">'
            f"<title>{_safe(chr(10).join(lines))}</title></circle>"
        )
        if lane.name == "heartbeat":
            continue  # they are all alike
        text = _cut(first.label if len(group) == 1 else f"{first.label} +{len(group) - 1}", WIDTH / 4)
        wide = len(text) * LETTER
        for row, left in ((row, left) for row in range(places) for left in (x + 7, x - 10 - wide)):
            right = left + wide
            if left >= LEFT and right <= WIDTH - 6 and all(right < start or left > end for start, end in taken[row]):
                taken[row].append((left, right + 6))
                used = max(used, row + 1)
                out.append(_label(left, y + 14.5 + row * LABELS, text))
                break
    return out, ROW + (used - 1) * LABELS


def _importance(mark: Mark) -> tuple[int, bool]:
    """Which one of several at a place is named."""
    return ("bad", "warn", "good", "").index(mark.mood), mark.label == "text"


def _told(mark: Mark, timeline: Timeline) -> str:
    detail = f": {mark.detail}" if mark.detail else ""
    return f"{clock(mark.at - timeline.began)} {mark.label}{detail}"


def _fitting(texts: Iterable[str], width: float) -> str:
    return next((text for text in texts if len(text) * LETTER <= width), "")


def _cut(text: str, width: float) -> str:
    most = max(1, int(width / LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def _label(x: float, y: float, text: str, kind: str = "", *, anchor: str = "", title: str = "") -> str:
    more = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    told = f"<title>{_safe(title)}</title>" if title and title != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{told}{_safe(text)}</text>'


def _safe(text: str) -> str:
    """As XML can hold it: no control characters, no lone surrogates."""
    return escape("".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text))
