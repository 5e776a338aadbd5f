"""Compiled decoding without waiting for a compiler: as it is written, or as the compiler sees it."""

import pytest
import torch
from conftest import assert_equal, random_tokens
from networks import tiny_config, tiny_model

from inference import compiled_decode as decode
from inference.gemv import with_gemv

T = 13


@pytest.fixture
def uncompiled(monkeypatch):
    """The arithmetic of compiled steps, as it is written."""
    monkeypatch.setattr(decode, "compiled", lambda function: function)


@pytest.fixture
def traced(monkeypatch):
    """Assert that steps run as the compiler sees them equal plain ones, and how often it had to look."""
    torch._dynamo.reset()
    seen = []
    look = lambda graph, inputs: seen.append(graph) or with_gemv(graph).forward
    layer = torch.compile(decode._layer, fullgraph=True, backend=look)
    monkeypatch.setattr(decode, "compiled", lambda function: layer if function is decode._layer else function)

    @torch.no_grad()
    def check(design: dict, *, ragged: bool = False) -> None:
        model, idx = tiny_model(tiny_config(**design)), random_tokens(3, 2 * T)
        lengths = torch.tensor([2, 3, 1]) if ragged else None
        logits = []
        for on in (False, True):
            decode.use_compiled_decode(model, on)
            cache = model.new_cache(3, 2 * T)
            model(idx[:, :3], cache=cache, lengths=lengths)
            logits.append([model(column, cache=cache) for column in idx[:, 3:].split(1, dim=1)])
        assert_equal(torch.cat(logits[1]), torch.cat(logits[0]), 1e-10)
        assert len(seen) == len({block.mixer.spec for block in model.h})

    return check
