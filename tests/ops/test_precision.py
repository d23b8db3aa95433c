"""Matrix products of 16 bits on CPUs that would emulate them: computed in float32, rounded once."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from rrt.ops import precision
from tests.util.decoding import make_decoder, make_model, prefill, random_tokens
from tests.util.rounding import sum_error

ROWS = precision.MIN_UPCAST_ROWS


@pytest.fixture(autouse=True)
def emulating_cpu(monkeypatch):
    monkeypatch.setattr(precision, "_HAS_BF16_INSTRUCTIONS", False)


class Products(TorchFunctionMode):
    """Collects the dtypes that weights are multiplied in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [8 * 3, 2**25])  # the weight in parts of 3 rows, or whole
def test_a_product_is_that_of_fp32_rounded_once(dtype, at_once, monkeypatch):
    monkeypatch.setattr(precision, "_MAX_UPCAST_ELEMENTS", at_once)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, ROWS // 2, 8), (40, 8), 40))
    for used in (None, bias):
        found = precision.upcasting_linear(x, weight, used)
        expected = F.linear(x.float(), weight.float()) + (0 if used is None else used.float())
        assert found.dtype == dtype
        # Two float32 sums may round to neighbouring numbers of 16 bits.
        atol = 2 * sum_error(dtype, 9) * float((x.abs().double() @ weight.abs().double().T).max() + 4)
        torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=atol)


def test_few_rows_and_other_dtypes_stay_as_they_are():
    weight = torch.randn(5, 8)
    for x in (torch.randn(ROWS, 8), torch.randn(ROWS - 1, 8).bfloat16(), torch.randn(ROWS, 8).double()):
        with Products() as seen:
            assert torch.equal(precision.upcasting_linear(x, weight.to(x.dtype)), F.linear(x, weight.to(x.dtype)))
        assert seen.dtypes[0] == x.dtype


@torch.no_grad()
@pytest.mark.parametrize("merged_bytes", [0, 1 << 30])
def test_no_product_of_a_forward_or_of_a_prompt_is_emulated(merged_bytes):
    model = make_model(dtype=torch.bfloat16)
    decoder = make_decoder(model, merged_bytes=merged_bytes)
    decoder._prefills_packed = False  # as where PyTorch's products are the faster ones
    with Products() as seen:
        prefill(decoder, decoder.cache.allocate(), random_tokens(ROWS))
        chunk = len(seen.dtypes)
        model(random_tokens(ROWS)[None])
    assert 0 < chunk < len(seen.dtypes) and set(seen.dtypes) == {torch.float32}
