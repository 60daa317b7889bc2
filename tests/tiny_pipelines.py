"""Ten complete diffusers pipelines with random weights, built from configurations alone.

No network, no files, tens of milliseconds each. `BUILDERS[name]()` returns the pipeline and the
keyword arguments of a small run; `generate` runs it, `denoiser` finds the module that is cached.

Three things a random pipeline needs before it can prove anything about a cache:

* `.eval()` everywhere: a model built from its configuration is in training mode, and T5's dropout
  makes two runs differ.
* `livelier`: adaLN-zero gates and final projections start at zero, so an untrained transformer is
  the identity and a broken cache passes.
* The noise-predicting pipelines (PixArt, DiT, SD 1.5, CogVideoX) reach latents of 100 to 1000 with
  random weights, the flow-matching ones stay near 1: compare with relative tolerances.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

Built = tuple[DiffusionPipeline, dict[str, Any]]

PROMPT = "a small red robot walks over the snow"
NEGATIVE = "bad"
CHARACTERS = string.ascii_letters + string.digits + string.punctuation
WORDS = "the a an of in on over with red blue small robot walks snow".split()
WORD_START = "\u2581"  # SentencePiece's mark


# Tokenizers. Since transformers 5 the classes take the vocabulary itself; before, they took files.


def t5_tokenizer() -> T5Tokenizer:
    """Whole words where it knows them, characters elsewhere."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (WORD_START, -2.0)]
    pieces += [(character, -4.0) for character in CHARACTERS]
    pieces += [(WORD_START + word, -1.0) for word in WORDS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def clip_tokenizer() -> CLIPTokenizer:
    """Characters, bare and at the end of a word; no merges."""
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    pieces += [piece for character in CHARACTERS for piece in (character, character + "</w>")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def llama_tokenizer() -> LlamaTokenizer:
    """Characters, with the byte fallback pieces the class expects."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", WORD_START]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] + list(CHARACTERS)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", model_max_length=256)


# Text encoders.


def _t5_settings() -> dict[str, Any]:
    return dict(
        vocab_size=160,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def t5_encoder() -> T5EncoderModel:
    """Two layers, 32 features."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**_t5_settings())).eval()


def umt5_encoder() -> UMT5EncoderModel:
    """The same sizes in the variant Wan uses."""
    torch.manual_seed(0)
    return UMT5EncoderModel(UMT5Config(**_t5_settings())).eval()


def clip_encoder(with_projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Two layers, 32 features; SD3 uses the variant with a projection."""
    torch.manual_seed(0)
    # `eos_token_id` has to be the tokenizer's: 2 would select CLIP's legacy pooling.
    config = CLIPTextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def llama_encoder() -> LlamaModel:
    """Three layers, 16 features: HunyuanVideo reads the third hidden state from the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaModel(config).eval()


# Autoencoders and shared pieces.


def image_vae(flow: bool = False) -> AutoencoderKL:
    """Four latent channels, two times smaller; `flow` is the variant of Flux and SD3."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {}
    if flow:
        settings = dict(
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.06,
            scaling_factor=1.5,
        )
    return AutoencoderKL(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    ).eval()


def livelier(model: torch.nn.Module, seed: int = 1, std: float = 0.02) -> torch.nn.Module:
    """Fill parameters that start at zero with small random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


# Pipelines. Each one seeds torch right before its denoiser, so that the weights do not depend on
# what was built before.


def flux(layers: int = 4, heads: int = 2, head_dim: int = 16) -> Built:
    """Flux: `layers` double-stream and as many single-stream blocks.

    `true_cfg_scale` above 1 with a `negative_prompt` makes it call the denoiser twice a step.
    """
    torch.manual_seed(0)
    quarter = head_dim // 4
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(quarter, quarter, head_dim - 2 * quarter),
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(flow=True),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=livelier(transformer),
    )
    return _quiet(pipe), _image(guidance_scale=3.5, max_sequence_length=32)


def sd3(layers: int = 4) -> Built:
    """Stable Diffusion 3: joint blocks, guidance as a batch of two."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=livelier(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(flow=True),
        text_encoder=clip_encoder(with_projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(with_projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
    return _quiet(pipe), _image(guidance_scale=5.0, max_sequence_length=32)


def pixart(layers: int = 4) -> Built:
    """PixArt-alpha: cross-attention blocks, second-order solver, no `callback_on_step_end`."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        caption_channels=32,
        cross_attention_dim=32,
        norm_type="ada_norm_single",
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=image_vae(),
        transformer=livelier(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )
    return _quiet(pipe), _image(
        guidance_scale=4.5,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=32,
    )


def dit(layers: int = 4) -> Built:
    """DiT: class-conditional; no text, no latent output, no callback."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=16,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    )
    pipe = DiTPipeline(
        transformer=livelier(transformer), vae=image_vae(), scheduler=DDIMScheduler()
    )
    return _quiet(pipe), dict(class_labels=[1], guidance_scale=4.0)


def sd15(layers: int = 2) -> Built:
    """Stable Diffusion 1.5: a UNet with skip connections; `layers` in each of its blocks."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    pipe = StableDiffusionPipeline(
        vae=image_vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=livelier(unet),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe), _image(guidance_scale=7.5)


def wan(layers: int = 4, heads: int = 2, head_dim: int = 12) -> Built:
    """Wan: guidance as two calls a step, named by `cache_context`."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=livelier(transformer),
        transformer_2=None,
    )
    return _quiet(pipe), _video(negative_prompt=NEGATIVE, guidance_scale=5.0)


def cogvideox(layers: int = 4) -> Built:
    """CogVideoX: joint text and video blocks, guidance as a batch of two."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=32,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    pipe = CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=livelier(transformer),
        scheduler=CogVideoXDDIMScheduler(),
    )
    return _quiet(pipe), _video(guidance_scale=6.0)


