"""What a training adds to a model split between gloo processes: the fused loss, recomputed activations."""

from __future__ import annotations

import pytest
from test_parallel_models import assert_as_one_process, batch_of, model_of, refused, step
from test_parallel_models import ranks as ranks

from moba_lab.models.key_convolution import add_key_convolution
from moba_lab.train.loss import use_fused_loss
from moba_lab.train.model import checkpoint_activations


def as_trained(model):
    use_fused_loss(model)
    checkpoint_activations(model)
    return model


@pytest.mark.parametrize("settings", [{}, {"sharded": True}], ids=["", "FSDP2"])
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_loss_and_gradients_are_those_of_one_process(ranks, kind, settings):
    outcomes = ranks.run(step, kind, settings, as_trained)
    assert len(outcomes) == 2
    assert_as_one_process(outcomes, as_trained(model_of({})), batch_of(kind))


def test_key_convolutions_are_refused(ranks):
    outcomes = ranks.outcomes(refused, "convolution", add_key_convolution)
    assert [is_right for is_right, _ in outcomes] == [False, False]
    assert "key convolutions read the keys before" in outcomes[-1][1]
