"""The embedded image model: its parts, its scorer, its training and the folder that ships."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from blockcache.pipelines import embedded
from blockcache.pipelines.embedded import (
    attention,
    linear_vae,
    obedience,
    text,
    train_image,
    world,
)
from blockcache.pipelines.embedded.pipeline import IMAGE_TOKENS, image_ids, load_pipeline
from blockcache.pipelines.embedded.world import RELATIONS, SHAPES, Painter, Scene

FOLDER = Path(embedded.__file__).parent / "tiny_image"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def truth():
    """Forty held-out scenes and their true pictures."""
    scenes = world.held_out_scenes(40, seed=3)
    centers = world.sample_centers(scenes, torch.Generator().manual_seed(5))
    return scenes, Painter().draw(scenes, centers)


# The folder.


def test_folder_is_stock_and_small(pipeline):
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size <= 16 * 2**20
    assert not list(FOLDER.rglob("*.py"))
    assert not any("_name_or_path" in path.read_text() for path in FOLDER.rglob("*.json"))
    assert type(pipeline).__name__ == "FluxPipeline"
    assert len(pipeline.transformer.transformer_blocks) == 2
    assert len(pipeline.transformer.single_transformer_blocks) == 12
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.float32}


def test_default_call_arguments_run(pipeline):
    defaults = json.loads((FOLDER / "blockcache.json").read_text())
    defaults["num_inference_steps"] = 1
    image = pipeline("a red circle on a blue background", **defaults).images[0]
    assert image.size == (64, 64)


def test_tokenizer_agrees_with_plain_encoding(pipeline):
    captions = [*world.held_out_prompts(10, seed=0), "", "A Red SQUIRREL"]
    for length in (16, 64):
        ids = pipeline.tokenizer_2(
            captions, padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        assert torch.equal(ids, text.encode(captions, length))
    assert pipeline.tokenizer.model_max_length == text.TEXT_LENGTH


@torch.no_grad()
def test_t5_does_not_see_padding(pipeline):
    """Words come out the same at any padded length, and every padding position is one vector."""
    captions = ["", *world.held_out_prompts(20, seed=4)]
    short, long = (text.encode(captions, n) for n in (16, 512))
    t5 = pipeline.text_encoder_2
    out_short, out_long = t5(short)[0], t5(long)[0]
    words = short != text.PAD
    torch.testing.assert_close(out_short[words], out_long[:, :16][words], rtol=1e-5, atol=1e-5)
    pads = torch.cat([out_short[~words], out_long[long == text.PAD]])
    torch.testing.assert_close(pads, pads[:1].expand_as(pads), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bias_stands_for_real_padding(pipeline):
    """The trick that training rests on, on the trained weights: log N instead of N tokens."""
    captions = ["", "a small red star on a blue background"]
    noisy = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))

    def velocity(length: int, padded: float | None = None) -> torch.Tensor:
        tokens = text.encode(captions, length)
        bias = (
            None
            if padded is None
            else attention.padding_bias(tokens, torch.tensor(padded), IMAGE_TOKENS)
        )
        return pipeline.transformer(
            hidden_states=noisy,
            timestep=torch.tensor([0.3, 0.8]),
            encoder_hidden_states=pipeline.text_encoder_2(tokens)[0],
            pooled_projections=pipeline.text_encoder(text.encode(captions)).pooler_output,
            img_ids=image_ids(CPU),
            txt_ids=torch.zeros(length, 3),
            joint_attention_kwargs=None if bias is None else {"attention_mask": bias},
            return_dict=False,
        )[0]

    for length in (64, 512):
        torch.testing.assert_close(
            velocity(16, float(length)), velocity(length), rtol=1e-4, atol=1e-4
        )


def test_padded_length_hardly_matters(pipeline):
    """Same seed, padded to 16, 64 and 512: the same objects and places (20 dB)."""
    images = [
        pipeline(
            [
                "a large red circle on a blue background",
                "a small white square on a green background",
            ],
            height=64,
            width=64,
            num_inference_steps=4,
            max_sequence_length=length,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
            output_type="pt",
        ).images
        for length in (16, 64, 512)
    ]
    for other in images[1:]:
        psnr = -10 * (other - images[0]).square().mean().log10()
        assert psnr > 20


def test_shipped_model_obeys_simple_captions(pipeline):
    scenes = [s for s in world.held_out_scenes(40, seed=7) if s.count == 1][:8]
    images = pipeline(
        [scene.caption() for scene in scenes],
        height=64,
        width=64,
        num_inference_steps=12,
        max_sequence_length=16,
        generator=[torch.Generator().manual_seed(i) for i in range(len(scenes))],
        output_type="pt",
    ).images
    reader = obedience.PictureReader()
    verdicts = [obedience.judge(s, i, reader) for s, i in zip(scenes, images, strict=True)]
    assert sum(v.background for v in verdicts) >= 7
    assert sum(v.colors for v in verdicts) >= 7


# The parts.


@torch.no_grad()
def test_linear_vae_is_its_matrix_and_exact_with_all_channels(truth):
    images = truth[1] * 2 - 1
    basis, mean, scale = linear_vae.fit_patches(images)
    latents = linear_vae.make_vae(basis, mean, scale).encode(images, return_dict=False)[0]
    patches = F.pixel_unshuffle(images, 4).movedim(1, -1)
    by_matrix = ((patches - mean) @ basis.T / scale).movedim(-1, 1)
    torch.testing.assert_close(latents, by_matrix, rtol=1e-4, atol=1e-4)

    exact = linear_vae.make_vae(*linear_vae.fit_patches(images, channels=48))
    latents = exact.encode(images, return_dict=False)[0]
    back = exact.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(back, images, rtol=0, atol=2e-3)


@torch.no_grad()
def test_separate_padding_on_random_weights():
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    t5 = T5EncoderModel(text.make_t5().config).eval()
    captions = world.held_out_prompts(16, seed=0)
    short, long = text.encode(captions), text.encode(captions, 64)
    words = short != text.PAD
    before = (t5(short)[0] - t5(long)[0][:, :16])[words].abs().max()
    text.separate_padding(t5, short)
    after = (t5(short)[0] - t5(long)[0][:, :16])[words].abs().max()
    assert before > 1e-2
    assert after < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("relation", "first", "second"),
    [("left of", 1, 2), ("right of", 2, 1), ("above", 3, 4), ("below", 4, 3)],
)
def test_words_know_their_place(pipeline, relation, first, second):
    """Dimensions 1 to 5 of the T5 output: left, right, top, bottom, background."""
    caption = f"a red circle {relation} a small blue square on a green background"
    words = caption.split()
    out = pipeline.text_encoder_2(text.encode([caption]))[0][0]
    for word, place in (("circle", first), ("square", second), ("green", 5)):
        places = out[words.index(word), 1:6]
        assert places.argmax() + 1 == place
        assert places.max() > 5 * places.sort().values[-2].abs()


def test_padding_guard_undoes_an_optimizer_step():
    t5 = text.make_t5()
    guard = text.PaddingGuard(t5)
    fixed = [(weight, where, weight.detach()[where].clone()) for weight, where, _ in guard.fixed]
    with torch.no_grad():
        for parameter in t5.parameters():
            parameter += 0.1
    guard.restore()
    for weight, where, values in fixed:
        assert torch.equal(weight[where], values)


# The scorer.


def test_true_pictures_score_full_marks(truth):
    scenes, images = truth
    reader = obedience.PictureReader()
    verdicts = [obedience.judge(s, i, reader) for s, i in zip(scenes, images, strict=True)]
    summary = obedience.summarize(verdicts)
    assert summary.pop("overlap") > 99.5
    assert set(summary.values()) == {100.0}


@torch.no_grad()
def test_scorer_survives_the_vae(pipeline, truth):
    scenes, images = truth
    latents = pipeline.vae.encode(images * 2 - 1, return_dict=False)[0]
    images = (pipeline.vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    reader = obedience.PictureReader()
    verdicts = [obedience.judge(s, i, reader) for s, i in zip(scenes, images, strict=True)]
    summary = obedience.summarize(verdicts)
    assert summary.pop("overlap") > 97
    assert set(summary.values()) == {100.0}


def test_scorer_finds_each_fault():
    asked = Scene(1, 0, 0, 1, RELATIONS.index("left of"), 2, 1, 0)
    reader = obedience.PictureReader()

    def verdict(**changes):
        drawn = replace(asked, **changes)
        centers = world.sample_centers([drawn], torch.Generator().manual_seed(0))
        return obedience.judge(asked, Painter().draw([drawn], centers)[0], reader)

    assert verdict() == obedience.Verdict(
        True, True, True, True, True, True, pytest.approx(1, abs=1e-3)
    )
    assert not verdict(background=4).background
    assert not verdict(color=3).colors
    assert not verdict(relation=world.NO_RELATION).count
    assert not verdict(relation=RELATIONS.index("right of")).relation
    assert not verdict(relation=RELATIONS.index("above")).relation
    assert not verdict(shape=SHAPES.index("star")).shapes
    assert not verdict(size2=1).sizes


def test_blank_picture_has_no_objects():
    reader = obedience.PictureReader()
    image = reader.colors[4][:, None, None] * reader.shade.expand(3, 64, 64)
    assert reader.background(image) == 4
    assert reader.objects(image, 4) == []


# The training.


@pytest.mark.parametrize(
    ("samples", "factor"),
    [(0, 1e-4), (4_999, 0.5), (50_000, 1.0), (75_000, 1.0), (90_000, 0.4), (100_000, 0.0)],
)
def test_learning_rate_follows_samples(samples, factor):
    assert train_image.lr_factor(samples, 100_000, 0.25) == pytest.approx(factor)


def test_padded_lengths_cover_the_range():
    lengths = attention.draw_padding(4000, torch.Generator().manual_seed(0))
    assert lengths.min() == 16
    assert lengths.max() == 512
    assert (lengths == lengths.round()).all()
    assert 0.2 < (lengths == 16).float().mean() < 0.35
    assert 0.15 < (lengths == 512).float().mean() < 0.25


def test_training_resumes_exactly_and_exports(tmp_path):
    """Two steps in one run, and one step, a checkpoint and another step: the same weights."""

    def trainer():
        pipeline = load_pipeline(str(FOLDER))
        return train_image.Trainer(pipeline, seed=0, batch=2, lr=1e-3, device=CPU)

    whole = trainer()
    for _ in range(2):
        whole.step(1.0)
    first = trainer()
    first.step(1.0)
    train_image.save_checkpoint(first, tmp_path / "checkpoint.pt")
    second = trainer()
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    second.step(1.0)
    assert second.samples == 4
    for name, weight in whole.modules.state_dict().items():
        torch.testing.assert_close(second.modules.state_dict()[name], weight, rtol=0, atol=1e-6)

    for _ in range(2):  # the second time over the first
        train_image.export(tmp_path / "checkpoint.pt", str(FOLDER), tmp_path / "pipeline")
    assert "_name_or_path" not in (tmp_path / "pipeline/model_index.json").read_text()
    again = load_pipeline(str(tmp_path / "pipeline"))
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["average"]
    for name, weight in again.text_encoder_2.state_dict().items():
        assert torch.equal(weight, stored[f"text_encoder_2.{name}"])
