"""`moba bench train` at toy size."""

from __future__ import annotations

import json

from moba_lab.bench import train

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_a_stopped_run_goes_on_and_a_wrong_one_measures_nothing(moba, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHAPE", TINY)
    monkeypatch.setattr(train, "GATE_TOKENS", 256)
    command = ("bench", "train", "--layers", 1, "--seconds", 0.01, "--device", "cpu", "--out", tmp_path / "x")
    code, out, _ = moba(*command, "--lengths", "128")
    assert code == 0
    whole = json.loads(out.splitlines()[-1])
    (record,) = whole["records"]
    assert all(record[name]["tokens_per_s"] > 0 for name in train.WAYS)
    assert json.loads((tmp_path / "x.json").read_text()) == whole
    code, out, err = moba(*command, "--lengths", "128,64")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["records"][0] == record
    assert "1 × 128 " not in err
    monkeypatch.setattr(train, "GATE_TOLERANCE", -1.0)
    code, out, err = moba(*command)
    assert (code, out) == (2, "")
    assert "MoBA over whole rows is not dense attention" in err
