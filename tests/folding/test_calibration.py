"""Statistics of a base over a calibration text, against plain autograd through the whole model."""

import pytest
import torch

from rrt.errors import UserError
from rrt.folding import calibration
from rrt.folding.calibration import FIRST_TOKEN_WEIGHT, TextPass, add_gram
from rrt.folding.views import FoldedNorms
from tests.util.calibration import ROWS, folded_base, loaded, measure, recorded_pass
from tests.util.models import ALL_FAMILIES

CPU = torch.device("cpu")


@pytest.fixture
def exact_products(monkeypatch):
    """Passes over the text in fp32, on every CPU."""
    monkeypatch.setattr(calibration, "products_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: folded_base(root / family, family, num_layers=3) for family in ALL_FAMILIES}


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_folding_of_norms_is_exact_in_fp64(bases, family):
    folded = bases[family]
    original = loaded(folded._source)(ROWS)
    difference = (loaded(folded)(ROWS) - original).abs().max()
    assert difference < 1e-12 * original.abs().max()
    assert difference > 0


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_statistics_are_those_of_autograd_through_the_whole_model(bases, family, keep, tmp_path, exact_products):
    found = measure(bases[family], tmp_path / "work", keep=keep)
    seen = recorded_pass(bases[family], ROWS)
    assert found.keys() == seen.keys()
    for key, (inputs, gradients, _) in seen.items():
        weights = gradients.square().sum(1)
        expected = inputs.T @ (inputs * weights[:, None])
        torch.testing.assert_close(
            found[key].metric.inputs.double(), expected, rtol=0, atol=1e-4 * float(expected.max())
        )
        expected = gradients.T @ (gradients * inputs.square().sum(1)[:, None])
        torch.testing.assert_close(
            found[key].metric.outputs.double(), expected, rtol=0, atol=1e-4 * float(expected.max())
        )
        torch.testing.assert_close(
            found[key].token_weights.double(), weights, rtol=1e-3, atol=1e-4 * float(weights.max())
        )


def test_products_of_16_bits_are_close(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "products_dtype", lambda device: torch.bfloat16)
    found = measure(bases["llama"], tmp_path / "work")
    for key, (inputs, gradients, _) in recorded_pass(bases["llama"], ROWS).items():
        expected = inputs.T @ (inputs * gradients.square().sum(1)[:, None])
        assert (found[key].metric.inputs - expected).norm() < 0.1 * expected.norm()


def test_inputs_metric_has_no_outputs(bases, tmp_path, exact_products):
    both, inputs = (measure(bases["llama"], tmp_path / metric, metric=metric) for metric in ("both", "inputs"))
    for key, linear in inputs.items():
        assert linear.metric.outputs is None
        torch.testing.assert_close(linear.metric.inputs, both[key].metric.inputs)


@pytest.mark.parametrize("family", ["gemma", "gpt_neox"])
def test_activation_metric_minds_the_first_token_and_the_length_of_the_stream(bases, family, tmp_path, exact_products):
    found = measure(bases[family], tmp_path / "work", metric="activations")
    model = loaded(bases[family])
    streams = []
    for layer in model.stack.layers:
        layer.register_forward_hook(lambda _, __, output: streams.append(output.flatten(0, 1)))
    with torch.no_grad():
        model(ROWS[:, :-1])
    position = torch.ones(ROWS[:, 1:].shape).double()
    position[:, 0] = FIRST_TOKEN_WEIGHT
    for (depth, name), (inputs, _, _) in recorded_pass(bases[family], ROWS).items():
        weights = position.flatten()
        if name in ("attn.out", "mlp.down"):
            weights = weights / streams[depth].square().sum(1)
        expected = inputs.T @ (inputs * weights[:, None])
        statistics = found[depth, name]
        torch.testing.assert_close(
            statistics.metric.inputs.double(), expected, rtol=0, atol=1e-4 * float(expected.max())
        )
        torch.testing.assert_close(statistics.token_weights.double(), weights, rtol=1e-4, atol=0)
        assert statistics.metric.outputs is None


class ZeroEmbedding(FoldedNorms):
    """A base one token of which has an embedding of zeros."""

    def __init__(self, source, token):
        super().__init__(source)
        self.token = token

    def get(self, name):
        tensor = super().get(name)
        if name == "embed":
            tensor = tensor.clone()
            tensor[self.token] = 0.0
        return tensor


def test_a_stream_of_zeros_does_not_spoil_the_activation_metric(bases, tmp_path, exact_products):
    source = ZeroEmbedding(bases["llama"]._source, int(ROWS[0, 0]))
    for (_, name), statistics in measure(source, tmp_path / "work", metric="activations").items():
        assert statistics.metric.inputs.isfinite().all()
        assert (statistics.token_weights[0] == 0.0) == (name in ("attn.out", "mlp.down"))


def test_rows_are_taken_in_batches(bases, tmp_path, monkeypatch, exact_products):
    whole = measure(bases["llama"], tmp_path / "whole")
    monkeypatch.setattr(calibration, "_BATCH_TOKENS", 48)
    monkeypatch.setattr(calibration, "_LOGITS_AT_ONCE", 1)
    batched = measure(bases["llama"], tmp_path / "batched")
    for key, statistics in whole.items():
        torch.testing.assert_close(batched[key].metric.inputs, statistics.metric.inputs, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(batched[key].token_weights, statistics.token_weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 4, 7, 64])
def test_a_weighted_gram_matrix_is_whole_and_symmetric(width):
    generator = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(30, width, generator=generator), torch.rand(30, generator=generator)
    found = add_gram(add_gram(None, vectors[:10], weights[:10]), vectors[10:], weights[10:])
    torch.testing.assert_close(found, vectors.T @ (vectors * weights[:, None]))
    torch.testing.assert_close(found, found.T)


class Broken(FoldedNorms):
    """A base with one weight so large that its layer's sums overflow."""

    def __init__(self, source, name):
        super().__init__(source)
        self.name = name

    def get(self, name):
        tensor = super().get(name)
        return tensor.double() * 5e38 if name == self.name else tensor


@pytest.mark.parametrize(
    ("name", "place"),
    [("stack.layers.1.mlp.up.weight", "layer 1, mlp.up"), ("stack.layers.2.attn.k.weight", "layer 2, attn.k")],
)
def test_values_that_are_not_finite_are_an_error_that_names_depth_and_linear(bases, name, place, tmp_path):
    with pytest.raises(UserError, match=f"{place}: found NaN or infinity in its output"):
        measure(Broken(bases["llama"]._source, name), tmp_path / "work")


def test_gradients_that_are_not_finite_are_an_error(bases, tmp_path, monkeypatch, exact_products):
    gradient = TextPass.loss_gradient
    monkeypatch.setattr(TextPass, "loss_gradient", lambda *arguments: gradient(*arguments) * torch.inf)
    with pytest.raises(UserError, match=r"layer 2, attn.q: found NaN or infinity in its gradient"):
        measure(bases["llama"], tmp_path / "work")
