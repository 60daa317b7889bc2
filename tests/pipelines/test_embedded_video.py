"""The embedded video model: its world, its code, its scorer and the folder that ships."""

import json
import math
from pathlib import Path

import pytest
import torch

from blockcache.pipelines import embedded, models
from blockcache.pipelines.embedded import (
    obedience_video,
    text,
    train_video,
    video_motion,
    video_pipeline,
    video_vae,
    world_video,
)
from blockcache.pipelines.embedded.video_posterior import Posterior
from blockcache.pipelines.embedded.world_video import MOTIONS, RING, ROTATING, SHAPES, Clip

FOLDER = Path(embedded.__file__).parent / "tiny_video"
SMALL = (4, 8, 8)


@pytest.fixture(scope="module")
def code():
    return video_vae.fit_code()


@pytest.fixture(scope="module")
def pipeline():
    return models.load(models.find("tiny-video"), torch.device("cpu"))


def every_clip() -> list[Clip]:
    return [
        Clip(background, color, shape, motion)
        for background in range(world_video.BRIGHT, len(world_video.COLOR_NAMES))
        for color in range(world_video.BRIGHT)
        for shape in range(len(SHAPES))
        for motion in range(len(MOTIONS))
        if (shape, motion) != (RING, ROTATING)
    ]


# The world.


def test_training_never_draws_a_held_out_clip():
    generator = torch.Generator().manual_seed(0)
    drawn = {world_video.sample_clip(generator) for _ in range(2000)}
    held_out = {clip for clip in every_clip() if clip.is_held_out}
    assert len(every_clip()) == 368
    assert len(held_out) == world_video.HELD_OUT_CLIPS
    assert not drawn & held_out
    assert set(world_video.held_out_clips(len(held_out), seed=1)) == held_out
    with pytest.raises(ValueError, match="has 36 clips, asked for 37"):
        world_video.held_out_clips(37, seed=1)
    assert {clip.shape for clip in held_out} == set(range(len(SHAPES)))
    assert {clip.motion for clip in held_out} == set(range(len(MOTIONS)))


def test_captions_are_known_words_and_differ():
    captions = [clip.caption() for clip in every_clip()]
    assert len(set(captions)) == len(captions)
    assert captions[0] == "white squares moving left on a black background"
    tokens = text.encode(captions, vocabulary=video_pipeline.VOCABULARY)
    assert not (tokens == text.UNK).any()


@pytest.mark.parametrize(
    ("motion", "step"),
    [
        ("moving left", (-4, 0)),
        ("moving right", (4, 0)),
        ("moving up", (0, 4)),
        ("moving down", (0, -4)),
    ],
)
def test_objects_move_four_pixels_a_frame(motion, step):
    """By hand: one token, eight pixels, in two frames; y upwards."""
    clip = Clip(4, 0, 0, MOTIONS.index(motion))
    paths = world_video.sample_paths([clip], 3, torch.Generator().manual_seed(0))
    steps = paths.centers[0].diff(dim=0)
    assert torch.equal(steps, torch.tensor(step).float().expand_as(steps))


def test_the_scorer_reads_back_what_the_code_keeps(code):
    """One held-out clip of each motion, through the VAE: everything is read as it was drawn."""
    clips = list({clip.motion: clip for clip in every_clip() if clip.is_held_out}.values())
    paths = world_video.sample_paths(clips, 12, torch.Generator().manual_seed(2))
    video = world_video.draw(clips, paths, 128, 128)
    with torch.no_grad():
        decoded = video_vae.make_vae(code).decode(code.encode(video * 2 - 1)).sample
    reader = obedience_video.ClipReader()
    for clip, shown in zip(clips, (decoded / 2 + 0.5).clamp(0, 1), strict=True):
        verdict = obedience_video.judge(clip, reader.read(shown.transpose(0, 1)))
        assert (verdict.background, verdict.color, verdict.shape, verdict.motion) == (True,) * 4
        assert verdict.overlap > 0.8


def test_the_scorer_is_not_pleased_by_anything(code):
    """A still clip has no motion, noise has no shape, another caption is not obeyed."""
    reader = obedience_video.ClipReader()
    clip = Clip(5, 1, 0, 1)
    paths = world_video.sample_paths([clip], 6, torch.Generator().manual_seed(0))
    video = world_video.draw([clip], paths, 128, 128)[0].transpose(0, 1)
    reading = reader.read(video)
    assert (reading.shape, reading.motion) == (0, 1)
    assert reader.read(video.flip(0)).motion == 0
    assert reader.read(video[:1].expand_as(video)).motion == -1
    plain = torch.full_like(video, 0.09)
    assert (reader.read(plain).shape, reader.read(plain).color) == (-1, -1)
    other = obedience_video.judge(Clip(4, 0, 1, 0), reading)
    assert not any((other.background, other.color, other.shape, other.motion))


