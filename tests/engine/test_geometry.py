"""The table of geometries, against what real denoisers do with their latents.

For every family a random-weight model is called twice, the second time with one patch of the
latents changed. In the first block's self-attention exactly one query may differ then: the one at
which the table says that patch lies.
"""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import tiny_pipelines
from blockcache.engine.geometry import FAMILIES, Arrangement, arrange
from blockcache.engine.padding import Paddings
from blockcache.errors import PlanError
from blockcache.plan.geometry import Geometry

TIME = torch.tensor([500.0])
GRID = (3, 4, 6)
PATCH = (2, 1, 4)
"""The frame, row and column (in tokens) that is changed."""


def random(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def wan(cls=diffusers.WanTransformer3DModel, **settings):
    model = cls(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=16, num_layers=2, **settings,
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 4, 3, 8, 12), timestep=TIME, encoder_hidden_states=random(1, 5, 16)
    )


def wan_vace():
    model, call = wan(diffusers.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=8)
    return model, call | dict(control_hidden_states=random(1, 8, 3, 8, 12))


def chrono_edit():
    return wan(diffusers.ChronoEditTransformer3DModel)


def skyreels():
    model, call = wan(diffusers.SkyReelsV2Transformer3DModel)
    return model, call | dict(timestep=TIME.long())


def cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2),
        concat_padding_mask=False,
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 4, 3, 8, 12), timestep=TIME, encoder_hidden_states=random(1, 5, 16),
        fps=8,
    )  # fmt: skip


def allegro():
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
        sample_height=8, sample_width=12, sample_frames=3, caption_channels=16,
    )  # fmt: skip
    rope = [tuple(random(72, 4) for _ in "cs") for _ in "thw"]
    grids = torch.cartesian_prod(*(torch.arange(n) for n in GRID)).T
    return model, dict(
        hidden_states=random(1, 4, 3, 8, 12), timestep=TIME.long(),
        encoder_hidden_states=random(1, 5, 16), encoder_attention_mask=torch.ones(1, 5),
        image_rotary_emb=(rope, grids[:, None]),
    )  # fmt: skip


def kandinsky5():
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4,
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6),
    )  # fmt: skip
    # Its rotary embedding returns bfloat16 whatever the model's dtype is, so it needs autocast.
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model, dict(
        hidden_states=random(1, 3, 8, 12, 4), encoder_hidden_states=random(1, 5, 16),
        timestep=TIME, pooled_projections=random(1, 8),
        visual_rope_pos=tuple(torch.arange(n) for n in GRID), text_rope_pos=torch.arange(5),
    )  # fmt: skip


def ltx():
    pipe, _ = tiny_pipelines.ltx(layers=2)
    return pipe.transformer, dict(
        hidden_states=random(1, 72, 8), encoder_hidden_states=random(1, 5, 32), timestep=TIME,
        encoder_attention_mask=torch.ones(1, 5), num_frames=3, height=4, width=6,
    )  # fmt: skip


def ltx2(references=0):
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=8, audio_out_channels=8,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=2, caption_channels=16,
    )  # fmt: skip
    coords = None
    if references:
        coords = random(1, 3, 72 + references, 2).abs()
    return model, dict(
        hidden_states=random(1, 72 + references, 8), audio_hidden_states=random(1, 9, 8),
        encoder_hidden_states=random(1, 5, 16), audio_encoder_hidden_states=random(1, 5, 16),
        timestep=TIME, sigma=TIME, num_frames=3, height=4, width=6, audio_num_frames=9,
        video_coords=coords,
    )  # fmt: skip


def ltx2_with_references():
    return ltx2(references=7)


def hunyuan_video():
    pipe, _ = tiny_pipelines.hunyuan_video(layers=2)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    return pipe.transformer, dict(
        hidden_states=random(1, 4, *GRID), timestep=TIME.long(),
        encoder_hidden_states=random(1, 5, 16), encoder_attention_mask=mask,
        pooled_projections=random(1, 32), guidance=TIME,
    )  # fmt: skip


def hunyuan_video15():
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 4, *GRID), timestep=TIME,
        encoder_hidden_states=random(1, 5, 16), encoder_hidden_states_2=random(1, 3, 8),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        encoder_attention_mask_2=torch.tensor([[1, 0, 0]]), image_embeds=torch.zeros(1, 4, 8),
    )  # fmt: skip


def mochi():
    pipe, _ = tiny_pipelines.mochi(layers=2)
    return pipe.transformer, dict(
        hidden_states=random(1, 12, 3, 8, 12), timestep=TIME,
        encoder_hidden_states=random(1, 16, 32),
        encoder_attention_mask=torch.arange(16)[None] < 5,
    )  # fmt: skip


