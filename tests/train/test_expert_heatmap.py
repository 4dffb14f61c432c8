"""The picture of the experts: its colours say what the loads are."""

import pytest
from expert_loads import expert_load
from PIL import Image

from megatron_ds.train.expert_heatmap import draw_heatmap

GOLD, MIDDLE = (255, 215, 0), (247, 246, 246)


def pixels(path):
    """Number of pixels of each colour."""
    image = Image.open(path).convert("RGB")
    return {color: count for count, color in image.getcolors(maxcolors=image.width * image.height)}


def drawn(tmp_path, *args, **kwargs):
    path = tmp_path / "experts.png"
    draw_heatmap(expert_load(*args, **kwargs), "tiny: load of the experts at step 3", path)
    assert list(tmp_path.iterdir()) == [path]
    return path


def test_balance_is_the_middle_of_the_scale_and_nothing_is_gold(tmp_path):
    seen = pixels(drawn(tmp_path, [[7, 7, 7, 7]] * 3))
    assert GOLD not in seen
    colored = {color: count for color, count in seen.items() if color != (255, 255, 255)}
    assert max(colored, key=colored.get) == MIDDLE


def test_each_dead_expert_is_a_gold_cell(tmp_path):
    one = pixels(drawn(tmp_path, [[4, 0, 4, 4]] + [[4, 4, 4, 4]] * 3))[GOLD]
    two = pixels(drawn(tmp_path, [[4, 0, 4, 4]] * 2 + [[4, 4, 4, 4]] * 2))[GOLD]
    assert two == pytest.approx(2 * one, rel=0.05)


def test_busy_experts_are_red_and_idle_ones_blue(tmp_path):
    seen = pixels(drawn(tmp_path, [[30, 10] + [20] * 30] * 40))  # without numbers: all pixels of a cell are its colour
    ((red, *_), (*_, blue)) = (
        max((c for c in seen if c[first] > c[last] + 40), key=seen.get) for first, last in ((0, 2), (2, 0))
    )
    assert red > 200
    assert blue > 150


@pytest.mark.parametrize(("num_layers", "num_experts", "ranks"), [(1, 1, 1), (2, 7, 7), (60, 256, 8)])
def test_any_size_fits_on_a_screen(tmp_path, num_layers, num_experts, ranks):
    path = drawn(tmp_path, [[3] * num_experts] * num_layers, ranks=ranks)
    width, height = Image.open(path).size
    assert 700 <= width <= 2000
    assert 300 <= height <= 1500


def test_layers_without_a_token_are_drawn(tmp_path):
    assert pixels(drawn(tmp_path, [[0, 0], [0, 0]]))[GOLD] > 1000
