import copy

import numpy as np
import pytest
import torch

import blockcache
from blockcache.engine.hooks import attachment_of
from blockcache.errors import BlockCacheError, PlanMismatchError, UnsupportedModelError
from blockcache.plan import Taylor
from blockcache.plan.trace import Trace
from blockcache.tuning.trace import trace

PROMPTS = ["a small red robot", "a blue robot walks over the snow"]
STEPS = 6


def call_of(tiny, steps=STEPS, **changes):
    kwargs = {k: v for k, v in tiny.kwargs.items() if k not in ("prompt", "class_labels")}
    return {**kwargs, "num_inference_steps": steps, **changes}


def prompts_of(tiny):
    return ["1", "2"] if "class_labels" in tiny.kwargs else PROMPTS


class Collector:
    """Payloads of a run by plain hooks of PyTorch, the library not involved."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.blocks = [*tiny.denoiser.transformer_blocks, *tiny.denoiser.single_transformer_blocks]

    def run(self, prompt, seed):
        entered, left, outputs, handles = [], [], [], []
        first, last = self.blocks[0], self.blocks[-1]
        handles.append(
            first.register_forward_pre_hook(
                lambda m, a, k: entered.append(k["hidden_states"].clone()), with_kwargs=True
            )
        )
        handles.append(last.register_forward_hook(lambda m, a, o: left.append(o[1].clone())))
        handles.append(
            self.tiny.denoiser.register_forward_hook(lambda m, a, o: outputs.append(o[0].clone()))
        )
        generator = torch.Generator().manual_seed(seed)
        call = {**call_of(self.tiny), "prompt": prompt, "generator": generator}
        self.latents = self.tiny.pipe(**call, output_type="latent")[0]
        for handle in handles:
            handle.remove()
        residuals = [b - a for a, b in zip(entered, left, strict=True)]
        return [torch.stack(x).flatten(1).double().numpy() for x in (residuals, outputs)]


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


def test_teacher_forced_errors_agree_with_those_measured_directly(flux):
    found = trace(flux.pipe, PROMPTS, [3, 4], **call_of(flux))
    predictor, anchors, at = Taylor(2), (3, 1, 0), 5
    weights = predictor.weights(found.steps[at], [found.steps[a] for a in anchors])
    for p, (prompt, seed) in enumerate(zip(PROMPTS, [3, 4], strict=True)):
        direct = Collector(flux)
        payloads = direct.run(prompt, seed)
        sites = (found.at("stack"), found.at("model", 0, "output"))
        for site, y in zip(sites, payloads, strict=True):
            guess = sum(w * y[a] for w, a in zip(weights, anchors, strict=True))
            error = ((y[at] - guess) ** 2).mean()
            assert site.errors(at, anchors, weights)[p] == pytest.approx(error, rel=1e-5)
            l1 = np.abs(y[4] - y[2]).mean()
            assert site.l1[p, 4, 2] == pytest.approx(l1, rel=1e-5)
            assert site.size[p, 2] == pytest.approx(np.abs(y[2]).mean(), rel=1e-5)
        np.testing.assert_allclose(found.latents[p], direct.latents.numpy(), atol=1e-6)


def test_magnitudes_are_ratios_of_token_norms(flux):
    found = trace(flux.pipe, PROMPTS[:1], [3], scopes=("stack",), **call_of(flux))
    residual, _ = Collector(flux).run(PROMPTS[0], 3)
    width = flux.denoiser.inner_dim
    norms = np.linalg.norm(residual.reshape(STEPS, -1, width), axis=-1)
    expected = [1.0, *(norms[1:] / norms[:-1]).mean(1)]
    np.testing.assert_allclose(found.at("stack").magnitude[0], expected, rtol=1e-4)


def test_every_pipeline_can_be_traced_and_is_left_as_it_was(tiny):
    before = tiny.generate()
    found = trace(tiny.pipe, prompts_of(tiny), **call_of(tiny, 4))
    assert attachment_of(tiny.denoiser) is None
    assert np.array_equal(tiny.generate(), before)
    total = len(found.sigmas)
    assert found.latents.shape[0] == 2 and total == len(found.steps) >= 4
    blocks = [index for index, _ in found.each("block")]
    assert blocks == list(range(found.layout.blocks))
    for site in found.sites.values():
        assert site.gram.shape == site.l1.shape == (2, total, total)
        assert np.isfinite(site.gram).all() and (site.size > 0).all()
        np.testing.assert_allclose(site.gram, site.gram.transpose(0, 2, 1))
    assert found.milliseconds["computed"] > 0 and len(found.block_ms) == found.layout.blocks


def test_sub_layers_are_traced_in_the_order_of_their_rows(build_tiny):
    wan = build_tiny("wan", layers=3)
    found = trace(wan.pipe, PROMPTS[:1], scopes=("attn", "cross", "mlp"), **call_of(wan, 3))
    for scope in ("attn", "cross", "mlp"):
        assert [index for index, _ in found.each(scope)] == [0, 1, 2]
    assert {place.scope for place in found.sites} == {"attn", "cross", "mlp"}


def test_the_modulated_input_is_what_the_first_attention_gets(flux):
    seen = []
    attention = flux.denoiser.transformer_blocks[0].attn
    handle = attention.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["hidden_states"].clone()), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(7)
    flux.pipe(prompt=PROMPTS[0], generator=generator, output_type="latent", **call_of(flux))
    handle.remove()
    found = trace(flux.pipe, PROMPTS[:1], [7], **call_of(flux)).at("time", 0, "input")
    pairs = zip(seen, seen[1:], strict=False)
    change = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairs]
    np.testing.assert_allclose(found.change()[1:], change, rtol=1e-4)


def test_large_payloads_are_estimated_on_part_of_their_elements(flux, monkeypatch):
    exact = trace(flux.pipe, PROMPTS[:1], scopes=("stack",), **call_of(flux)).at("stack")
    monkeypatch.setattr("blockcache.tuning.trace.ELEMENTS", exact.numel // 4)
    part = trace(flux.pipe, PROMPTS[:1], scopes=("stack",), **call_of(flux)).at("stack")
    assert part.numel == exact.numel
    error = np.abs(part.gram - exact.gram).max() / np.abs(exact.gram).max()
    assert 1e-6 < error < 0.15


def test_an_interrupted_trace_goes_on(flux, tmp_path, monkeypatch):
    done = []

    def stop(count, total):
        done.append(count)
        if count == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(flux.pipe, PROMPTS, out=tmp_path, on_progress=stop, **call_of(flux))
    assert attachment_of(flux.denoiser) is None
    assert Trace.load(tmp_path).prompts == (PROMPTS[0],)
    first = (tmp_path / "000.safetensors").stat().st_mtime_ns
    again = trace(flux.pipe, PROMPTS, out=tmp_path, **call_of(flux))
    assert (tmp_path / "000.safetensors").stat().st_mtime_ns == first
    whole = trace(flux.pipe, PROMPTS, **call_of(flux))
    for place, site in whole.sites.items():
        np.testing.assert_allclose(again.sites[place].gram, site.gram, rtol=1e-6)


def test_a_folder_with_another_trace_is_refused(flux, tmp_path):
    trace(flux.pipe, PROMPTS[:1], out=tmp_path, scopes=("stack",), **call_of(flux))
    with pytest.raises(PlanMismatchError, match="other prompts, seeds"):
        trace(flux.pipe, PROMPTS, out=tmp_path, **call_of(flux))
    with pytest.raises(PlanMismatchError, match="other settings"):
        trace(flux.pipe, PROMPTS[:1], out=tmp_path, **call_of(flux, 7))


def test_a_trace_is_refused_on_another_model(flux, build_tiny):
    found = trace(flux.pipe, PROMPTS[:1], scopes=("stack",), **call_of(flux))
    other = build_tiny("flux", layers=3)
    with pytest.raises(PlanMismatchError, match="another configuration"):
        found.check(blockcache.plan_for(other.pipe, "fast").fingerprint)


def test_bad_arguments_are_refused(flux):
    with pytest.raises(BlockCacheError, match="no prompts"):
        trace(flux.pipe, [], **call_of(flux))
    with pytest.raises(BlockCacheError, match="trace.. sets generator"):
        trace(flux.pipe, PROMPTS, generator=None, **call_of(flux))
    flux.pipe.transformer_2 = copy.deepcopy(flux.denoiser)
    with pytest.raises(UnsupportedModelError, match="2 denoisers"):
        trace(flux.pipe, PROMPTS, **call_of(flux))


def test_a_folder_of_other_weights_is_refused(flux, tmp_path):
    """Class and config are the same; figures found with one are not those of the other."""
    trace(flux.pipe, PROMPTS, out=tmp_path, **call_of(flux))
    trace(flux.pipe, PROMPTS, out=tmp_path, **call_of(flux))
    with torch.no_grad():
        for weight in flux.denoiser.parameters():
            weight.mul_(1.3)
    with pytest.raises(PlanMismatchError, match=r"other runs \(other weights or inputs\)"):
        trace(flux.pipe, PROMPTS, out=tmp_path, **call_of(flux))
