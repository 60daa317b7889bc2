r"""Trains the embedded text-to-video model and writes a stock WanPipeline folder.

    torchrun --nproc-per-node 2 -m blockcache.pipelines.embedded.train_video --out DIR \
        --batch 4 --large 0.06 --steps N

Flow matching on the world of moving shapes, Muon for the matrices inside the blocks and AdamW for
the rest, an exponential average of the weights for export. The target is the mean of all clips that
a noisy one may come from, see video_posterior.py. A run is resumed from ``DIR/checkpoint.pt``. Most
clips are small and short, where a step is cheap; ``--large`` is the share of larger ones, up to the
size that the model is for. The learning rate is constant until the last part of ``--steps`` and
then falls linearly to zero, so the end can be chosen late: stop, and resume with another.

``--near`` teaches locality, as large video models have it: in that share of the steps a token sees
its own frame and the two nearest ones only, and in the others a penalty draws attention there.
"""

import argparse
import functools
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from blockcache.pipelines.embedded import text, world_video
from blockcache.pipelines.embedded.video_motion import motion_queries
from blockcache.pipelines.embedded.video_pipeline import (
    GRID,
    VOCABULARY,
    encode_captions,
    make_text_encoder,
    make_transformer,
    save_pipeline,
)
from blockcache.pipelines.embedded.video_posterior import Grid, Posterior
from blockcache.pipelines.embedded.video_vae import Code, fit_code
from blockcache.plan.geometry import Geometry
from blockcache.sparse.pieces import window
from blockcache.sparse.tilings import tiles

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 100
EMA_CAP = 0.995
SHARE_EVERY = 8
SMALL_GRID, LARGE_GRIDS = (4, 8, 8), ((6, 10, 10), (8, 12, 12), GRID)
LONG_GRID = (12, 6, 6)
NEAR_FRAMES = 3
STRAY_WEIGHT, STRAY_ROWS = 0.1, 32
_REPORT_S, _SAVE_S = 30, 120


