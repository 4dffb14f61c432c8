"""Packing and tiles against the definition of visibility, one query-key pair at a time."""

import pytest
import reference
import torch

from megatron_ds.model.attention_mask import QUERY_TILE, Packing, first_keys, key_ranges

PACKINGS = {
    "single": [[150], [150]],
    "packed": [[1, 70, 79], [64, 64, 22]],
    "many": [[3] * 50, [150]],
}


def shown_mask(packing, batch, length, window):
    """The bool mask that the tiles stand for."""
    shown = torch.zeros(batch, length, length, dtype=torch.bool)
    for rows, tiles in packing.tiles(window):
        for tile in tiles:
            score = torch.zeros(tile.end - tile.begin, tile.end - tile.first_key)
            score[:, tile.begin - tile.end :] += tile.causal
            if tile.edge is not None:
                score[:, : tile.edge.shape[1]] += tile.edge
            shown[rows, tile.begin : tile.end, tile.keys] |= score == 0
    return shown


@pytest.mark.parametrize("window", [None, 1, 5, 63, 64, 65, 149, 1000])
@pytest.mark.parametrize("packing", PACKINGS)
def test_tiles_show_exactly_the_visible_keys(packing, window):
    document_BS, _ = reference.packed(PACKINGS[packing], 150)
    shown = shown_mask(Packing(document_BS), *document_BS.shape, window)
    assert torch.equal(shown, reference.visible(document_BS, window))


@pytest.mark.parametrize("packing", PACKINGS)
def test_whole_mask_and_starts(packing):
    document_BS, position_BS = reference.packed(PACKINGS[packing], 150)
    built = Packing(document_BS)
    assert torch.equal(built.visible_B1SS[:, 0], reference.visible(document_BS))
    assert torch.equal(built.start_BS, torch.arange(150) - position_BS)
    assert built.is_single == (packing == "single")


def test_single_documents_share_their_tiles_and_masks():
    packing = Packing(torch.zeros(3, 5 * QUERY_TILE, dtype=torch.long))
    [(rows, tiles)] = packing.tiles(window=QUERY_TILE)
    assert rows == slice(None)
    assert tiles[2].edge is tiles[3].edge
    assert packing.tiles(window=QUERY_TILE) is packing.tiles(window=QUERY_TILE)


def test_far_marks_distances_above_the_gate_window():
    length, gate_window = 150, 40
    document_BS, _ = reference.packed([[90, 60]], length)
    expected = reference.far(length, gate_window)
    for _, tiles in Packing(document_BS).tiles(None, gate_window):
        for tile in tiles:
            wanted = expected[tile.begin : tile.end, tile.keys]
            num_far = 0 if tile.far is None else tile.far.shape[1]
            assert not wanted[:, num_far:].any()
            if tile.far is not None:
                assert torch.equal(tile.far.double(), wanted[:, :num_far])


def test_a_window_costs_its_width_not_the_length():
    def pairs(length, window):
        first_S = first_keys([0] * length, window)
        return sum((end - begin) * (end - first) for begin, end, first in key_ranges(first_S))

    assert pairs(8192, 128) / pairs(4096, 128) == pytest.approx(2, rel=0.01)
    assert pairs(4096, 128) < 4096 * (128 + QUERY_TILE)
    assert pairs(4096, None) == 4096 * (4096 + QUERY_TILE) / 2
