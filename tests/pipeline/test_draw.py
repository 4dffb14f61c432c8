"""Pictures: text that fits its width, boxes where the times say, colours that can be read, a trace that is valid."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from megatron_ds.pipeline import draw
from megatron_ds.pipeline.schedule import Compute
from megatron_ds.pipeline.simulate import Span

TABLES = [
    [Compute("forward", 0), Compute("forward", 0, 1), Compute("backward", 0, 1), Compute("backward", 0)],
    [Compute("forward", 0), Compute("backward_input", 10, 1), Compute("backward_weight", 10, 1)],
]
TIMES = [[(2.0, 3.0), (3.0, 4.0), (6.0, 8.0), (8.0, 10.0)], [(3.0, 4.0), (4.5, 5.5), (5.5, 6.0)]]
SPANS = [Span(rank, c, *time) for rank in range(2) for c, time in zip(TABLES[rank], TIMES[rank], strict=True)]
SVG = "{http://www.w3.org/2000/svg}"


def picture(spans=SPANS, **options):
    return ElementTree.fromstring(draw.svg(spans, **{"title": "a <b> & c", "num_chunks": 2} | options))


def boxes(root):
    """Rectangles of passes: (x, y, width, height, fill, tooltip)."""
    found = []
    for rect in root.iter(f"{SVG}rect"):
        tooltip = rect.find(f"{SVG}title")
        if tooltip is not None:
            found.append(
                (*(float(rect.get(key)) for key in ("x", "y", "width", "height")), rect.get("fill"), tooltip.text)
            )
    return found


def texts(root):
    return [
        (float(t.get("x")), float(t.get("y")), t.text, t.get("fill"), float(t.get("font-size")))
        for t in root.iter(f"{SVG}text")
    ]


def test_a_box_per_pass_is_where_and_as_long_as_its_time():
    root = picture()
    found = boxes(root)
    assert len(found) == 7
    scale = found[0][2] / 1.0
    for (x, y, width, *_), (rank, _, start, end) in zip(found, SPANS, strict=True):
        assert x == pytest.approx(draw.LEFT + (start - 2.0) * scale, abs=0.02)
        assert width == pytest.approx((end - start) * scale, abs=0.02)
        assert y == draw.TOP + draw.LANE * rank + (draw.LANE - draw.BOX) / 2
    assert found[0][5] == "forward, micro-batch 0, chunk 0, rank 0, 0 to 1"
    assert found[5][5] == "input gradients, micro-batch 10, chunk 1, rank 1, 2.5 to 3.5"


def test_numbers_are_inside_their_boxes_and_can_be_read():
    root = picture()
    for x, y, width, height, fill, tooltip in boxes(root):
        inside = [t for t in texts(root) if x < t[0] < x + width and y < t[1] < y + height]
        ((middle, _, number, ink, size),) = inside
        assert f"micro-batch {number}," in tooltip
        assert middle == pytest.approx(x + width / 2, abs=0.02)
        assert len(number) * size * draw.GLYPH <= width
        assert draw.contrast(fill, ink) >= 4.5


def test_everything_is_on_the_canvas():
    root = picture(title="t" * 200)
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(x >= 0 and x + w <= width and y + h <= height for x, y, w, h, *_ in boxes(root))
    ends = [x + (len(text) * size * 0.5 if x >= draw.LEFT else 0) for x, _, text, _, size in texts(root)]
    assert max(ends) <= width and all(0 < y < height for _, y, *_ in texts(root))


def test_title_ranks_axis_and_legend_are_there():
    told = [text for _, _, text, _, _ in texts(picture(unit="ms"))]
    assert {"a <b> & c", "rank 0", "rank 1", "time, ms"} <= set(told)
    assert {"forward", "backward", "input gradients", "weight gradients", "idle"} <= set(told)
    ticks = [x for x, y, text, _, _ in texts(picture()) if y == draw.TOP + 2 * draw.LANE + 18 and text != "time"]
    assert len(ticks) >= 4 and min(b - a for a, b in pairwise(ticks)) >= 60


def test_only_what_occurs_is_in_the_legend():
    told = {text for _, _, text, _, _ in texts(picture([Span(0, Compute("forward", 0), 0, 1)], num_chunks=1))}
    assert "forward" in told and "backward" not in told
    assert "Numbers are the micro-batches." in told


def test_chunks_are_shades_and_kinds_are_far_apart():
    colours = {(kind, chunk): draw.colour(kind, chunk, 4) for kind in draw.LETTERS for chunk in range(4)}
    assert len(set(colours.values())) == 16
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours.values())
    for kind in draw.LETTERS:
        shades = [draw.contrast(colours[kind, chunk], "#000000") for chunk in range(4)]
        assert shades == sorted(shades)
        assert all(draw.contrast(colours[kind, chunk], draw.IDLE) > 1.3 for chunk in range(4))


def test_contrast_is_that_of_wcag():
    assert draw.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert draw.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


def test_a_very_short_pass_among_long_ones_stays_drawable():
    """As in a measured run: the picture keeps a limit, and a number that has no room is left out."""
    root = picture([Span(0, Compute("forward", 0), 0, 1e-6), Span(0, Compute("forward", 1), 1, 100)])
    assert float(root.get("width")) <= draw.WIDEST + draw.LEFT + draw.RIGHT
    assert sum(text in ("0", "1") and draw.TOP < y < draw.TOP + draw.LANE for _, y, text, _, _ in texts(root)) == 1


@pytest.mark.parametrize("width", [1, 20, 80, 160])
def test_the_order_is_as_wide_as_told_and_complete(width):
    lines = draw.order_lines(TABLES, 2, width)
    one_pass = len("rank 0  1W10")
    assert all(len(line) <= max(width, one_pass) for line in lines)
    for rank, table in enumerate(TABLES):
        cells = [cell for line in lines if line.startswith(f"rank {rank}") for cell in line.split()[2:]]
        assert cells == [draw.label(compute, 2) for compute in table]


def test_the_order_is_a_table():
    assert draw.order_lines(TABLES, 2, 25) == [
        "rank 0  0F0  1F0  1B0",
        "rank 1  0F0  1I10 1W10",
        "",
        "rank 0  0B0",
        "rank 1",
    ]
    assert draw.notation(TABLES[:1], 1) == "F forward, B backward; F0: micro-batch 0"
    assert draw.label(Compute("backward_weight", 7), 1) == "W7"


def test_the_trace_has_the_shape_of_the_format():
    trace = json.loads(json.dumps(draw.chrome_trace(SPANS, title="run", num_chunks=2, microseconds=10)))
    assert set(trace) == {"traceEvents", "displayTimeUnit"} and trace["displayTimeUnit"] in ("ms", "ns")
    names = [(e["name"], e["tid"], e["args"]["name"]) for e in trace["traceEvents"] if e["ph"] == "M"]
    assert names == [("process_name", 0, "run"), ("thread_name", 0, "rank 0"), ("thread_name", 1, "rank 1")]
    complete = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == 7 and {e["pid"] for e in trace["traceEvents"]} == {0}
    assert complete[5] == {
        "ph": "X",
        "name": "1I10",
        "cat": "backward_input",
        "pid": 0,
        "tid": 1,
        "ts": 45.0,
        "dur": 10.0,
        "args": {"micro_batch": 10, "chunk": 1},
    }
