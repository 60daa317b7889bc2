"""The embedded policy's denoiser: the transformer of Diffusion Policy (2303.04137) in small.

Kept: action tokens with learned positions, decoder blocks of self-attention, cross-attention and
MLP with the norm in front, and the timestep as one more token of the context beside the
observations. Different: no causal mask, and a fraction of the size.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import nn


@dataclass
class PolicyTransformerOutput(BaseOutput):
    """sample: the predicted noise, `[B, horizon, action_size]`."""

    sample: torch.Tensor


class PolicyBlock(nn.Module):
    """One decoder block; each of its three sub-layers adds to the action tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.self_attn = Attention(width, heads=heads, dim_head=width // heads)
        self.cross_attn = Attention(width, width, heads=heads, dim_head=width // heads)
        self.mlp = FeedForward(width, activation_fn="gelu")

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: `[B, horizon, width]`; encoder_hidden_states: `[B, 1 + frames, width]`."""
        hidden_states = hidden_states + self.self_attn(self.norm1(hidden_states))
        attended = self.cross_attn(
            self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states
        )
        hidden_states = hidden_states + attended
        out: torch.Tensor = hidden_states + self.mlp(self.norm3(hidden_states))
        return out


class PolicyTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Predicts the noise in a chunk of actions.

    horizon: actions in a chunk. frames: observations it sees, oldest first.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        horizon: int = 16,
        action_size: int = 2,
        frames: int = 2,
        observation_size: int = 6,
        width: int = 96,
        layers: int = 6,
        heads: int = 4,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.action_in = nn.Linear(action_size, width)
        self.action_place = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.time_wave = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_in = TimestepEmbedding(width, width)
        self.observation_in = nn.Linear(observation_size, width)
        self.context_place = nn.Parameter(0.02 * torch.randn(1 + frames, width))
        self.transformer_blocks = nn.ModuleList(PolicyBlock(width, heads) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, action_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
    ) -> PolicyTransformerOutput | tuple[torch.Tensor]:
        """The noise in noisy actions.

        hidden_states: `[B, horizon, action_size]`. timestep: `[]` or `[B]`, 0 to the scheduler's
        training steps. encoder_hidden_states: observations `[B, frames, observation_size]`.
        """
        wave = self.time_wave(timestep.expand(len(hidden_states))).to(hidden_states.dtype)
        seen = self.observation_in(encoder_hidden_states)
        context = torch.cat([self.time_in(wave)[:, None], seen], 1) + self.context_place
        tokens = self.action_in(hidden_states) + self.action_place
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        sample = self.proj_out(self.norm_out(tokens))
        return PolicyTransformerOutput(sample) if return_dict else (sample,)
