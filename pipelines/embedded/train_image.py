"""Trains the embedded text-to-image model and writes a stock FluxPipeline folder.

    python -m blockcache.pipelines.embedded.train_image --out DIR --samples 1000000

or with two processes of one thread each, which on a two-core machine beats two threads,

    torchrun --nproc-per-node 2 -m blockcache.pipelines.embedded.train_image --out DIR ...

Flow matching on the world of coloured shapes, Muon for the matrices inside the blocks and AdamW for
the rest, an exponential average of the weights for export. A run is resumed from
``DIR/checkpoint.pt`` and is a function of its seed and options. The learning rate is constant until
the last part of ``--samples`` and then falls linearly to zero, so the end can be chosen late: stop,
and resume with another ``--samples``. Every sample is trained at a padded prompt length drawn from
16 to 512, see attention.py.
"""

import argparse
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

from blockcache.pipelines.embedded import text, world
from blockcache.pipelines.embedded.attention import TrainingAttention, draw_padding, padding_bias
from blockcache.pipelines.embedded.pipeline import (
    IMAGE_TOKENS,
    TRAINED_PARTS,
    encode_images,
    image_ids,
    load_pipeline,
    make_pipeline,
    save_pipeline,
)

logger = logging.getLogger(__name__)

WARM_UP_SAMPLES = 10_000
EMA_CAP = 0.998
_REPORT_S, _SAVE_S = 30, 180