def cogvideox(cls=diffusers.CogVideoXTransformer3DModel, **settings):
    model = cls(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=12, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=5,
        **settings,
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 3, 4, 8, 12), timestep=TIME.long(),
        encoder_hidden_states=random(1, 5, 16),
    )  # fmt: skip


def consis_id():
    return cogvideox(diffusers.ConsisIDTransformer3DModel)


def easy_animate():
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        sample_width=12, sample_height=8, num_layers=2, mmdit_layers=1, time_embed_dim=8,
        text_embed_dim=16,
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 4, 3, 8, 12), timestep=TIME, encoder_hidden_states=random(1, 5, 16)
    )


def positions(rows, columns, extra=0, width=3):
    """Flux's numbers of a picture's tokens, and of a reference picture's behind them."""
    ids = torch.zeros(rows * columns + extra, width)
    ids[: rows * columns, 1:3] = torch.cartesian_prod(
        torch.arange(rows), torch.arange(columns)
    ).float()
    ids[rows * columns :, 0] = 1
    return ids


def flux(references=0):
    pipe, _ = tiny_pipelines.flux(layers=1)
    return pipe.transformer, dict(
        hidden_states=random(1, 24 + references, 16), encoder_hidden_states=random(1, 5, 32),
        pooled_projections=random(1, 32), timestep=TIME, guidance=TIME,
        img_ids=positions(4, 6, references), txt_ids=torch.zeros(5, 3),
    )  # fmt: skip


def flux_kontext():
    return flux(references=8)


def flux2():
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 24, 4), encoder_hidden_states=random(1, 5, 16), timestep=TIME,
        img_ids=positions(4, 6, width=4)[None], txt_ids=torch.zeros(1, 5, 4), guidance=TIME,
    )  # fmt: skip


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, dict(
        hidden_states=random(1, 24, 4), encoder_hidden_states=random(1, 5, 16), timestep=TIME,
        img_ids=positions(4, 6), txt_ids=torch.zeros(5, 3),
    )  # fmt: skip


def sd3():
    pipe, _ = tiny_pipelines.sd3(layers=2)
    return pipe.transformer, dict(
        hidden_states=random(1, 4, 4, 6), encoder_hidden_states=random(1, 5, 32),
        pooled_projections=random(1, 64), timestep=TIME,
    )  # fmt: skip


def cogview4():
    model = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=16,
        sample_size=12, rope_axes_dim=(16, 16),
    )  # fmt: skip
    size = torch.tensor([[8.0, 12.0]])
    return model, dict(
        hidden_states=random(1, 4, 8, 12), encoder_hidden_states=random(1, 5, 16),
        timestep=TIME.long(), original_size=size, target_size=size, crop_coords=0 * size,
    )  # fmt: skip


def qwen_image(shapes=((1, 4, 6),)):
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tokens = sum(f * h * w for f, h, w in shapes)
    return model, dict(
        hidden_states=random(1, tokens, 16), encoder_hidden_states=random(1, 5, 16),
        timestep=TIME, img_shapes=[list(shapes)],
    )  # fmt: skip


def qwen_image_edit():
    return qwen_image(((1, 4, 6), (1, 2, 3)))


