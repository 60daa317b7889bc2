"""Processes that share a sample decide alike; processes that do not leave each other alone.

One pair of gloo processes runs the code below, for starting Python costs more than all of it, and
hands back JSON for the tests to look at.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

WORKER = """
import json, logging, sys
from datetime import timedelta
import torch, torch.distributed as dist
torch.set_num_threads(1)
rank, meeting = int(sys.argv[1]), sys.argv[2]
patience = timedelta(seconds=60)
dist.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=patience
)
import blockcache
from blockcache import Recipe, Rule, Site
from blockcache.plan import *
from toys import Denoiser, Scheduler, branches
logging.disable(logging.WARNING)
results = {}

def drive(recipe, rows, group=None, steps=8):
    # `rows`: what the tokens of this process are at each step.
    model, scheduler, out = Denoiser(), Scheduler(steps), []
    blockcache.enable(model, recipe, scheduler=scheduler, group=group)
    with torch.no_grad():
        for i in range(steps):
            scheduler.step_index = i
            x = torch.tensor(rows(i), dtype=torch.float32).view(1, -1, 1)
            out.append(model(x, scheduler.timesteps[i]).flatten().tolist())
    return dict(map=branches(model)[0]["map"], out=out, decided=branches(model)[0]["decided"])
"""

# One rule of every online kind. The tokens of rank 0 stand still, those of rank 1 move at times; by
# itself rank 0 would reuse everything. "whole" is the unsplit run of the same tokens.
SPLIT = """
rules = {
    "first_block": Rule(Site("span", 1), Gate(0.1)),
    "mean": Rule(Site("span", 1), Gate(0.1, batch="mean", reference="previous", accumulate=True)),
    "sample": Rule(Site("span", 1), Gate(0.1, batch="sample")),
    "probe": Rule(Site("span", 1), Gate(0.1, "probe", "previous", True), ProbeRatio()),
    "latent": Rule(Site("model"), Gate(0.4, "latent", accumulate=True)),
    "codebook": Rule(Site("stack"), Codebook(((0.02, 4), (0.3, 2)))),
    "verified": Rule(Site("span", 0, -1), Verified(0.2, 1.0, 0.2, 1, 3)),
    "ranked": Rule(Site("block"), Ranked(3, (1.0,), 0.5), Taylor(1)),
}
moving = [1, 1, 2, 2, 2, 7, 7, 8]
whole = lambda i: [3.0, 5.0, moving[i], 2 * moving[i]]
mine = lambda i: whole(i)[2 * rank : 2 * rank + 2]
results["split"] = {
    name: dict(
        split=drive(Recipe((rule,)), mine, dist.group.WORLD),
        whole=drive(Recipe((rule,)), whole),
        alone=drive(Recipe((rule,)), mine),
    )
    for name, rule in rules.items()
}
"""

# The group exists, but is not theirs. One makes more runs, and longer ones, than the other.
REPLICAS = """
gate = Recipe((Rule(Site("span", 1), Gate(0.1)),))
walk = lambda i: [1.0 + rank * i]
results["replicas"] = [drive(gate, walk, steps=8 + rank) for _ in range(1 + rank)]
"""

ALONE = """
groups = [dist.new_group([i]) for i in range(2)]
late = lambda i: [1.0, 1.0 + (i > 3) * rank]
results["alone"] = [drive(gate, late, group) for group in (groups[rank], None)]
"""

# diffusers' own context parallelism asks for an accelerator's number only to name the device.
CONTEXT_PARALLEL = """
import tiny_pipelines
from diffusers import ContextParallelConfig
torch.accelerator.device_count = lambda: 1

def generate(pipe, kwargs, recipe):
    if recipe is None:
        return tiny_pipelines.generate(pipe, kwargs, 8, 0, True), None
    with blockcache.enabled(pipe, recipe):
        return tiny_pipelines.generate(pipe, kwargs, 8, 0, True), branches(pipe)

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()

recipes = {
    "plain": None,
    "static": Recipe((Rule(Site("stack"), Every(2)),)),
    "sub-layers": Recipe((Rule(Site("attn"), Every(2)), Rule(Site("mlp"), Every(3)))),
    "gate": Recipe((Rule(Site("span", 1), Gate(0.5, accumulate=True)),)),
    "latent": Recipe((Rule(Site("model"), Gate(0.3, "latent", accumulate=True)),)),
}
for name in ("flux", "wan"):
    pipe, kwargs = tiny_pipelines.BUILDERS[name](layers=2)
    expected = {r: generate(pipe, kwargs, recipe) for r, recipe in recipes.items()}
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    results[name] = {}
    for r, recipe in recipes.items():
        out, found = generate(pipe, kwargs, recipe)
        wanted, rows = expected[r]
        figures = ("map", "decided", "part_calls_reused")
        results[name][r] = dict(
            error=relative(out, wanted), change=relative(out, expected["plain"][0]),
            ours=found and [[b[f] for f in figures] for b in found],
            unsplit=rows and [[b[f] for f in figures] for b in rows],
        )
"""

END = """
print("RESULT" + json.dumps(results))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found, rank 0's first."""
    folder = tmp_path_factory.mktemp("groups")
    script, meeting = folder / "worker.py", folder / "meeting"
    script.write_text(WORKER + SPLIT + REPLICAS + ALONE + CONTEXT_PARALLEL + END)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(meeting)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        found = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], found[0][1][-3000:]
    return [json.loads(out.split("RESULT")[1]) for out, _ in found]


KINDS = ["first_block", "mean", "sample", "probe", "latent", "codebook", "verified", "ranked"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_split_the_tokens_decide_like_the_unsplit_run(ranks, kind):
    first, second = (found["split"][kind] for found in ranks)
    assert first["split"]["map"] == second["split"]["map"] == first["whole"]["map"]
    assert first["split"]["decided"] == second["split"]["decided"] == first["whole"]["decided"]
    halves = zip(first["split"]["out"], second["split"]["out"], strict=True)
    for (ours, others), unsplit in zip(halves, first["whole"]["out"], strict=True):
        assert [*ours, *others] == pytest.approx(unsplit, rel=1e-6)
    # Something is reused; and without the group the ranks part (the ranking sees no difference).
    assert any(0 in row for row in first["split"]["map"])
    assert (first["alone"]["map"] != second["alone"]["map"]) == (kind != "ranked")


def test_ranks_with_samples_of_their_own_stay_independent(ranks):
    """Nothing is summed, so nobody waits for anybody."""
    first, second = (found["replicas"] for found in ranks)
    assert [row[-1] for row in first[0]["map"]] == [1] + [0] * 7
    # Residual 2 + i, always more than .1 from the one before.
    assert [row[-1] for row in second[0]["map"]] == [1] * 9
    assert second[0] == second[1]


def test_a_group_of_one_is_no_group(ranks):
    for found in ranks:
        grouped, plain = found["alone"]
        assert grouped == plain


@pytest.mark.parametrize("recipe", ["plain", "static", "sub-layers", "gate", "latent"])
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_diffusers_context_parallelism(ranks, name, recipe):
    """The tokens of a real transformer on two processes: the decisions of the unsplit run."""
    first, second = (found[name][recipe] for found in ranks)
    assert first["ours"] == second["ours"] == first["unsplit"]
    assert first["error"] < 1e-4
    assert (first["change"] > 1e-4) == (recipe != "plain")