def draw_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in 0..1, most of them high.

    Two fifths are uniform in 0.88..1, a sixth uniform in 0..1 and the rest logit-normal. A scene is
    a few dozen bits in four thousand numbers. Which object goes where is decided while nine tenths
    are still noise, and only there must the caption be read.
    """
    t = torch.sigmoid(torch.randn(n, generator=generator) + 0.9)
    u = torch.rand(n, generator=generator)
    kind = torch.rand(n, generator=generator)
    t = torch.where(kind < 1 / 6, u, t)
    return torch.where(kind > 3 / 5, 1 - 0.12 * u, t)


class Trainer:
    """The state of a run: weights, their average, optimisers, samples seen.

    pipeline: Its transformer and text encoders are trained in place.
    batch: Samples per rank and step.
    lr: Learning rate of AdamW; Muon takes twice this.
    """

    def __init__(
        self, pipeline: Any, *, seed: int, batch: int, lr: float, device: torch.device
    ) -> None:
        self.seed, self.batch, self.device = seed, batch, device
        pipeline.to(device)
        self.vae = pipeline.vae
        self.transformer: Any = pipeline.transformer
        self.transformer.set_attn_processor(TrainingAttention())
        self.clip, self.t5 = pipeline.text_encoder, pipeline.text_encoder_2
        self.modules = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED_PARTS})
        self.modules.requires_grad_(True).train()
        self.guard = text.PaddingGuard(self.t5)
        self.optimizers = self._make_optimizers(lr)
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.painter = world.Painter(device)
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.samples = self.steps = 0
        self.log: list[tuple[int, float, float]] = []

    def _make_optimizers(self, lr: float) -> list[torch.optim.Optimizer]:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            in_block = name.startswith("transformer.") and "blocks." in name and ".norm" not in name
            (matrices if in_block and parameter.ndim == 2 else rest).append(parameter)
        adam = torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
        muon = torch.optim.Muon(
            matrices,
            2 * lr,
            momentum=0.95,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
            # Newton-Schulz is a tenth of a step here; three rounds already bring out small
            # directions.
            ns_steps=3,
        )
        for optimizer in (adam, muon):
            optimizer.param_groups[0]["base_lr"] = optimizer.param_groups[0]["lr"]
        return [adam, muon]

    def loss(self) -> torch.Tensor:
        """Mean squared error of the velocity on a fresh batch."""
        n = self.batch
        # Random numbers are a function of seed, step and rank: nothing to save, and no two ranks
        # draw the same.
        g = torch.Generator().manual_seed((self.seed << 40) + self.steps * self.ranks + self.rank)
        scenes, images = world.draw_batch(self.painter, n, g)
        tokens = text.encode([world.training_caption(scene, g) for scene in scenes])
        bias = padding_bias(tokens, draw_padding(n, g), IMAGE_TOKENS).to(self.device)
        t = draw_timesteps(n, g).to(self.device)
        clean = encode_images(self.vae, images)
        noise = torch.randn(clean.shape, generator=g).to(self.device)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        velocity = self._velocity(noisy, t, tokens.to(self.device), bias)
        return F.mse_loss(velocity.float(), noise - clean)

    def _velocity(
        self, noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        # The text encoders are small, and their logits want float32.
        words = self.t5(tokens)[0]
        pooled = self.clip(tokens).pooler_output
        with torch.autocast(self.device.type, torch.bfloat16):
            velocity: torch.Tensor = self.transformer(
                hidden_states=noisy,
                timestep=t,
                encoder_hidden_states=words,
                pooled_projections=pooled,
                img_ids=image_ids(self.device),
                txt_ids=torch.zeros(tokens.shape[1], 3, device=self.device),
                joint_attention_kwargs={"attention_mask": bias},
                return_dict=False,
            )[0]
        return velocity

    def step(self, lr_factor: float, stop: bool = False) -> tuple[float, bool]:
        """One update. Returns the mean loss over ranks, and whether any rank asked to stop."""
        loss = self.loss()
        loss.backward()
        mean_loss, stop = self._share_gradients(float(loss.detach()), stop)
        for optimizer in self.optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = group["base_lr"] * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.guard.restore()
        self.steps += 1
        self.samples += self.batch * self.ranks
        self._update_average()
        return mean_loss, stop

    def _share_gradients(self, loss: float, stop: bool) -> tuple[float, bool]:
        """Average gradients and loss over ranks in one message; stop together or not at all."""
        if self.ranks == 1:
            return loss, stop
        grads = [p.grad for p in self.modules.parameters() if p.grad is not None]
        extra = torch.tensor([loss, float(stop)], device=self.device)
        message = torch.cat([extra] + [g.flatten() for g in grads])
        dist.all_reduce(message)
        message /= self.ranks
        for grad, part in zip(grads, message[2:].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        return float(message[0]), bool(message[1] > 0)

    @torch.no_grad()
    def _update_average(self) -> None:
        keep = min(EMA_CAP, (1 + self.steps) / (10 + self.steps))
        state = self.modules.state_dict()
        current = [state[name] for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs."""
        return {
            "modules": self.modules.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "samples": self.samples,
            "steps": self.steps,
            "log": self.log,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.modules.load_state_dict(state["modules"])
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            # Options are those of this command line, not of the one that wrote the checkpoint.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.samples, self.steps, self.log = state["samples"], state["steps"], state["log"]
        # The guard's values are those of the run, not of the weights that this process began with.
        self.guard = text.PaddingGuard(self.t5)


def lr_factor(samples: int, total: int, decay: float) -> float:
    """Warm-up, constant, then linear to zero over the last ``decay`` of ``total`` samples."""
    left = (total - samples) / max(1.0, decay * total)
    return max(0.0, min(1.0, (samples + 1) / WARM_UP_SAMPLES, left))


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write beside and rename, so that a stop in mid-write loses nothing."""
    partial = path.with_suffix(".partial")
    torch.save(trainer.state_dict(), partial)
    os.replace(partial, path)


def export(checkpoint: Path, init: str | None, folder: Path) -> None:
    """Write the averaged weights of a checkpoint, and its log, as a pipeline folder."""
    state = torch.load(checkpoint, weights_only=True)
    pipeline = load_pipeline(init) if init else make_pipeline()
    save_pipeline(pipeline, state["average"], folder)
    rows = [
        {"samples": samples, "loss": loss, "samples_per_s": rate}
        for samples, loss, rate in state["log"]
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "train_log.json").write_text(f"[\n{lines}\n]\n")


def train(trainer: Trainer, out: Path, *, samples: int, decay: float, minutes: float) -> None:
    """Train until ``samples`` or ``minutes``; a checkpoint every three minutes and at the end."""
    started = reported = saved = time.monotonic()
    losses: list[float] = []
    stop = False
    while trainer.samples < samples and not stop:
        factor = lr_factor(trainer.samples, samples, decay)
        loss, stop = trainer.step(factor, time.monotonic() - started > 60 * minutes)
        losses.append(loss)
        now = time.monotonic()
        if trainer.rank == 0 and now - reported > _REPORT_S:
            mean = sum(losses) / len(losses)
            rate = trainer.batch * trainer.ranks * len(losses) / (now - reported)
            trainer.log.append((trainer.samples, round(mean, 5), round(rate, 1)))
            logger.info("samples %d loss %.4f, %.1f samples/s", trainer.samples, mean, rate)
            reported, losses = now, []
        if trainer.rank == 0 and now - saved > _SAVE_S:
            save_checkpoint(trainer, out / "checkpoint.pt")
            saved = time.monotonic()
    if trainer.rank == 0:
        save_checkpoint(trainer, out / "checkpoint.pt")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded text-to-image model.")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint and pipeline folder")
    parser.add_argument("--samples", type=int, required=True, help="total samples of the run")
    parser.add_argument("--init", help="pipeline folder to start from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--decay", type=float, default=0.25, help="last share, with falling lr")
    parser.add_argument("--batch", type=int, default=32, help="samples per process and step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW's; Muon takes twice this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipeline = load_pipeline(args.init) if args.init else make_pipeline()
    trainer = Trainer(
        pipeline, seed=args.seed, batch=args.batch, lr=args.lr, device=torch.device(args.device)
    )
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        logger.info("resumed at %d samples", trainer.samples)
    if args.compile:
        trainer.transformer.compile_repeated_blocks()
    train(trainer, args.out, samples=args.samples, decay=args.decay, minutes=args.minutes)
    if trainer.rank == 0:
        export(checkpoint, args.init, args.out / "pipeline")


if __name__ == "__main__":
    main()