def pixart():
    """Has no row: guessed."""
    pipe, _ = tiny_pipelines.pixart(layers=2)
    return pipe.transformer, dict(
        hidden_states=random(1, 4, 8, 12), encoder_hidden_states=random(1, 5, 32), timestep=TIME,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip


# Model, then the latents' axes; "S" are packed tokens.
CASES = {
    wan: "BCFHW", wan_vace: "BCFHW", chrono_edit: "BCFHW", skyreels: "BCFHW", cosmos: "BCFHW",
    allegro: "BCFHW", kandinsky5: "BFHWC", ltx: "BSC", ltx2: "BSC", ltx2_with_references: "BSC",
    hunyuan_video: "BCFHW", hunyuan_video15: "BCFHW", mochi: "BCFHW", cogvideox: "BFCHW",
    consis_id: "BFCHW", easy_animate: "BCFHW", flux: "BSC", flux_kontext: "BSC", flux2: "BSC",
    chroma: "BSC", sd3: "BCHW", cogview4: "BCHW", qwen_image: "BSC", qwen_image_edit: "BSC",
    pixart: "BCHW",
}  # fmt: skip
EXPECTED = {
    ltx2_with_references: (0, 7), hunyuan_video: (0, 5), hunyuan_video15: (0, 12), mochi: (0, 5),
    cogvideox: (5, 0), consis_id: (5, 0), easy_animate: (5, 0), flux: (5, 0),
    flux_kontext: (5, 8), flux2: (5, 0), chroma: (5, 0), sd3: (0, 5), cogview4: (5, 0),
    qwen_image: (5, 0), qwen_image_edit: (5, 6),
}  # fmt: skip
"""Tokens before and after the video; none where it is not listed."""


class Queries(TorchFunctionMode):
    """Keeps the queries of every self-attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k = (*args, kwargs.get("query"), kwargs.get("key"))[:2]
            if q.shape == k.shape:
                self.seen.append(q)
        return func(*args, **kwargs)


def first_queries(model, call, fits):
    """`[S, H * D]` of the first self-attention whose length fits."""
    with torch.no_grad(), Queries() as queries:
        model(**call)
    q = next(q for q in queries.seen if fits(q.shape[2]))
    return q[0].transpose(0, 1).flatten(1)


def with_changed_patch(call, axes, geometry):
    """The call with one patch of the latents changed."""
    latents = call["hidden_states"].clone()
    frame, row, column = PATCH[0] % geometry.frames, PATCH[1], PATCH[2]
    if "S" in axes:
        place = (frame * geometry.height + row) * geometry.width + column
        latents[:, place] += 1.0
        return call | dict(hidden_states=latents)
    where = []
    for axis, size in zip(axes, latents.shape, strict=True):
        tokens = {"F": geometry.frames, "H": geometry.height, "W": geometry.width}.get(axis)
        if tokens is None:
            where.append(slice(None))
            continue
        number, patch = {"F": frame, "H": row, "W": column}[axis], size // tokens
        where.append(slice(number * patch, (number + 1) * patch))
    # A gradient over the patch, for a constant one would vanish in layer norms.
    changed = latents[tuple(where)]
    changed += torch.linspace(1.0, 3.0, changed.numel()).view(changed.shape)
    return call | dict(hidden_states=latents)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_a_patch_of_the_latents_is_the_token_that_the_table_says(build):
    torch.manual_seed(0)
    model, call = build()
    tiny_pipelines.livelier(model)
    arrangement = arrange(model, call)
    before = first_queries(model, call, arrangement.fit)
    geometry = arrangement.fit(len(before))
    assert geometry.grid == ((1, *GRID[1:]) if "2D" in type(model).__name__ else GRID)
    assert (geometry.before, geometry.after) == EXPECTED.get(build, (0, 0))
    after = first_queries(model, with_changed_patch(call, CASES[build], geometry), arrangement.fit)
    frame, row, column = PATCH[0] % geometry.frames, PATCH[1], PATCH[2]
    token = geometry.before + (frame * geometry.height + row) * geometry.width + column
    assert (before != after).any(1).nonzero().flatten().tolist() == [token]


def test_every_row_of_the_table_is_tried():
    classes = {type(build()[0]).__name__ for build in CASES}
    assert set(FAMILIES) <= classes
    assert classes - set(FAMILIES) == {"PixArtTransformer2DModel"}


def test_lengths_that_do_not_fit_are_refused():
    arrangement = Arrangement((3, 4, 6), before=5, after=2)
    assert arrangement.fit(79) == Geometry(3, 4, 6, 5, 2)
    assert arrangement.fit(72) == Geometry(3, 4, 6)
    assert [arrangement.fit(n) for n in (0, 5, 71, 73, 77, 78, 80)] == [None] * 7


def test_text_without_its_padding_is_as_long_as_it_is_seen_to_be():
    arrangement = Arrangement((3, 4, 6), after=16, is_trimmed=True)
    assert [arrangement.fit(n).after for n in (72, 73, 80, 88)] == [0, 1, 8, 16]
    assert arrangement.fit(89) is None


class Stranger(torch.nn.Module):
    """A denoiser that nobody knows."""

    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)()


@pytest.mark.parametrize(
    ("latents", "config", "grid"),
    [
        (random(1, 4, 3, 8, 12), dict(in_channels=4, patch_size=(1, 2, 2)), GRID),
        (random(1, 3, 4, 8, 12), dict(in_channels=4, patch_size=2), GRID),
        (random(1, 3, 8, 12, 5), dict(in_channels=5, patch_size=2), GRID),
        (random(1, 4, 6, 8, 12), dict(in_channels=4, patch_size=2, patch_size_t=2), GRID),
        (random(1, 4, 8, 12), dict(in_channels=4, patch_size=2), (1, 4, 6)),
    ],
)
def test_strangers_are_guessed_from_their_latents(latents, config, grid):
    assert arrange(Stranger(**config), dict(hidden_states=latents)) == Arrangement(grid)


@pytest.mark.parametrize(
    ("latents", "config", "reason"),
    [
        (None, dict(in_channels=4, patch_size=2), "in no table"),
        ([random(4, 8, 8)], dict(in_channels=4, patch_size=2), "in no table"),
        (random(1, 72, 8), dict(in_channels=8, patch_size=1), "in no table"),
        (random(1, 3, 8, 8, 8), dict(in_channels=5, patch_size=2), "in no table"),
        (random(1, 4, 8, 12), dict(in_channels=4), "no patch size"),
    ],
)
def test_strangers_that_do_not_tell_are_refused(latents, config, reason):
    with pytest.raises(PlanError, match=reason):
        arrange(Stranger(**config), dict(hidden_states=latents))


@pytest.mark.parametrize(
    ("build", "change", "reason"),
    [
        (ltx, dict(num_frames=None), "no num_frames"),
        (flux, dict(img_ids=None), "no img_ids"),
        (flux, dict(img_ids=torch.zeros(24, 3)), "do not number"),
        (flux, dict(img_ids=positions(4, 6).flip(0)), "do not number"),
        (qwen_image, dict(img_shapes=None), "no img_shapes"),
        (qwen_image, dict(img_shapes=[[(1, 4, 6)], [(1, 6, 4)]]), "differ within the batch"),
        (wan, dict(hidden_states=random(1, 4, 8, 12)), "hidden_states is"),
        (kandinsky5, dict(sparse_params={"to_fractal": True}), "own sparse attention"),
    ],
)
def test_calls_that_lack_what_the_row_reads_are_refused(build, change, reason):
    model, call = build()
    with pytest.raises(PlanError, match=reason):
        arrange(model, call | change)


# ---- padding -------------------------------------------------------------------------------------

SEVEN = Geometry(1, 2, 2, 0, 3)


def keys(*lengths, total=7):
    return (torch.arange(total) < torch.tensor(lengths)[:, None])[:, None, None]


@pytest.mark.parametrize("as_bias", [False, True])
@pytest.mark.parametrize(
    ("mask", "lengths"), [(keys(5), (5,)), (keys(4, 7), (4, 7)), (keys(7, 7), None)]
)
def test_masks_of_padding_become_lengths(mask, lengths, as_bias):
    if as_bias:
        mask = torch.where(mask, 0.0, -10000.0)
    assert Paddings().lengths(mask, SEVEN) == lengths


def test_masks_over_queries_and_keys_become_lengths_if_the_video_sees_all_alike():
    row = keys(5)
    assert Paddings().lengths(row & row.transpose(2, 3), SEVEN) == (5,)
    assert Paddings().lengths(row.expand(1, 1, 7, 7), SEVEN) == (5,)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(7, 7).tril().bool()[None, None],
        keys(5).flip(3),
        torch.tensor([1, 1, 1, 1, 0, 1, 0]).bool()[None, None, None],
        torch.linspace(0.0, -1.0, 7)[None, None, None],
        keys(5)[0],
        keys(5).expand(1, 2, 1, 7),
        keys(5)[..., :6],
    ],
    ids=["causal", "in front", "scattered", "soft", "3-D", "per head", "short"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(PlanError, match="mask"):
        Paddings().lengths(mask, SEVEN)


def test_a_mask_is_judged_once_as_long_as_its_sources_stay_the_same(monkeypatch):
    """Judging reads from the device; HunyuanVideo 1.5 builds the same mask in every layer."""
    from blockcache.engine import padding

    judged = []
    judge = padding._judge
    monkeypatch.setattr(padding, "_judge", lambda *args: judged.append(1) or judge(*args))
    source, paddings = torch.tensor([[1, 1, 0]]), Paddings()
    for _ in range(2):
        paddings.enter(dict(encoder_attention_mask=source, hidden_states=random(1)))
        assert paddings.lengths(keys(6), SEVEN) == paddings.lengths(keys(6), SEVEN) == (6,)
    assert len(judged) == 1
    source[0, 1] = 0
    paddings.enter(dict(encoder_attention_mask=source))
    assert paddings.lengths(keys(5), SEVEN) == (5,)
    paddings.enter(dict(encoder_attention_mask=source.clone()))
    assert paddings.lengths(keys(4), SEVEN) == (4,)
    assert len(judged) == 3
