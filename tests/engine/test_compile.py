"""torch.compile, with the backend that compiles nothing: what counts is the number of graphs."""

import pytest
import torch
from torch._dynamo.utils import counters

import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import Every

STEPS = 8
HALF = Recipe((Rule(Site("stack"), Every(2)),), name="half")


@pytest.fixture(autouse=True)
def _clean_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def flux(build_tiny):
    return build_tiny("flux", layers=2)


@pytest.fixture
def expected(build_tiny):
    """(uncached, cached) without any compiling."""
    tiny = build_tiny("flux", layers=2)
    plain = run(tiny)
    blockcache.enable(tiny.pipe, HALF)
    return plain, run(tiny)


def run(tiny):
    return torch.as_tensor(tiny.generate(STEPS, latent=True))


def lists(tiny):
    return tiny.denoiser.transformer_blocks, tiny.denoiser.single_transformer_blocks


def compile_blocks(tiny):
    for blocks in lists(tiny):
        for block in blocks:
            block.compile(backend="eager")


def compile_forwards(tiny):
    for blocks in lists(tiny):
        for block in blocks:
            block.forward = torch.compile(block.forward, backend="eager")


def replace_blocks(tiny):
    for blocks in lists(tiny):
        for i in range(len(blocks)):
            blocks[i] = torch.compile(blocks[i], backend="eager")


def graphs():
    """(graphs, breaks) seen since the last question."""
    seen = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    return seen


@pytest.fixture(scope="module")
def plain_graphs(tmp_path_factory):
    """Graphs of an uncached run with compiled blocks: one a kind, and what dynamo adds itself."""
    import tiny_pipelines

    torch._dynamo.reset()
    counters.clear()
    pipe, kwargs = tiny_pipelines.flux(layers=2)
    for blocks in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
        for block in blocks:
            block.compile(backend="eager")
    tiny_pipelines.generate(pipe, kwargs, 2, latent=True)
    seen = graphs()
    torch._dynamo.reset()
    return seen


@pytest.mark.parametrize("compiling", [compile_blocks, compile_forwards, replace_blocks])
def test_blocks_compiled_before(flux, expected, plain_graphs, compiling):
    """The wrapper stays outside: as many graphs as without us, no breaks, no recompiling."""
    plain, cached = expected
    compiling(flux)
    slots = [m._compiled_call_impl for m in flux.denoiser.modules()]
    blockcache.enable(flux.pipe, HALF)
    assert torch.equal(run(flux), cached)
    assert graphs() == plain_graphs
    assert plain_graphs[0] in (2, 3)
    assert plain_graphs[1] == 0
    assert blockcache.summary(flux.pipe).as_dict()["skipped_fraction"] == 0.5
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)
    assert graphs() == (0, 0)
    assert [m._compiled_call_impl for m in flux.denoiser.modules()] == slots


def test_blocks_compiled_after(flux, expected, plain_graphs):
    """`Module.compile` overwrites the slot our hook sits in: it is taken back."""
    plain, cached = expected
    blockcache.enable(flux.pipe, HALF)
    compile_blocks(flux)
    assert torch.equal(run(flux), cached)
    assert graphs() == plain_graphs
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)
    # Still compiled, and not anew.
    assert all(block._compiled_call_impl is not None for blocks in lists(flux) for block in blocks)
    assert graphs() == (0, 0)


def test_compiled_after_and_disabled_without_a_run(flux, expected):
    plain, _ = expected
    blockcache.enable(flux.pipe, HALF)
    compile_blocks(flux)
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)
    assert graphs()[0] > 0


def test_the_hosts_own_way_of_compiling_blocks(flux, expected, plain_graphs):
    plain, cached = expected
    flux.denoiser.compile_repeated_blocks(backend="eager")
    blockcache.enable(flux.pipe, HALF)
    assert torch.equal(run(flux), cached)
    assert graphs() == plain_graphs


def wrap(tiny):
    tiny.pipe.transformer = torch.compile(tiny.pipe.transformer, backend="eager")


def in_place(tiny):
    tiny.pipe.transformer.compile(backend="eager")


@pytest.mark.parametrize("compiling", [wrap, in_place])
def test_a_model_compiled_as_a_whole_is_right_and_it_is_said_once(
    flux, expected, caplog, compiling
):
    """There nothing can be skipped; it was silent about that."""
    plain, _ = expected
    compiling(flux)
    blockcache.enable(flux.pipe, HALF)
    assert torch.equal(run(flux), plain)
    assert torch.equal(run(flux), plain)
    assert graphs() == (1, 0)
    said = [r.getMessage() for r in caplog.records if "compile" in r.getMessage().lower()]
    assert len(said) == 1
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)


def test_a_model_compiled_as_a_whole_afterwards(flux, expected):
    plain, _ = expected
    blockcache.enable(flux.pipe, HALF)
    wrap(flux)
    assert torch.equal(run(flux), plain)
    assert "compile" in str(blockcache.summary(flux.pipe))
    blockcache.disable(flux.pipe)
    assert torch.equal(run(flux), plain)
