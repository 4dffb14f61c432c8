"""Pictures of a schedule: the order as text, the course in time as SVG and as a Chrome trace.

The order is made from tables, the course from the ``Span`` of every pass, so a measured run is drawn like a simulated
one. Nothing is computed here but places and colours; the SVG is written by hand and needs no library.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import chain
from math import floor, log10
from typing import Any

from megatron_ds.pipeline.schedule import Compute, Kind, Table
from megatron_ds.pipeline.simulate import Span

LETTERS: dict[Kind, str] = {"forward": "F", "backward": "B", "backward_input": "I", "backward_weight": "W"}
WORDS: dict[Kind, str] = {
    "forward": "forward",
    "backward": "backward",
    "backward_input": "input gradients",
    "backward_weight": "weight gradients",
}

# --- text -----------------------------------------------------------------------------------------------------------


def label(compute: Compute, num_chunks: int) -> str:
    """A pass in few characters: chunk (if there are several), kind, micro-batch."""
    chunk = str(compute.chunk) if num_chunks > 1 else ""
    return f"{chunk}{LETTERS[compute.kind]}{compute.micro_batch}"


def notation(tables: Sequence[Table], num_chunks: int) -> str:
    """What the labels mean, for the kinds that occur."""
    kinds = ", ".join(f"{LETTERS[kind]} {WORDS[kind]}" for kind in _kinds(chain.from_iterable(tables)))
    return f"{kinds}; {'1F0: chunk 1, micro-batch 0' if num_chunks > 1 else 'F0: micro-batch 0'}"


def order_lines(tables: Sequence[Table], num_chunks: int, width: int) -> list[str]:
    """The order of every rank, a line each, no wider than ``width`` if that has room for one pass.

    What does not fit goes on in further blocks of lines, so that the nth passes of all ranks stay below one another.
    """
    names = [f"rank {rank}" for rank in range(len(tables))]
    head = max(map(len, names)) + 2
    rows = [[label(compute, num_chunks) for compute in table] for table in tables]
    cell = max(map(len, chain.from_iterable(rows))) + 1
    per_block = max(1, (width - head + 1) // cell)
    lines: list[str] = []
    for first in range(0, max(map(len, rows)), per_block):
        lines += [""] if lines else []
        for name, row in zip(names, rows, strict=True):
            cells = "".join(text.ljust(cell) for text in row[first : first + per_block])
            lines.append((name.ljust(head) + cells).rstrip())
    return lines


# --- SVG ------------------------------------------------------------------------------------------------------------

COLOURS: dict[Kind, tuple[int, int, int]] = {
    "forward": (0x00, 0x55, 0xA4),
    "backward": (0x8E, 0x2C, 0x6B),
    "backward_input": (0xB8, 0x42, 0x00),
    "backward_weight": (0x00, 0x70, 0x55),
}
"""Of chunk 0; further chunks are lighter."""
INK, PAPER, IDLE, RULE = "#1a1a1a", "#ffffff", "#e9ebee", "#c3c7cc"
LIGHTEST = 0.62
"""How much white the last chunk's colour has."""
LANE, BOX = 30, 24
"""Height of a rank's lane and of the boxes in it, in pixels."""
LEFT, RIGHT, TOP = 64, 24, 58
FONT, SMALLEST_FONT, GLYPH = 11.0, 4.0, 0.58
"""Size of numbers in boxes, size below which they are left out, and width of a character in sizes."""
NARROWEST, WIDEST = 640, 16000
"""Pixels that the time axis may have."""


def svg(spans: Sequence[Span], *, title: str, num_chunks: int = 1, unit: str = "") -> str:
    """A picture of the course: a lane per rank, a box per pass with its micro-batch in it, colour by kind and chunk.

    Args:
        spans: every pass, when it ran; the axis begins with the first one.
        title: line on top.
        num_chunks: model chunks per rank.
        unit: of the times, for the axis.

    Returns:
        A complete SVG document. Boxes have their pass and its times as tooltips.
    """
    begin = min(span.start for span in spans)
    length = max(span.end for span in spans) - begin
    scale = _scale(spans, length)
    num_ranks = 1 + max(span.rank for span in spans)
    bottom = TOP + LANE * num_ranks
    legend = list(_legend(spans, num_chunks, bottom + 38))
    width = max(LEFT + length * scale + RIGHT, _text_width(title, 15) + LEFT + RIGHT, *(right for _, right in legend))
    height = bottom + 88
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {height}" width="{_n(width)}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        _text(LEFT, 28, title, size=15, weight="bold"),
        *_axis(length, scale, bottom, unit),
    ]
    for rank in range(num_ranks):
        top = TOP + LANE * rank
        parts.append(_text(LEFT - 10, top + LANE / 2 + 4, f"rank {rank}", size=12, anchor="end"))
        parts.append(_rect(LEFT, top + (LANE - BOX) / 2, length * scale, BOX, IDLE))
    for span in spans:
        parts += _box(span, begin, scale, num_chunks, unit)
    return "\n".join([*parts, *(part for part, _ in legend), "</svg>", ""])


def colour(kind: Kind, chunk: int, num_chunks: int) -> str:
    """Fill of a box."""
    white = LIGHTEST * chunk / max(num_chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in COLOURS[kind])


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _scale(spans: Sequence[Span], length: float) -> float:
    """Pixels per unit of time: so that the longest number fits into the shortest box, within limits."""
    longest = max(len(str(span.compute.micro_batch)) for span in spans)
    shortest = min(span.end - span.start for span in spans if span.end > span.start)
    fitting = (longest * GLYPH * FONT + 6) / shortest
    return min(max(fitting, NARROWEST / length), WIDEST / length)