def hunyuan_video(layers: int = 4) -> Built:
    """HunyuanVideo: double- and single-stream blocks, embedded guidance, an attention mask."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_single_layers=layers,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    ).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=llama_encoder(),
        tokenizer=llama_tokenizer(),
        transformer=livelier(transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_encoder(),
        tokenizer_2=clip_tokenizer(),
    )
    # The default template is cropped at a length that only holds for Llama 3's own vocabulary.
    template = {"template": "{}", "crop_start": 0}
    return _quiet(pipe), _video(prompt_template=template, guidance_scale=6.0)


def ltx(layers: int = 4) -> Built:
    """LTX-Video: cross-attention blocks, guidance as a batch of two."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=layers,
        caption_channels=32,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=livelier(transformer),
    )
    return _quiet(pipe), _video(negative_prompt=NEGATIVE, guidance_scale=3.0)


def mochi(layers: int = 4) -> Built:
    """Mochi: joint blocks whose last one drops the text stream."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=layers,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    ).eval()
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=livelier(transformer),
    )
    size = dict(height=16, width=16, num_frames=7, max_sequence_length=16)
    return _quiet(pipe), dict(prompt=PROMPT, guidance_scale=4.5, **size)


BUILDERS: dict[str, Callable[..., Built]] = dict(
    flux=flux,
    sd3=sd3,
    pixart=pixart,
    dit=dit,
    sd15=sd15,
    wan=wan,
    cogvideox=cogvideox,
    hunyuan_video=hunyuan_video,
    ltx=ltx,
    mochi=mochi,
)


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The transformer or UNet that is called once or more in every step."""
    return getattr(pipe, "transformer", None) or pipe.unet


def generate(
    pipe: DiffusionPipeline,
    kwargs: dict[str, Any],
    steps: int = 4,
    seed: int = 0,
    latent: bool = False,
) -> Any:
    """Run `pipe` from a seed and return its first output.

    `latent` asks for the final latents, a tensor; otherwise pictures or frames come back as a numpy
    array in [0, 1]. `DiTPipeline` has no latent output and always gives the array.
    """
    if isinstance(pipe, DiTPipeline):
        latent = False
    return pipe(
        **kwargs,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent" if latent else "np",
    )[0]


def _image(**settings: Any) -> dict[str, Any]:
    return dict(prompt=PROMPT, height=32, width=32, **settings)


def _video(**settings: Any) -> dict[str, Any]:
    return _image(num_frames=9, max_sequence_length=32, **settings)


def _quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
