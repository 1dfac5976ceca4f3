"""Recording a model's routing and drawing it, on routings whose picture is known."""

from __future__ import annotations

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model

from moba import MoBAConfig, Routing, moba_attention, register_moba
from moba.hf import set_moba_config
from moba.hf.record import record_routings
from moba_lab.models.generation import chunk_bounds, num_keys_read, prefill
from moba_lab.pictures.page import write_page
from moba_lab.pictures.routings import choice_counts, choice_shares, farthest_reaching, plot_routings, save_routings

BLOCK, TOPK, TOKENS = 4, 3, 22


def made_routing(heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, TOKENS, heads, 8, generator=generator) for _ in range(2))
    return moba_attention(q, k, k, block_size=BLOCK, topk=TOPK, return_routing=True)[1]


@pytest.fixture
def routings():
    return {layer: made_routing(seed=layer) for layer in (0, 1, 5)}


def test_counts_are_those_of_a_loop():
    routing = made_routing()
    num_blocks = -(-TOKENS // BLOCK)
    expected = np.zeros((2, num_blocks, num_blocks), dtype=int)
    for t in range(TOKENS):
        for head in range(2):
            for block in routing.indices[0, t, head].tolist():
                if block >= 0:
                    expected[head, t // BLOCK, block] += 1
    assert (choice_counts(routing, num_blocks) == expected).all()


def test_shares_are_of_the_queries_that_a_block_has():
    shares = choice_shares(choice_counts(made_routing(), 6))
    future = np.triu(np.ones((6, 6), dtype=bool), k=1)
    assert np.isnan(shares[:, future]).all()
    # The last block has two queries; the first block's only choice is itself.
    assert set(shares[:, 5][~np.isnan(shares[:, 5])].tolist()) <= {0.0, 0.5, 1.0}
    assert (np.diagonal(shares, axis1=1, axis2=2) == 1).all()
    assert (np.nansum(shares[:, 4], axis=-1) == TOPK).all()


def test_the_head_that_reaches_farthest_is_found():
    near, first, far = (np.zeros((6, 6)) for _ in range(3))
    near[1:, :-1] = np.eye(5)
    first[:, 0] = 1.0
    far[3:, 1] = 1.0
    assert farthest_reaching({0: np.stack([first, near]), 1: np.stack([near, far])}) == [(0, 1), (1, 1)]


def test_figure_shows_every_layer_and_head(routings):
    figure = plot_routings(routings, title="a title", detail=[(5, 1)])
    figure.canvas.draw()
    texts = " ".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))
    for said in ("a title", "22 tokens", "block size 4", "top-k 3 of 6 blocks", "layer 5, head 1"):
        assert said in texts
    mosaic = next(axes for axes in figure.axes if axes.get_title(loc="left") == "every layer and head")
    assert [label.get_text() for label in mosaic.get_xticklabels()] == ["0", "1", "5"]
    assert [label.get_text() for label in mosaic.get_yticklabels()] == ["0", "1"]


def test_map_has_the_colours_of_its_shares(routings):
    figure = plot_routings(routings, detail=[(0, 0)])
    painted = figure.axes[0].images[0].get_array()
    counts = choice_counts(routings[0], 6)[0]
    assert (painted[np.triu_indices(6, k=1)] == 0).all(), "the future is empty"
    past = np.tril(np.ones((6, 6), dtype=bool), k=-1)
    full, none = past & (counts == np.diag(counts)[:, None]), past & (counts == 0)
    assert full.any()
    assert none.any()
    assert painted[full][:, :3].sum(axis=-1).max() < painted[none][:, :3].sum(axis=-1).min(), "chosen blocks are darker"


def test_long_texts_are_drawn_in_fewer_cells():
    tokens = torch.arange(400, dtype=torch.int32)[None, :, None, None].expand(1, 400, 1, 1)
    figure = plot_routings({0: Routing(tokens, 1)})
    assert max(figure.axes[0].images[0].get_array().shape[:2]) <= 96


def test_one_block_can_be_drawn():
    routing = Routing(torch.zeros(1, 3, 1, 1, dtype=torch.int32), 8)
    plot_routings({0: routing}).canvas.draw()


@pytest.mark.parametrize("detail", [[(2, 0)], [(0, 2)], [], [(0, 0)] * 5])
def test_detail_must_exist(routings, detail):
    with pytest.raises(ValueError, match="detail"):
        plot_routings(routings, detail=detail)


def test_nothing_to_draw(tmp_path):
    for draw in (plot_routings, lambda r: save_routings(tmp_path / "x.npz", r, np.zeros(0))):
        with pytest.raises(ValueError, match="routings must hold"):
            draw({})