def _box(span: Span, begin: float, scale: float, num_chunks: int, unit: str) -> Iterator[str]:
    """A pass: its box, with a tooltip, and its number if there is room."""
    rank, compute, start, end = span
    x, y, width = LEFT + (start - begin) * scale, TOP + LANE * rank + (LANE - BOX) / 2, (end - start) * scale
    fill = colour(compute.kind, compute.chunk, num_chunks)
    chunk = f", chunk {compute.chunk}" if num_chunks > 1 else ""
    times = f"{start - begin:.6g} to {end - begin:.6g} {unit}".rstrip()
    told = f"{WORDS[compute.kind]}, micro-batch {compute.micro_batch}{chunk}, rank {rank}, {times}"
    yield _rect(x, y, width, BOX, fill, told)
    number = str(compute.micro_batch)
    size = min(FONT, (width - 2) / (GLYPH * len(number)))
    if size >= SMALLEST_FONT:
        yield _text(x + width / 2, y + BOX / 2 + size * 0.36, number, size=size, anchor="middle", fill=_ink_on(fill))


def _ink_on(fill: str) -> str:
    return max(INK, PAPER, key=lambda ink: contrast(ink, fill))


def _axis(length: float, scale: float, bottom: float, unit: str) -> Iterator[str]:
    """Ticks at round times from the first start on, at least 60 pixels apart."""
    step = _round_up(60 / scale)
    for number in range(floor(length / step + 1e-9) + 1):
        x = LEFT + number * step * scale
        yield f'<path d="M{_n(x)} {TOP - 4}V{bottom + 4}" stroke="{RULE}"/>'
        yield _text(x, bottom + 18, f"{number * step:g}", size=11, anchor="middle")
    yield _text(LEFT - 10, bottom + 18, f"time, {unit}" if unit else "time", size=11, anchor="end")


def _round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20 ... and 0.5, 0.2, ..."""
    power = 10.0 ** floor(log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * (1 - 1e-9))


def _legend(spans: Sequence[Span], num_chunks: int, y: float) -> Iterator[tuple[str, float]]:
    """Parts, and where each ends: every kind with the shades of its chunks."""
    x = float(LEFT)
    for kind in _kinds(span.compute for span in spans):
        for chunk in range(num_chunks):
            yield _rect(x, y, 18, 14, colour(kind, chunk, num_chunks)), x + 18
            x += 20
        yield _text(x + 4, y + 11, WORDS[kind], size=12), x + _text_width(WORDS[kind], 12) + RIGHT
        x += _text_width(WORDS[kind], 12) + 22
    yield _rect(x, y, 18, 14, IDLE), x + 18
    yield _text(x + 24, y + 11, "idle", size=12), x + _text_width("idle", 12) + 24 + RIGHT
    shades = f", shades are the chunks 0 to {num_chunks - 1}" if num_chunks > 1 else ""
    told = f"Numbers are the micro-batches{shades}."
    yield _text(LEFT, y + 34, told, size=12), LEFT + _text_width(told, 12) + RIGHT


def _rect(x: float, y: float, width: float, height: float, fill: str, tooltip: str = "") -> str:
    box = f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"'
    return f'{box} stroke="{PAPER}"><title>{escape(tooltip)}</title></rect>' if tooltip else f"{box}/>"


def _text(
    x: float, y: float, text: str, *, size: float, anchor: str = "start", fill: str = INK, weight: str = "normal"
) -> str:
    look = f'font-size="{_n(size)}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{_n(x)}" y="{_n(y)}" {look}>{escape(text)}</text>'


def _text_width(text: str, size: float) -> float:
    return len(text) * size * GLYPH


def _n(number: float) -> str:
    """As short as a hundredth of a pixel allows."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def _kinds(computes: Iterable[Compute]) -> list[Kind]:
    """The kinds that occur, in the order of ``LETTERS``."""
    present = {compute.kind for compute in computes}
    return [kind for kind in LETTERS if kind in present]


# --- Chrome trace ---------------------------------------------------------------------------------------------------


def chrome_trace(
    spans: Sequence[Span], *, title: str, num_chunks: int = 1, microseconds: float = 1000.0
) -> dict[str, Any]:
    """The course in the trace event format, for chrome://tracing or ui.perfetto.dev: a thread per rank.

    Args:
        spans: every pass, when it ran.
        title: name of the process.
        num_chunks: model chunks per rank.
        microseconds: how many one unit of the times has.

    Returns:
        An object for ``json.dump``.
    """
    names = [("process_name", 0, title)]
    names += [("thread_name", rank, f"rank {rank}") for rank in sorted({span.rank for span in spans})]
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": what, "pid": 0, "tid": thread, "args": {"name": name}} for what, thread, name in names
    ]
    for rank, compute, start, end in spans:
        events.append(
            {
                "ph": "X",
                "name": label(compute, num_chunks),
                "cat": compute.kind,
                "pid": 0,
                "tid": rank,
                "ts": start * microseconds,
                "dur": (end - start) * microseconds,
                "args": {"micro_batch": compute.micro_batch, "chunk": compute.chunk},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