class TrainingAttention:
    """Wan attention with the softmax in float32.

    Under bfloat16 autocast on a CPU the backward pass of bfloat16 attention is about four times
    slower than that of float32.

    near: Which keys are near each query, ``[tokens, tokens]``; None to let attention be.
    is_near: Whether the others are hidden. If not, ``strays`` gets each layer's penalty.
    generator: Draws the queries that the penalty looks at.
    """

    def __init__(self) -> None:
        self.near: torch.Tensor | None = None
        self.is_near = False
        self.generator: torch.Generator | None = None
        self.strays: list[torch.Tensor] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As diffusers' WanAttnProcessor, without image conditions and masks."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        with torch.autocast(query.device.type, enabled=False):
            query, key = (
                norm(x.float()).unflatten(2, (attn.heads, -1))
                for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
            )
            value = value.float().unflatten(2, (attn.heads, -1))
            if rotary_emb is not None:
                query, key = (_rotate(x, *rotary_emb) for x in (query, key))
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            near = None if rotary_emb is None else self.near
            if near is not None and not self.is_near:
                self.strays.append(stray(query, key, near, self.generator))
            mask = near if self.is_near else None
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: torch.Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def stray(
    query: torch.Tensor,
    key: torch.Tensor,
    near: torch.Tensor,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Minus the logarithm of the near keys' share of attention, mean over some queries.

    query, key: ``[batch, heads, tokens, size]``. near: ``[tokens, tokens]``.
    """
    rows = torch.randint(len(near), (STRAY_ROWS,), generator=generator)
    scores = query[:, :, rows] @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    those = scores.masked_fill(~near[rows], -torch.inf)
    share: torch.Tensor = those.logsumexp(-1) - scores.logsumexp(-1)
    return -share.mean()


@functools.cache
def near_keys(grid: Grid) -> torch.Tensor:
    """Keys in ``NEAR_FRAMES`` frames around each query, as `STA` has them: ``[tokens, tokens]``."""
    _, height, width = grid
    device = torch.device("cpu")
    frames = tiles(Geometry(*grid), (1, height, width), device)
    near = window(frames, (NEAR_FRAMES, 1, 1), device, clamped=True)[0, 0]
    tokens = height * width
    return near.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def draw_grid(seed: int, large: float, near: float = 0.0) -> tuple[Grid, bool]:
    """The clip size of a step, the same for all ranks: small, or any of the larger ones.

    Half of the small clips are long and narrow where locality is taught. The second is whether
    far frames are hidden.
    """
    pick = torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()
    is_near = pick[3] < near
    if pick[0] < large:
        return LARGE_GRIDS[int(pick[1] * len(LARGE_GRIDS))], is_near
    return (LONG_GRID if near and pick[2] < 0.5 else SMALL_GRID), is_near


def draw_timesteps(n: int, grid: Grid, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in 0..1, most of them where a clip of this size is decided.

    A fifth uniform, the rest logit-normal. Every token shows the same few facts (colours, shape,
    place, motion), so more tokens decide them at more noise: the signal needed falls with the
    square root of their number.
    """
    middle = 0.4 + 0.5 * math.log(math.prod(grid) / 256)
    t = torch.sigmoid(1.3 * torch.randn(n, generator=generator) + middle)
    is_uniform = torch.rand(n, generator=generator) < 0.2
    return torch.where(is_uniform, torch.rand(n, generator=generator), t)


class Trainer:
    """The state of a run: weights, their average, optimisers, steps taken.

    lr: Learning rate of AdamW; Muon takes twice this.
    """

    def __init__(self, *, seed: int, lr: float) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        self.code = fit_code()
        self.posterior = Posterior(self.code)
        self.transformer = make_transformer()
        self.attention = TrainingAttention()
        self.transformer.set_attn_processor(self.attention)
        self.text_encoder = make_text_encoder()
        parts = {"transformer": self.transformer, "text_encoder": self.text_encoder}
        self.modules = nn.ModuleDict(parts).train()
        self.optimizers = self._make_optimizers(lr)
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.steps = self.samples = 0
        self.log: list[tuple[int, int, float]] = []

    def _make_optimizers(self, lr: float) -> list[torch.optim.Optimizer]:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            in_block = name.startswith("transformer.blocks.") and ".norm" not in name
            (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
        adam = torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        muon = torch.optim.Muon(
            matrices,
            2 * lr,
            momentum=0.95,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=3,
        )
        for optimizer in (adam, muon):
            optimizer.param_groups[0]["base_lr"] = optimizer.param_groups[0]["lr"]
        return [adam, muon]

    def loss(self, grid: Grid, batch: int) -> torch.Tensor:
        """Mean squared error of the velocity on fresh clips."""
        # Random numbers are a function of seed, step and rank: nothing to save, and no two ranks
        # draw the same.
        g = torch.Generator().manual_seed((self.seed << 40) + self.steps * self.ranks + self.rank)
        clips = [world_video.sample_clip(g) for _ in range(batch)]
        captions = [world_video.training_caption(clip, g) for clip in clips]
        tokens = text.encode(captions, vocabulary=VOCABULARY)
        t = draw_timesteps(batch, grid, g)
        drawn = [
            self.posterior.draw(clip, grid, level, g)
            for clip, level in zip(clips, t.tolist(), strict=True)
        ]
        noisy, mean = (torch.stack([sample[i] for sample in drawn]) for i in (0, 1))
        target = (noisy - mean) / t[:, None, None, None, None]
        self.attention.generator = g
        # The text encoder is small, and its logits want float32.
        words = encode_captions(self.text_encoder, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.transformer(
                hidden_states=noisy,
                timestep=1000 * t,
                encoder_hidden_states=words,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), target)

    def step(
        self, grid: Grid, batch: int, lr_factor: float, stop: bool = False
    ) -> tuple[float, bool]:
        """One update. Returns the loss, and whether any rank asked to stop."""
        loss = self.loss(grid, batch)
        strays = self.attention.strays
        penalty = STRAY_WEIGHT * torch.stack(strays).mean() if strays else torch.zeros(())
        strays.clear()
        (loss + penalty).backward()
        for optimizer in self.optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group["base_lr"] * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.samples += batch * self.ranks
        stop = self._share_weights(stop)
        self._update_average()
        return float(loss.detach()), stop

    @torch.no_grad()
    def _share_weights(self, stop: bool) -> bool:
        """Now and then average the weights of all ranks; stop together or not at all.

        Ranks that wait for each other after each step lose much time on a busy machine.
        """
        if self.ranks == 1:
            return stop
        if self.steps % SHARE_EVERY:
            return False
        weights = list(self.modules.parameters())
        message = torch.cat([torch.tensor([float(stop)])] + [w.flatten() for w in weights])
        dist.all_reduce(message)
        message /= self.ranks
        for weight, part in zip(
            weights, message[1:].split([w.numel() for w in weights]), strict=True
        ):
            weight.copy_(part.view_as(weight))
        return bool(message[0] > 0)

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(EMA_CAP, (1 + self.steps) / (10 + self.steps))
        state = self.modules.state_dict()
        current = [state[name] for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)

    def follow_motion(self, clips: int = 72) -> None:
        """Let temporal heads follow the motion of the caption, see video_motion.py."""
        g = torch.Generator().manual_seed((self.seed << 40) - 1)
        drawn = [world_video.sample_clip(g) for _ in range(clips)]
        levels = 0.22 + 0.75 * torch.rand(clips, generator=g)
        noisy = torch.stack(
            [
                self.posterior.draw(clip, SMALL_GRID, level, g)[0]
                for clip, level in zip(drawn, levels.tolist(), strict=True)
            ]
        )
        tokens = text.encode([clip.caption() for clip in drawn], vocabulary=VOCABULARY)
        words = encode_captions(self.text_encoder, tokens)
        motion = torch.tensor([clip.motion for clip in drawn])
        changed = motion_queries(
            self.transformer, lambda: self.transformer(noisy, 1000 * levels, words), motion
        )
        logger.info("%d layers follow the motion", len(changed) // 2)
        for name, value in changed.items():
            self.modules.state_dict()[f"transformer.{name}"].copy_(value)
            self.average[f"transformer.{name}"] = value.clone()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "code": {name: getattr(self.code, name) for name in ("basis", "mean", "scale")},
            "steps": self.steps,
            "samples": self.samples,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.modules.load_state_dict(state["modules"])
        self.average = dict(state["average"])
        self.code = Code(**state["code"])
        self.posterior = Posterior(self.code)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Options are those of this command line, not of the one that wrote the checkpoint.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.steps, self.samples, self.log = state["steps"], state["samples"], state["log"]


def lr_factor(step: int, total: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last ``decay`` of ``total`` steps."""
    left = (total - step) / max(1.0, decay * total)
    return max(0.0, min(1.0, (step + 1) / WARM_UP_STEPS, left))


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write beside and rename, so that a stop in mid-write loses nothing."""
    partial = path.with_suffix(".partial")
    torch.save(trainer.state_dict(), partial)
    os.replace(partial, path)


def export(checkpoint: Path, folder: Path) -> None:
    """Write the averaged weights of a checkpoint, and its log, as a pipeline folder."""
    state = torch.load(checkpoint, weights_only=True)
    save_pipeline(state["average"], Code(**state["code"]), folder)
    names = ("step", "samples", "loss")
    rows = [dict(zip(names, row, strict=True)) for row in state["log"]]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "train_log.json").write_text(f"[\n{lines}\n]\n")


def train(
    trainer: Trainer,
    out: Path,
    *,
    batch: int,
    large: float,
    near: float,
    steps: int,
    decay: float,
    minutes: float,
) -> None:
    """Train until ``steps`` or ``minutes``; a checkpoint every two minutes and at the end."""
    started = reported = saved = time.monotonic()
    losses: list[float] = []
    stop = False
    while trainer.steps < steps and not stop:
        is_late = time.monotonic() - started > 60 * minutes
        grid, is_near = draw_grid(trainer.steps, large, near)
        trainer.attention.near = near_keys(grid) if near else None
        trainer.attention.is_near = is_near
        n = max(1, batch * math.prod(SMALL_GRID) // math.prod(grid))
        loss, stop = trainer.step(grid, n, lr_factor(trainer.steps, steps, decay), is_late)
        if grid == SMALL_GRID:
            losses.append(loss)
        now = time.monotonic()
        if trainer.rank == 0 and now - reported > _REPORT_S:
            # Larger clips have other losses, and are few.
            mean = sum(losses) / max(1, len(losses))
            trainer.log.append((trainer.steps, trainer.samples, round(mean, 4)))
            logger.info("step %d, %d samples, loss %.4f", *trainer.log[-1])
            reported, losses = now, []
        if trainer.rank == 0 and now - saved > _SAVE_S:
            save_checkpoint(trainer, out / "checkpoint.pt")
            saved = time.monotonic()
    if trainer.rank == 0:
        save_checkpoint(trainer, out / "checkpoint.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded text-to-video model.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and pipeline folder")
    parser.add_argument("--batch", type=int, default=4, help="small clips per process and step")
    parser.add_argument("--large", type=float, default=0.0, help="share of steps with larger clips")
    parser.add_argument("--near", type=float, default=0.0, help="share of steps with near frames")
    parser.add_argument("--steps", type=int, required=True, help="total steps of the run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--decay", type=float, default=0.2, help="last share, with falling lr")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's; Muon takes twice this")
    parser.add_argument(
        "--follow-motion", action="store_true", help="first let temporal heads follow the motion"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(seed=args.seed, lr=args.lr)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        logger.info("resumed at step %d, %d samples", trainer.steps, trainer.samples)
    if args.follow_motion:
        trainer.follow_motion()
    train(
        trainer,
        args.out,
        batch=args.batch,
        large=args.large,
        near=args.near,
        steps=args.steps,
        decay=args.decay,
        minutes=args.minutes,
    )
    if trainer.rank == 0:
        export(checkpoint, args.out / "pipeline")


if __name__ == "__main__":
    main()
