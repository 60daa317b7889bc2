"""The task of the embedded policy: push a disc onto a goal, on a table seen from above.

The agent is itself a disc. Contact is quasi-static and without friction between the two: where they
overlap, the disc gives way along the line of centres. Pushing is therefore unstable, a disc that is
not hit from exactly behind slips away, and coming from the front there are two ways round.
Everything is a function of batches, so that thousands of episodes run at once.

A state is a tensor `[N, 3, 2]`: agent, disc and goal, x and y in -1..1 (the table's edges).
"""

from typing import NamedTuple

import torch

AGENT_RADIUS, DISC_RADIUS = 0.07, 0.13
CONTACT = AGENT_RADIUS + DISC_RADIUS
SPEED = 0.06
"""Farthest the agent moves in one control step."""
NEAR = 0.05
"""Distance between disc and goal that counts as success."""
LIMIT = 80
"""Control steps in an episode."""
OBSERVATION_SIZE, ACTION_SIZE = 6, 2

_SUBSTEPS = 4
_SPAWN = 0.6
_ROUND = CONTACT + 0.06
_AHEAD = 0.5
_FRONT = 2.3
_ALIGNED = 0.35


def draw(n: int, generator: torch.Generator) -> torch.Tensor:
    """`n` random starts: disc and goal well inside the table, the agent anywhere clear of both."""

    def places(reach: float) -> torch.Tensor:
        return (2 * torch.rand(n, 2, generator=generator) - 1) * reach

    disc, goal, agent = places(_SPAWN), places(_SPAWN), places(1 - AGENT_RADIUS)
    while (bad := (goal - disc).norm(dim=-1) < 0.3).any():
        goal = torch.where(bad[:, None], places(_SPAWN), goal)
    while (bad := (agent - disc).norm(dim=-1) < CONTACT + 0.02).any():
        agent = torch.where(bad[:, None], places(1 - AGENT_RADIUS), agent)
    return torch.stack([agent, disc, goal], 1)


def act(state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """The state after one control step. action: `[N, 2]`, displacement in units of SPEED."""
    agent, disc, goal = state.unbind(1)
    length = action.norm(dim=-1, keepdim=True).clamp(min=1)
    move = action / length * (SPEED / _SUBSTEPS)
    for _ in range(_SUBSTEPS):
        agent = (agent + move).clamp(AGENT_RADIUS - 1, 1 - AGENT_RADIUS)
        disc = _clear(disc, agent).clamp(DISC_RADIUS - 1, 1 - DISC_RADIUS)
        # A disc at the edge cannot give way; then the agent does.
        agent = _clear(agent, disc)
    return torch.stack([agent, disc, goal], 1)


def _clear(moved: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """`moved`, pushed away from `fixed` until they only touch."""
    between = moved - fixed
    distance = between.norm(dim=-1, keepdim=True)
    touching = fixed + between / distance.clamp(min=1e-6) * CONTACT
    return torch.where(distance < CONTACT, touching, moved)


def is_done(state: torch.Tensor) -> torch.Tensor:
    """`[N]`: whether the disc lies on the goal."""
    distance: torch.Tensor = (state[:, 1] - state[:, 2]).norm(dim=-1)
    return distance < NEAR


def observe(state: torch.Tensor) -> torch.Tensor:
    """`[N, 6]`: where the agent is, the disc from there, and the goal from the disc."""
    agent, disc, goal = state.unbind(1)
    return torch.cat([agent, disc - agent, goal - disc], -1)


def expert(state: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The scripted demonstrator's action, `[N, 2]` of length at most 1.

    It goes round the disc at a distance until it is behind it as seen from the goal, then pushes,
    forward only as far as it is well aligned. side: `[N]` of -1 or 1, the way round that it takes
    where both are about equally long; elsewhere the shorter one.
    """
    agent, disc, goal = state.unbind(1)
    left = goal - disc
    distance = left.norm(dim=-1, keepdim=True)
    forward = left / distance.clamp(min=1e-6)
    place = agent - disc
    angle = _angle(place, -forward)
    shorter = torch.where(angle > 0, -1.0, 1.0)
    turn = torch.where(angle.abs() > _FRONT, side, shorter)
    step = angle.abs().clamp(max=_AHEAD) * turn
    radius = place.norm(dim=-1, keepdim=True)
    round_it = disc + _rotated(place / radius, step) * _ROUND
    share = (1 - angle.abs() / _ALIGNED).clamp(min=0)[:, None]
    push = disc - forward * (CONTACT - share * distance.clamp(max=SPEED))
    target = torch.where(angle.abs()[:, None] > _ALIGNED, round_it, push)
    action = (target - agent) / SPEED
    action = action / action.norm(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(distance < NEAR / 4, torch.zeros_like(action), action)


def _angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Signed angle from `b` to `a` in -pi..pi."""
    cross = b[:, 0] * a[:, 1] - b[:, 1] * a[:, 0]
    return torch.atan2(cross, (a * b).sum(-1))


def _rotated(vector: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    cos, sin = angle.cos(), angle.sin()
    x, y = vector.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


class Demonstrations(NamedTuple):
    """states: `[LIMIT + 1, N, 3, 2]`. side: `[N]`, the way round that the expert preferred."""

    states: torch.Tensor
    side: torch.Tensor


def demonstrate(n: int, generator: torch.Generator, noise: float = 0.0) -> Demonstrations:
    """`n` episodes of the expert.

    noise: size of a slowly changing disturbance of what it does, as a share of its speed. It meets
    states that it would not get into by itself, and shows how to get out of them.
    """
    states = [draw(n, generator)]
    side = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    disturbance = torch.zeros(n, 2)
    for _ in range(LIMIT):
        disturbance = 0.8 * disturbance + 0.6 * noise * torch.randn(n, 2, generator=generator)
        states.append(act(states[-1], expert(states[-1], side) + disturbance))
    return Demonstrations(torch.stack(states), side)


def intended(state: torch.Tensor, side: torch.Tensor, steps: int) -> torch.Tensor:
    """What the expert would do from here on if nothing disturbed it: `[N, steps, 2]`."""
    actions = []
    for _ in range(steps):
        actions.append(expert(state, side))
        state = act(state, actions[-1])
    return torch.stack(actions, 1)
