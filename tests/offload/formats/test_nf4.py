"""NF4 is bitsandbytes' own, bit for bit."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offload.formats import FORMATS, fast
from offload.formats.nf4 import bitsandbytes, code, has_packed_kernel
from offload.formats.nf4_cpu import pack_codes, unpack_codes

ROOT = Path(__file__).resolve().parents[3]
NF4 = FORMATS["nf4"]
SHAPES = [(96, 192), (64, 64), (32, 128), (70, 33), (5, 7)]
NUMBA = fast.kernels()


def weight(n: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_stored_form_and_its_meaning_are_bitsandbytes_own(n: int, k: int, dtype: torch.dtype) -> None:
    w = weight(n, k, dtype)
    fields = NF4.encode(w)
    codes, state = bitsandbytes().quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(fields["codes"], codes.view(-1))
    assert torch.equal(fields["absmax"], state.absmax)
    decoded = NF4.decode(fields, n, k, "nf4", dtype)
    assert torch.equal(decoded, bitsandbytes().dequantize_4bit(codes, state))


@pytest.mark.parametrize("k", [16, 32, 33, 48, 64, 96, 100, 160, 208])
def test_blocks_go_on_from_row_to_row(k: int) -> None:
    """Also where a row is no whole number of blocks."""
    fields = NF4.encode(weight(5, k))
    bytes_ = fields["codes"].int()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).view(-1)[: 5 * k]
    meant = code()[codes] * fields["absmax"].repeat_interleave(64)[: 5 * k]
    assert torch.equal(NF4.decode(fields, 5, k, "nf4", torch.float32), meant.view(5, k))


@pytest.mark.parametrize("compiled", [True, False], ids=["numba", "plain"])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (64, 64), (96, 192), (160, 128), (288, 64)])
def test_packing_is_bitsandbytes_own_and_can_be_undone(
    n: int, k: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled and NUMBA is None:
        pytest.skip("Numba is not installed")
    monkeypatch.setattr("offload.formats.nf4_cpu.kernels", lambda: NUMBA if compiled else None)
    fields = NF4.encode(weight(n, k))
    codes, state = bitsandbytes().quantize_4bit(weight(n, k), blocksize=64, quant_type="nf4")
    theirs, packed_state = bitsandbytes()._convert_weight_packed_for_cpu(codes, state)
    out = {"codes": torch.empty(n, k // 2, dtype=torch.uint8), "absmax": torch.empty(k // 64, n, dtype=torch.bfloat16)}
    NF4.pack(fields, n, k, "nf4", out)
    assert torch.equal(out["codes"], theirs)
    assert torch.equal(out["absmax"], packed_state.absmax)
    assert torch.equal(unpack_codes(out["codes"]), fields["codes"])
    again = torch.empty_like(theirs)
    pack_codes(fields["codes"], again)
    assert torch.equal(again, theirs)


@pytest.mark.skipif(not has_packed_kernel(), reason="this CPU has no AVX512-BF16")
def test_only_shapes_that_the_kernel_takes_are_packed() -> None:
    assert NF4.packed(96, 192, "nf4", "cpu") is not None
    assert NF4.packed(96, 192, "nf4", "cuda") is None
    assert NF4.packed(90, 192, "nf4", "cpu") is None
    assert NF4.packed(96, 200, "nf4", "cpu") is None


def test_without_the_fast_kernel_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.formats.nf4.has_packed_kernel", lambda: False)
    assert NF4.packed(96, 192, "nf4", "cpu") is None
    w, x = weight(96, 192), weight(3, 192)
    fields = NF4.encode(w)
    assert torch.equal(NF4.linear(x, fields, 96, 192, "nf4"), x @ NF4.decode(fields, 96, 192, "nf4", x.dtype).T)


def test_importing_bitsandbytes_says_nothing() -> None:
    code = "from offload.formats.nf4 import bitsandbytes; bitsandbytes()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout + run.stderr == ""
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET
