"""A compiler around the model leaves our hook out, and the answer stays what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ids, open_model, save


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # what stands around a pass
def test_the_compiler_goes_round_the_experts(tmp_path: Path) -> None:
    save(tmp_path, "qwen3_moe")
    with open_model(tmp_path) as model:
        expected = model(ids(1, 7)).logits
        compiled = torch.compile(lambda tokens: model.module(tokens).logits, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(ids(1, 7)), expected)
