"""The embedded diffusion policy: its task, its pipeline, its training, and the cache on it."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import blockcache
from blockcache.pipelines.embedded.policy import task, train_policy
from blockcache.pipelines.embedded.policy.model import PolicyTransformer
from blockcache.pipelines.embedded.policy.pipeline import (
    FOLDER,
    PolicyPipeline,
    load_pipeline,
    read,
    roll_out,
    written,
)
from blockcache.plan import Every, MaskTable, Recipe, Rule, Site


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def state(agent, disc, goal):
    return torch.tensor([[agent, disc, goal]], dtype=torch.float32)


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    pipe = PolicyPipeline(PolicyTransformer(width=32, layers=3), train_policy.make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def trained():
    return load_pipeline()


def with_sampler(pipe, kind):
    """The same weights with another sampler."""
    made = PolicyPipeline(pipe.transformer, kind.from_config(pipe.scheduler.config))
    made.set_progress_bar_config(disable=True)
    return made


# The task.


def test_an_agent_that_touches_nothing_moves_alone():
    before = state((-0.5, 0.0), (0.0, 0.0), (0.5, 0.0))
    after = task.act(before, torch.tensor([[0.6, 0.8]]))
    assert after[0, 0].tolist() == pytest.approx([-0.5 + 0.036, 0.048])
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_actions_are_no_longer_than_one():
    before = state((-0.5, 0.0), (0.0, 0.0), (0.5, 0.0))
    after = task.act(before, torch.tensor([[3.0, 4.0]]))
    assert (after - before)[0, 0].norm().item() == pytest.approx(task.SPEED)


def test_a_disc_hit_from_behind_is_pushed_ahead():
    before = state((-task.CONTACT, 0.0), (0.0, 0.0), (0.5, 0.0))
    after = task.act(before, torch.tensor([[1.0, 0.0]]))
    assert after[0, 1].tolist() == pytest.approx([task.SPEED, 0.0], abs=1e-6)


def test_a_disc_hit_off_centre_slips_away():
    angle = 0.3
    agent = (-task.CONTACT * math.cos(angle), task.CONTACT * math.sin(angle))
    current = state(agent, (0.0, 0.0), (0.5, 0.0))
    for _ in range(3):
        current = task.act(current, torch.tensor([[1.0, 0.0]]))
    assert current[0, 1, 1] < -0.02
    assert (current[0, 0] - current[0, 1]).norm() >= task.CONTACT - 1e-6


def test_a_disc_at_the_edge_stops_the_agent():
    edge = 1 - task.DISC_RADIUS
    current = state((edge - task.CONTACT, 0.0), (edge, 0.0), (0.0, 0.0))
    after = task.act(current, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(after, current, atol=1e-6)


def test_observation_is_relative():
    seen = task.observe(state((0.1, 0.2), (0.4, 0.0), (0.3, 0.5)))
    assert seen[0].tolist() == pytest.approx([0.1, 0.2, 0.3, -0.2, -0.1, 0.5])


def test_starts_are_clear_of_one_another():
    agent, disc, goal = task.draw(500, random()).unbind(1)
    assert (agent - disc).norm(dim=-1).min() > task.CONTACT
    assert (goal - disc).norm(dim=-1).min() >= 0.3
    assert agent.abs().max() <= 1 and disc.abs().max() <= 0.6


@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.99), (0.5, 0.85)])
def test_the_expert_succeeds_even_if_disturbed(noise, share):
    states, _ = task.demonstrate(500, random(), noise)
    done = torch.stack([task.is_done(state) for state in states]).any(0)
    assert done.float().mean() >= share


def test_intended_actions_are_what_an_undisturbed_expert_does():
    states, side = task.demonstrate(20, random())
    actions = task.intended(states[3], side, 16)
    assert actions.shape == (20, 16, 2)
    assert actions.norm(dim=-1).max() <= 1 + 1e-5
    current = states[3]
    for k in range(16):
        current = task.act(current, actions[:, k])
    assert torch.allclose(current, states[19], atol=1e-6)


def test_from_the_front_there_are_two_ways_round():
    """The same start, and the disc is passed on either side as asked."""
    front = state((0.4, 0.0), (0.0, 0.0), (0.8, 0.0)).repeat(2, 1, 1)
    side = torch.tensor([-1.0, 1.0])
    for _ in range(8):
        front = task.act(front, task.expert(front, side))
    above = front[:, 0, 1]
    assert above[0] < -0.1 and above[1] > 0.1


# The pipeline.


def test_situations_in_words():
    frames = task.draw(6, random()).view(3, 2, 3, 2)
    expected = torch.stack([task.observe(frames[:, 0]), task.observe(frames[:, 1])], 1)
    assert torch.allclose(read(written(frames)), expected, atol=2e-4)
    alone = written(frames[:, 1:])
    assert torch.equal(read(alone)[:, 0], read(alone)[:, 1])
    assert torch.equal(read(alone[0])[0], read(alone)[0])


@pytest.mark.parametrize("prompt", ["a red circle", "1 2 3", [], "0 0 0 0 0 0 | 1"])
def test_prompts_that_are_no_situation(untrained, prompt):
    with pytest.raises(ValueError, match="expected situations such as"):
        untrained(prompt)


def test_neither_or_both(untrained):
    for given in ({}, {"prompt": "0 0 0.5 0 0.5 0.5", "observation": torch.zeros(1, 2, 6)}):
        with pytest.raises(ValueError, match="either prompt or observation"):
            untrained(**given)


def test_call(untrained):
    seen = read(written(task.draw(3, random())[:, None]))
    made = untrained(observation=seen, num_inference_steps=5, generator=random())
    assert made.actions.shape == (3, 16, 2)
    again = untrained(
        written(task.draw(3, random())[:, None]),
        num_inference_steps=5,
        generator=random(),
        output_type="np",
        return_dict=False,
    )[0]
    assert torch.equal(torch.from_numpy(again), made.actions)


def test_latents_after_every_step(untrained):
    found = []
    made = untrained(
        "0 0 0.5 0 0.5 0.5",
        num_inference_steps=4,
        generator=random(),
        callback_on_step_end=lambda pipe, i, t, given: found.append((i, int(t), given["latents"])),
    )
    assert [i for i, *_ in found] == [0, 1, 2, 3]
    assert [t for _, t, _ in found] == untrained.scheduler.timesteps.tolist()
    assert torch.equal(found[-1][2], made.actions)


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_samplers(untrained, kind):
    """They start from the trained noise level: 100 training steps are passed on."""
    pipe = with_sampler(untrained, kind)
    made = pipe("0 0 0.5 0 0.5 0.5", num_inference_steps=4, generator=random()).actions
    assert made.isfinite().all()
    assert 70 <= pipe.scheduler.timesteps.max() <= 99


def test_saved_and_loaded(untrained, tmp_path):
    untrained.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    runs = [
        pipe("0 0 0.5 0 0.5 0.5", num_inference_steps=3, generator=random()).actions
        for pipe in (untrained, again)
    ]
    assert torch.allclose(*runs, atol=1e-5)


# In the simulator.


def test_roll_out_of_the_expert():
    """The expert, asked for one chunk at a time, succeeds in as many steps as it does alone."""
    start, side = task.draw(50, random()), torch.ones(50)
    alone, first = start, torch.full((50,), task.LIMIT)
    for k in range(task.LIMIT):
        alone = task.act(alone, task.expert(alone, side))
        first = torch.where(task.is_done(alone) & (first == task.LIMIT), k + 1, first)

    def chunk(seen):
        agent, to_disc, to_goal = seen[:, 1].view(-1, 3, 2).unbind(1)
        current = torch.stack([agent, agent + to_disc, agent + to_disc + to_goal], 1)
        actions = []
        for _ in range(16):
            actions.append(task.expert(current, torch.ones(len(current))))
            current = task.act(current, actions[-1])
        return torch.stack(actions, 1)

    made = roll_out(chunk, start)
    assert made.success.all()
    assert (made.steps - first).abs().max() <= 1
    assert made.chunks == math.ceil(made.steps.max() / 8)
    assert torch.equal(made.states[0], start)


def test_roll_out_of_doing_nothing():
    made = roll_out(lambda seen: torch.zeros(len(seen), 16, 2), task.draw(5, random()), limit=20)
    assert not made.success.any()
    assert made.steps.tolist() == [20] * 5 and made.chunks == 3 and len(made.states) == 21


# The training.


def test_windows_are_what_the_expert_would_do_next():
    """Of two plain and two disturbed demonstrations, every state up to the success once."""
    observations, actions = train_policy.windows(4, random(3))
    assert observations.shape[1:] == (2, 6) and actions.shape[1:] == (16, 2)
    generator, expected = random(3), 0
    for noise in (0.0, train_policy.DISTURBANCE):
        states, side = task.demonstrate(2, generator, noise)
        expected += sum(int((~task.is_done(s)).sum()) for s in states[:-1])
        seen = task.observe(states[10])
        intended = task.intended(states[10], side, 16)
        for episode in range(2):
            (row,) = torch.nonzero((observations[:, 1] == seen[episode]).all(-1))[0]
            assert torch.equal(observations[row, 0], task.observe(states[9])[episode])
            assert torch.allclose(actions[row], intended[episode], atol=1e-6)
    assert len(actions) == len(observations) == expected


def test_training_reduces_the_loss():
    torch.manual_seed(0)
    model, scheduler = PolicyTransformer(width=32, layers=2), train_policy.make_scheduler()
    observations, actions = train_policy.windows(32, random())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for i in range(60):
        rows = slice(64 * (i % 8), 64 * (i % 8) + 64)
        loss = train_policy.loss_of(model, scheduler, observations[rows], actions[rows], random(i))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_the_command_writes_a_folder_that_loads(tmp_path, monkeypatch):
    command = f"train_policy --out {tmp_path / 'made'} --steps 3 --batch 4"
    monkeypatch.setattr("sys.argv", command.split())
    train_policy.main()
    pipe = load_pipeline(tmp_path / "made")
    assert pipe.transformer.dtype == torch.float32
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"


# The weights that ship.


def test_folder_is_small_and_complete():
    files = [path for path in Path(FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3 * 2**20
    assert {"README.md", "model_index.json", "train_log.json"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix == ".py"]


def test_the_trained_policy_succeeds(trained):
    """With a tenth of the steps, for the time; benchmarks/policy.py has the full figures."""
    pipe, noise = with_sampler(trained, DDIMScheduler), random(1)

    def chunk(seen):
        return pipe(observation=seen, num_inference_steps=10, generator=noise).actions

    assert roll_out(chunk, task.draw(40, random(77))).success.float().mean() >= 0.8


def test_the_trained_policy_goes_round_both_ways(trained):
    """From the front the demonstrations go either way, and so do the samples."""
    front = state((0.4, 0.0), (0.0, 0.0), (0.8, 0.0))
    seen = task.observe(front)[:, None].repeat(24, 2, 1)
    pipe = with_sampler(trained, DDIMScheduler)
    actions = pipe(observation=seen, num_inference_steps=20, generator=random()).actions
    sideways = actions[:, :8, 1].sum(1)
    assert (sideways > 1).sum() >= 4 and (sideways < -1).sum() >= 4


# The cache.

KINDS = ("attn", "cross", "mlp")


@torch.no_grad()
def cached_by_hand(pipe, seen, rows, steps, generator):
    """The sampling loop and the blocks written out, each sub-layer on its own schedule."""
    model, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(steps)
    shape = (len(seen), model.config.horizon, 2)
    actions = torch.randn(shape, generator=generator)
    kept = {}
    for i, t in enumerate(scheduler.timesteps):
        wave = model.time_wave(t.expand(len(seen)))
        context = torch.cat([model.time_in(wave)[:, None], model.observation_in(seen)], 1)
        context = context + model.context_place
        tokens = model.action_in(actions) + model.action_place
        for b, block in enumerate(model.transformer_blocks):
            if i in rows["attn"][b]:
                kept["attn", b] = block.self_attn(block.norm1(tokens))
            tokens = tokens + kept["attn", b]
            if i in rows["cross"][b]:
                kept["cross", b] = block.cross_attn(
                    block.norm2(tokens), encoder_hidden_states=context
                )
            tokens = tokens + kept["cross", b]
            if i in rows["mlp"][b]:
                kept["mlp", b] = block.mlp(block.norm3(tokens))
            tokens = tokens + kept["mlp", b]
        noise = model.proj_out(model.norm_out(tokens))
        actions = scheduler.step(noise, t, actions, generator=generator).prev_sample
    return actions


def recipe_of(rows, steps):
    rules = [
        Rule(Site(kind), MaskTable(tuple(map(tuple, rows[kind])), steps), payload="output")
        for kind in KINDS
    ]
    return Recipe(tuple(rules))


def test_each_sub_layer_on_its_own_schedule(untrained):
    steps = 12
    rows = {
        kind: [(0, *range(2 + b + k, steps, 2 + b * k)) for b in range(3)]
        for k, kind in enumerate(KINDS)
    }
    seen = read(written(task.draw(2, random())[:, None]))
    expected = cached_by_hand(untrained, seen, rows, steps, random(5))
    with blockcache.enabled(untrained, recipe_of(rows, steps)):
        made = untrained(observation=seen, num_inference_steps=steps, generator=random(5)).actions
    assert torch.allclose(made, expected, atol=1e-6)
    plain = untrained(observation=seen, num_inference_steps=steps, generator=random(5)).actions
    assert not torch.allclose(made, plain, atol=1e-3)


def test_computing_everything_changes_nothing(untrained):
    seen = read(written(task.draw(2, random())[:, None]))

    def run():
        return untrained(observation=seen, num_inference_steps=4, generator=random(5)).actions

    plain = run()
    never = Recipe(tuple(Rule(Site(kind), Every(1), payload="output") for kind in KINDS))
    with blockcache.enabled(untrained, never):
        assert torch.equal(run(), plain)
    assert torch.equal(run(), plain)