# The code and the posterior.


@torch.no_grad()
def test_the_written_vae_is_the_code(code):
    _, video = world_video.draw_batch(2, (3, 4, 5), torch.Generator().manual_seed(0))
    vae = video_vae.make_vae(code)
    latents = code.encode(video)
    # The first frame, which the first latent also stands for, is not decoded.
    shown = vae.decode(latents).sample
    assert shown.shape == (2, 3, 5, 32, 40)
    again = vae.encode(shown).latent_dist.mode()
    torch.testing.assert_close(again[:, :, 1:], latents[:, :, 1:], rtol=1e-3, atol=1e-3)
    by_matrix = latents.movedim(1, -1) @ (code.basis * code.scale[:, None]) + code.mean
    blocks = by_matrix.unflatten(-1, (3, 2, 8, 8)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    expected = blocks.flatten(6).flatten(4, 5).flatten(2, 3)[:, :, 1:]
    torch.testing.assert_close(shown, expected, rtol=1e-3, atol=1e-3)


def test_posterior_against_a_sum_over_drawn_clips(code):
    """The mean of 64 clips drawn pixel by pixel, weighted by their likelihood, in float64."""
    clip, t, grid = Clip(6, 2, 3, 1), 0.93, (2, 8, 11)
    generator = torch.Generator().manual_seed(3)
    noisy, mean = Posterior(code).draw(clip, grid, t, generator)
    starts = torch.cartesian_prod(torch.arange(8), torch.arange(8))[:, None]
    paths = world_video.make_paths([clip] * 64, grid[0], starts, torch.zeros(64, 1))
    drawn = code.encode(world_video.draw([clip] * 64, paths, 64, 88) * 2 - 1).double()
    distance = (noisy - (1 - t) * drawn).square().flatten(1).sum(1)
    weights = (-distance / (2 * t**2)).softmax(0)
    expected = (weights[:, None, None, None, None] * drawn).sum(0)
    assert weights.max() < 0.999
    torch.testing.assert_close(mean.double(), expected, rtol=1e-3, atol=1e-3)


def test_training_resumes_where_it_stopped(tmp_path):
    def trainer():
        return train_video.Trainer(seed=0, lr=1e-3)

    whole, first, second = trainer(), trainer(), trainer()
    losses = [whole.step((2, 4, 4), 2, 1.0)[0] for _ in range(3)]
    assert losses[:2] == [first.step((2, 4, 4), 2, 1.0)[0] for _ in range(2)]
    train_video.save_checkpoint(first, tmp_path / "checkpoint.pt")
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert second.step((2, 4, 4), 2, 1.0)[0] == losses[2]
    train_video.save_checkpoint(second, tmp_path / "checkpoint.pt")
    train_video.export(tmp_path / "checkpoint.pt", tmp_path / "pipeline")
    loaded = models.load(models.find(str(tmp_path / "pipeline")), torch.device("cpu"))
    assert torch.equal(
        loaded.text_encoder.shared.weight, second.average["text_encoder.shared.weight"]
    )


def test_near_keys_are_a_window_of_three_frames_pushed_inside():
    near = train_video.near_keys((5, 1, 2)).unflatten(0, (5, 2)).unflatten(2, (5, 2))
    frames = near[:, 0, :, 0].int().tolist()
    assert (near == near[:, :1, :, :1]).all()
    assert frames == [[1, 1, 1, 0, 0]] * 2 + [[0, 1, 1, 1, 0]] + [[0, 0, 1, 1, 1]] * 2
    assert train_video.near_keys((2, 4, 4)).all()


def test_stray_is_minus_the_logarithm_of_the_near_share():
    """By hand: equal scores, so the near share is that of the near keys, 4 of 16."""
    query, key = torch.zeros(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    near = torch.arange(16).expand(16, 16) < 4
    assert train_video.stray(query, key, near).item() == pytest.approx(math.log(4), abs=1e-6)
    assert train_video.stray(query, key, torch.ones_like(near)).item() == pytest.approx(0, abs=1e-6)


def test_the_training_attention_is_that_of_diffusers_until_far_frames_are_hidden():
    torch.manual_seed(0)
    transformer = video_pipeline.make_transformer().eval()
    for block in transformer.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    clip, words = torch.randn(1, 24, 5, 2, 2), torch.randn(1, 16, 128)
    plain = transformer(clip, torch.tensor([500.0]), words)[0]
    attention = train_video.TrainingAttention()
    transformer.set_attn_processor(attention)
    attention.near = train_video.near_keys((5, 2, 2))
    torch.testing.assert_close(transformer(clip, torch.tensor([500.0]), words)[0], plain)
    assert len(attention.strays) == len(transformer.blocks)
    attention.is_near = True
    hidden = transformer(clip, torch.tensor([500.0]), words)[0]
    assert len(attention.strays) == len(transformer.blocks)
    assert (hidden - plain).abs().max() > 1e-3


def test_locality_does_not_change_which_large_clips_are_drawn():
    plain = [train_video.draw_grid(seed, 0.3) for seed in range(200)]
    local = [train_video.draw_grid(seed, 0.3, 0.5) for seed in range(200)]
    large = {grid for grid, _ in plain} - {train_video.SMALL_GRID}
    assert large == set(train_video.LARGE_GRIDS)
    assert [g for g, _ in plain if g in large] == [g for g, _ in local if g in large]
    assert not any(is_near for _, is_near in plain)
    assert 60 < sum(is_near for _, is_near in local) < 140
    assert {g for g, _ in local} - {g for g, _ in plain} == {train_video.LONG_GRID}


class Layer(torch.nn.Module):
    """As much of a transformer block as motion_queries looks at."""

    def __init__(self):
        super().__init__()
        self.attn1 = torch.nn.Module()
        self.attn1.to_q = torch.nn.Linear(128, 128)


def test_heads_learn_to_look_where_the_motion_leads():
    """By hand: one frame ahead (layer 0) of what moves up is one row less, an angle of -1.

    The first layer's inputs tell the motion, the second's do not, so that is left alone.
    """
    torch.manual_seed(0)
    blocks = torch.nn.Module()
    blocks.blocks = torch.nn.ModuleList([Layer(), Layer()])
    motion = torch.arange(60) % len(MOTIONS)
    told = torch.randn(len(MOTIONS), 128)[motion, None] + 0.1 * torch.randn(60, 8, 128)

    untold = torch.randn(1, 8, 128).expand(60, -1, -1)

    def forward():
        for block, inputs in zip(blocks.blocks, (told, untold), strict=True):
            block.attn1.to_q(inputs)

    changed = video_motion.motion_queries(blocks, forward, motion)
    assert changed.keys() == {"blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias"}
    before = blocks.blocks[0].attn1.to_q(told)
    after = told @ changed["blocks.0.attn1.to_q.weight"].T + changed["blocks.0.attn1.to_q.bias"]
    first = video_pipeline.HEAD_SIZE + video_pipeline.ROW_CHANNELS.start
    mean = torch.complex(*before[..., first : first + 2].mean((0, 1)))
    for name, angle in (("moving up", -1.0), ("moving down", 1.0), ("rotating", 0.0)):
        pair = after[motion == MOTIONS.index(name)][..., first : first + 2].mean((0, 1))
        assert float((torch.complex(*pair) / mean).angle()) == pytest.approx(angle, abs=0.1)
    torch.testing.assert_close(after[..., :64], before[..., :64])


# The folder.


def test_folder_is_stock_and_small(pipeline):
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 24 * 2**20
    assert not list(FOLDER.rglob("*.py"))
    assert not any("_name_or_path" in path.read_text() for path in FOLDER.rglob("*.json"))
    assert type(pipeline).__name__ == "WanPipeline"
    assert type(pipeline.transformer).__name__ == "WanTransformer3DModel"
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}


def test_default_call_is_several_thousand_tokens():
    call = models.find("tiny-video").call
    assert call.items() >= video_pipeline.call_arguments().items()
    assert 3000 <= torch.tensor(video_pipeline.GRID).prod() <= 4000


def test_tokenizer_agrees_with_plain_encoding(pipeline):
    captions = [*world_video.held_out_prompts(10, seed=0), "", "Red SQUIRRELS"]
    ids = pipeline.tokenizer(
        captions, padding="max_length", max_length=16, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, text.encode(captions, vocabulary=video_pipeline.VOCABULARY))


def generate_small(pipeline, clips: list[Clip], *, steps: int, seed: int = 0) -> torch.Tensor:
    call = models.find("tiny-video").call | video_pipeline.call_arguments(SMALL)
    call["num_inference_steps"] = steps
    return obedience_video.generate(pipeline, clips, call, seed=seed, batch=8)


def test_same_seed_same_clip(pipeline):
    clips = world_video.held_out_clips(2, seed=0)
    first, again, other = (generate_small(pipeline, clips, steps=2, seed=s) for s in (0, 0, 9))
    assert first.shape == (2, 7, 3, 64, 64)
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.01


def test_settings_file_holds_only_call_arguments(pipeline):
    import inspect

    settings = json.loads((FOLDER / models.SETTINGS).read_text())
    assert settings.keys() <= inspect.signature(type(pipeline).__call__).parameters.keys()
