import json

import pytest

from moba import MoBAConfig


def test_round_trip_through_json():
    config = MoBAConfig(64, 4, keep_first=1, full_layers=(0, 5), decode="moba", router="sink", backend="pytorch")
    assert MoBAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_full_layers_by_count_and_by_list():
    last_two = MoBAConfig(64, 4, full_layers=2)
    assert [layer for layer in range(6) if last_two.is_full_layer(layer, 6)] == [4, 5]
    listed = MoBAConfig(64, 4, full_layers=[0, 3])
    assert [layer for layer in range(6) if listed.is_full_layer(layer, 6)] == [0, 3]
    assert not any(MoBAConfig(64, 4).is_full_layer(layer, 6) for layer in range(6))


def test_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        MoBAConfig(64, 4).topk = 5
    with pytest.raises(TypeError):
        MoBAConfig(64, 4, 1)


def test_what_cannot_be_saved_or_read_is_refused():
    with pytest.raises(ValueError, match="is a function and cannot be saved"):
        MoBAConfig(64, 4, router=lambda q, means: q).to_dict()
    with pytest.raises(ValueError, match=r"unknown keys \['chunk'\], missing keys \['topk'\]"):
        MoBAConfig.from_dict({"block_size": 4, "chunk": 1})
