"""Attention while the embedded model is trained: float32 softmax, and padding of any length.

The pipeline pads prompts to any length and masks nothing. N equal padding tokens, all at text
position 0, act on attention exactly like one such token with log N added to its logit. So training
sees 16 text columns and a bias that stands for a longer padding.
"""

from typing import Any

import torch
from torch.nn import functional as F

from blockcache.pipelines.embedded import text

LONGEST_PADDING = 512


class TrainingAttention:
    """Flux attention with the softmax in float32.

    Under bfloat16 autocast on a CPU the backward pass of bfloat16 attention is about four times
    slower than that of float32.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As diffusers' FluxAttnProcessor, except that rotary tables must be given."""
        if image_rotary_emb is None:
            raise ValueError(
                "TrainingAttention got no image_rotary_emb; Flux blocks always pass it."
            )
        heads = (attn.heads, attn.head_dim)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (f(hidden_states).unflatten(-1, heads) for f in projections)
        query, key = _norm(query, attn.norm_q), _norm(key, attn.norm_k)
        if encoder_hidden_states is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            q, k, v = (f(encoder_hidden_states).unflatten(-1, heads) for f in projections)
            query = torch.cat([_norm(q, attn.norm_added_q), query], 1)
            key = torch.cat([_norm(k, attn.norm_added_k), key], 1)
            value = torch.cat([v, value], 1)
        cos, sin = (table[None, :, None] for table in image_rotary_emb)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (x.float().transpose(1, 2) for x in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, words:]), attn.to_add_out(out[:, :words])


def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    x = x.float()
    weight: torch.Tensor = norm.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], -1).flatten(-2) * sin


def draw_padding(n: int, generator: torch.Generator) -> torch.Tensor:
    """Padded lengths: a quarter 16, a fifth 512, the rest log-uniform between."""
    u = torch.rand(n, generator=generator)
    ratio = LONGEST_PADDING / text.TEXT_LENGTH
    between = text.TEXT_LENGTH * ratio ** torch.rand(n, generator=generator)
    between = torch.where(u < 0.25, torch.tensor(float(text.TEXT_LENGTH)), between.floor())
    return torch.where(u > 0.8, torch.tensor(float(LONGEST_PADDING)), between)


def padding_bias(token_ids: torch.Tensor, padded: torch.Tensor, image_tokens: int) -> torch.Tensor:
    """Attention bias that makes ``token_ids [B, L]`` act as if padded to ``padded [B]``.

    Returns ``[B, 1, 1, L + image_tokens]``. A row without a padding token can only have ``padded``
    equal to ``L``.
    """
    pads = token_ids == text.PAD
    count = pads.sum(1).clamp(min=1)
    weight = torch.log((padded - token_ids.shape[1] + count) / count)
    bias = F.pad(pads * weight[:, None], (0, image_tokens))
    return bias[:, None, None]