def test_saved_masks_are_the_routing(routings, tmp_path):
    save_routings(tmp_path / "r.npz", routings, np.arange(TOKENS))
    saved = np.load(tmp_path / "r.npz")
    assert saved["layers"].tolist() == [0, 1, 5]
    masks = np.unpackbits(saved["mask_bits"], axis=-1, count=int(saved["num_blocks"])).astype(bool)
    for i, routing in enumerate(routings.values()):
        assert (saved["indices"][i] == routing.indices[0].numpy()).all()
        assert (masks[i] == routing.block_mask(6)[0].numpy()).all()


@pytest.mark.parametrize("num_blocks", [6, 300])
def test_page_holds_the_choices_and_needs_nothing_else(tmp_path, num_blocks):
    routing = made_routing()
    if num_blocks == 300:
        routing = Routing(routing.indices + 294 * (routing.indices == 5).int(), BLOCK)
    tokens = ["</script>", "naïve\n", "<b>", "<!--", "<script>", *["x"] * (TOKENS - 5)]
    write_page(tmp_path / "r.html", {3: routing}, tokens, title="A & B")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|<link|@import", page)
    assert page.count("</script>") == 2, "a token must not end the data"
    assert "<!--" not in page.partition('id="data">')[2], "nor hide its end"
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert data["tokens"] == tokens
    assert (data["layers"], data["num_blocks"], data["topk"]) == ([3], num_blocks, TOPK)
    stored = np.frombuffer(gzip.decompress(base64.b64decode(data["choices"][0])), dtype=f"<u{data['bytes']}")
    choices = stored.reshape(2, TOPK, TOKENS).transpose(2, 0, 1).astype(int)
    none = 2 ** (8 * data["bytes"]) - 1
    assert (np.where(choices == none, -1, choices) == routing.indices[0].numpy()).all()


def test_a_page_of_too_many_blocks_is_refused(tmp_path):
    routing = Routing(torch.tensor([[[[0, 2**16 - 1]]]], dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="at most 65,535 blocks, got 65,536: choose a larger block_size"):
        write_page(tmp_path / "r.html", {0: routing}, ["x"])


def test_page_needs_a_text_for_each_token(tmp_path, routings):
    with pytest.raises(ValueError, match="22 tokens, got 1"):
        write_page(tmp_path / "r.html", routings, ["x"])


@pytest.fixture
def model():
    register_moba(None)
    model = tiny_model().double()
    set_moba_config(model, MoBAConfig(BLOCK, TOPK, full_layers=(1,)))
    model.set_attn_implementation("moba")
    return model


def test_recorded_chunks_are_the_routing_of_the_whole(model):
    tokens = random_tokens(1, 41)
    with torch.no_grad(), record_routings(model) as whole:
        expected = model(tokens).logits
    with record_routings(model) as parts:
        logits, _ = prefill(model, tokens[0], chunk_tokens=8)  # the last chunk is one token
    assert torch.allclose(logits, expected[0, -1].float(), atol=1e-4)
    assert sorted(whole) == sorted(parts) == [0, 2]
    assert len(parts[0]) == 6
    for layer, routing in parts.joined().items():
        assert torch.equal(routing.indices, whole.joined()[layer].indices)
        assert routing.block_size == BLOCK
    assert (whole.joined()[0].num_selected()[0, -1] == TOPK).all()


def test_recording_ends_with_its_block_and_sees_one_model(model):
    other = tiny_model().double()
    set_moba_config(other, MoBAConfig(BLOCK, TOPK))
    other.set_attn_implementation("moba")
    with record_routings(model) as record:
        other(random_tokens(1, 9))
    model(random_tokens(1, 9))
    assert not record
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="sdpa"), record_routings(model):
        pass


def test_keys_read_are_counted_as_the_routing_reads_them(model):
    tokens = random_tokens(1, 41)
    with torch.no_grad(), record_routings(model) as record:
        model(tokens)
    position = torch.arange(41)
    read = 41 * 42 // 2
    for routing in record.joined().values():
        past = (routing.num_selected()[0, :, 0] - 1) * BLOCK
        read += int((past + position % BLOCK + 1).sum())
    config = MoBAConfig(BLOCK, TOPK, full_layers=(1,))
    assert num_keys_read(config, 3, 41) == (read, 3 * 41 * 42 // 2)
    # One-token steps read everything by default, as little as the prompt's queries on request.
    assert num_keys_read(config, 3, 41, 1)[0] == read + 3 * 42
    assert num_keys_read(MoBAConfig(BLOCK, TOPK, full_layers=(1,), decode="moba"), 3, 41, 1)[0] == read + 42 + 2 * 10
    assert num_keys_read(None, 3, 41) == (3 * 41 * 42 // 2,) * 2


def test_chunks_cover_the_prompt():
    assert chunk_bounds(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunk_bounds(9, 4) == [(0, 4), (4, 8), (8, 9)]
    assert chunk_bounds(1, 4) == [(0, 1)]
    for bad in ((0, 4), (3, 0)):
        with pytest.raises(ValueError):
            chunk_bounds(*bad)
