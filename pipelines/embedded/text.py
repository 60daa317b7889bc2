"""The two text encoders of the embedded model and their word tokenizer.

FluxPipeline pads the prompt for its T5 encoder to ``max_sequence_length`` and masks nothing, and
Flux gives all text tokens one position. So two things are written into the T5 weights, not trained:

* Padding is harmless. Dimension 0 of the residual stream is the kind of token (+ for words, - for
  padding); no layer writes it and each head's query and key read it, so words attend to words only
  and padding to padding only. At any padded length the words come out the same, and all padding
  positions as one vector.
* Words know their object's place. The heads look at the neighbours and at the relation word, and
five
  more dimensions say left, right, top, bottom or background (see aim_heads).

Embeddings, values, feed-forward layers and the CLIP encoder are trained.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from blockcache.pipelines.embedded import world

SPECIAL = ("<pad>", "</s>", "<unk>")
PAD, EOS, UNK = range(3)
TEXT_LENGTH = 16
# The words for motion are not used by pictures; they hold their places so that token ids never
# move.
WORDS = (
    *("a", "an", "on", "background", "of", "left", "right", "above", "below", "and"),
    *("moving", "up", "down", "bouncing", "rotating", "growing", "shrinking", "the", "with", "in"),
    *world.SIZES,
    *world.COLOR_NAMES,
    *world.SHAPES,
)
VOCABULARY = {word: i for i, word in enumerate(SPECIAL + WORDS)}

# What the reserved dimension adds to the logit of a key of the same kind, beyond twice the largest
# logit that words were seen to have. A key of the other kind gets as much less, so the gap is twice
# this.
_KIND_MARGIN = 30.0
# What aim_heads adds to logits: for a near word, against the wrong side, for a relation word.
_NEAR_BIAS, _SIDE_BIAS, _RELATION_LOGIT = 6.0, 20.0, 8.0
# Places of the first and the second object by relation: 0 left, 1 right, 2 top, 3 bottom. They are
# dimensions 1 to 4 of the T5 residual stream, the background is 5, and the first free one is 6.
_PLACES_BY_RELATION = {"left": (0, 1), "right": (1, 0), "above": (2, 3), "below": (3, 2)}
_FREE = 6
# Size of a place in the residual stream, and its weight in the last norm.
_PLACE, _PLACE_GAIN = 20.0, 60.0


def encode(
    captions: list[str],
    length: int = TEXT_LENGTH,
    vocabulary: Mapping[str, int] = VOCABULARY,
) -> torch.Tensor:
    """Token ids ``[N, length]`` of plain captions, as the tokenizer gives them; for training."""
    ids = torch.full((len(captions), length), PAD)
    for row, caption in zip(ids, captions, strict=True):
        tokens = [vocabulary.get(word, UNK) for word in caption.lower().split()] + [EOS]
        row[: len(tokens)] = torch.tensor(tokens)
    return ids


def make_tokenizer(length: int = TEXT_LENGTH, vocabulary: Mapping[str, int] = VOCABULARY) -> Any:
    """A word tokenizer that lower-cases and appends ``</s>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def make_t5(width: int = 128) -> Any:
    """A T5 encoder of two layers, ready to train: heads aimed, padding kept apart."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=width,
        d_kv=32,
        num_heads=width // 32,
        d_ff=2 * width,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    t5 = T5EncoderModel(config)
    generator = torch.Generator().manual_seed(0)
    captions = [world.sample_scene(generator).caption() for _ in range(256)]
    separate_padding(t5, encode(captions))
    aim_heads(t5)
    return t5


@torch.no_grad()
def aim_heads(t5: Any) -> None:
    """Wire the attention of a T5 with separate padding, so that words know their object's place.

    All text tokens have one position in Flux, so only this encoder can tell a red circle left of a
    blue square from the reverse, and training alone is slow to find that circuit (the object's
    role, the relation, which side that makes). The four heads look at the word before, the one
    before that, the relation word further right, and the relation word or "on" further left. From
    the last two follow five more reserved dimensions of the residual stream: left, right, top,
    bottom, background.
    """
    attention = t5.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight
    # Buckets: distance to the left for the lower half, to the right for the upper half.
    right = t5.config.relative_attention_num_buckets // 2
    bias.zero_()
    bias[1, 0] = bias[2, 1] = _NEAR_BIAS
    bias[: right + 1, 2] = bias[0, 3] = bias[right:, 3] = -_SIDE_BIAS
    _clear_places(t5)
    norm = t5.encoder.block[0].layer[0].layer_norm
    seen = norm(t5.shared.weight)[PAD + 1 :]
    # Linear functions of a word that are 1 for it and 0 for all others.
    words = list(VOCABULARY)[PAD + 1 :]
    inverse = torch.linalg.pinv(seen[:, _FREE:])
    readout = {word: inverse[:, words.index(word)] for word in (*_PLACES_BY_RELATION, "on")}
    relations = torch.stack([readout[word] for word in _PLACES_BY_RELATION])
    keys = {2: relations.sum(0), 3: relations.sum(0) + 2 * readout["on"]}
    width = t5.config.d_kv
    for head in range(t5.config.num_heads):
        # Row 0 of a head is the kind of token; no other row has a query yet.
        attention.q.weight[head * width + 1 : (head + 1) * width] = 0
    for head, key in keys.items():
        first = head * width + 1
        attention.q.weight[first, 0] = _RELATION_LOGIT / seen[:, 0].mean()
        attention.k.weight[first] = 0
        attention.k.weight[first, _FREE:] = key
        rows = slice(first, first + len(_PLACES_BY_RELATION) + 1)
        attention.v.weight[rows] = 0
        attention.v.weight[rows, _FREE:] = torch.cat([relations, readout["on"][None]])
        for row, places in enumerate(_PLACES_BY_RELATION.values()):
            attention.o.weight[1 + places[head - 2], first + row] = _PLACE
    attention.o.weight[_FREE - 1, 3 * width + 1 + len(_PLACES_BY_RELATION)] = _PLACE
    # Later layers do not attend: their input varies too much in size for a reliable logit.
    for block in t5.encoder.block[1:]:
        block.layer[0].SelfAttention.o.weight.zero_()


def _clear_places(t5: Any) -> None:
    """Nothing but aim_heads writes the dimensions of places; the last norm makes them loud."""
    places = slice(1, _FREE)
    t5.shared.weight[:, places] = 0
    for block in t5.encoder.block:
        feed_forward = block.layer[1].DenseReluDense
        block.layer[0].SelfAttention.o.weight[places] = 0
        feed_forward.wo.weight[places] = 0
        feed_forward.wi_0.weight[:, places] = 0
        feed_forward.wi_1.weight[:, places] = 0
    t5.encoder.final_layer_norm.weight[places] = _PLACE_GAIN


class PaddingGuard:
    """Remembers what separate_padding and aim_heads wrote, to restore it after an optimiser step.

    Where the heads look stays as wired: T5 scales no logits, and trained ones grow until padding is
    seen again.
    """

    def __init__(self, t5: Any):
        self.fixed: list[tuple[nn.Parameter, Any, torch.Tensor]] = []
        everything, reserved = slice(None), slice(0, _FREE)
        self._keep(t5.shared.weight, (everything, reserved))
        for number, block in enumerate(t5.encoder.block):
            attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
            for weight in (norm.weight, attention.q.weight, attention.k.weight):
                self._keep(weight, everything)
            self._keep(attention.o.weight, reserved if number == 0 else everything)
            self._keep(block.layer[1].DenseReluDense.wo.weight, reserved)
        attention = t5.encoder.block[0].layer[0].SelfAttention
        self._keep(attention.relative_attention_bias.weight, everything)
        for head in (2, 3):
            first = head * t5.config.d_kv + 1
            self._keep(attention.v.weight, slice(first, first + len(_PLACES_BY_RELATION) + 1))

    def _keep(self, weight: nn.Parameter, where: Any) -> None:
        self.fixed.append((weight, where, weight.detach()[where].clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Write the remembered values back."""
        for weight, where, values in self.fixed:
            weight[where] = values


def make_clip(width: int = 64, length: int = TEXT_LENGTH) -> Any:
    """A CLIP text encoder of one layer; its pooled output is the one at ``</s>``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        pad_token_id=PAD,
        bos_token_id=UNK,
        eos_token_id=EOS,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def separate_padding(t5: Any, token_ids: torch.Tensor) -> None:
    """Rewrite T5 weights, in place, so that padding and words do not see each other.

    The other dimensions keep their scale: each layer norm's weights are raised by what the reserved
    dimension adds to the norm, measured on ``token_ids`` (``[N, L]``, typical captions).
    """
    norms = [m for m in t5.modules() if type(m).__name__ == "T5LayerNorm"]
    layers = [block.layer for block in t5.encoder.block]
    power, longest = _measure(t5, token_ids, norms)
    # A large constant makes the norm, and with it the logit of the reserved dimension, nearly
    # constant.
    constant = 4 * max(power[layer[0].layer_norm] for layer in layers) ** 0.5
    for norm in norms:
        norm.weight *= (1 + constant**2 / power[norm]) ** 0.5
        norm.weight[0] = 1.0
    t5.shared.weight[:, 0] = constant
    t5.shared.weight[PAD, 0] = -constant
    heads = slice(None, None, t5.config.d_kv)
    for layer in layers:
        attention, norm = layer[0].SelfAttention, layer[0].layer_norm
        seen = constant * (t5.config.d_model / (power[norm] + constant**2)) ** 0.5
        logit = _KIND_MARGIN + 2 * longest[attention.q] * longest[attention.k]
        for projection in (attention.q, attention.k):
            projection.weight[heads] = 0
            projection.weight[heads, 0] = logit**0.5 / seen
        attention.o.weight[0] = 0
        layer[1].DenseReluDense.wo.weight[0] = 0


def padding_is_separate(t5: Any) -> bool:
    """Whether separate_padding was applied: words share a constant, padding its negative."""
    reserved = t5.shared.weight[:, 0]
    return bool((reserved[PAD] < 0) & (reserved[PAD + 1 :] == -reserved[PAD]).all())


def _measure(
    t5: Any, token_ids: torch.Tensor, norms: list[nn.Module]
) -> tuple[dict[nn.Module, float], dict[nn.Module, float]]:
    """Mean squared length of each norm's input; longest query and key of any head."""
    words = token_ids != PAD
    power: dict[nn.Module, float] = {}
    longest: dict[nn.Module, float] = {}

    def record_power(norm: nn.Module, args: Any, output: torch.Tensor) -> None:
        power[norm] = float(args[0][words].pow(2).sum(-1).mean())

    def record_longest(projection: nn.Module, args: Any, output: torch.Tensor) -> None:
        longest[projection] = float(output.unflatten(-1, (-1, t5.config.d_kv)).norm(dim=-1).max())

    handles = [norm.register_forward_hook(record_power) for norm in norms]
    for block in t5.encoder.block:
        attention = block.layer[0].SelfAttention
        handles += [p.register_forward_hook(record_longest) for p in (attention.q, attention.k)]
    t5(token_ids)
    for handle in handles:
        handle.remove()
    return power, longest
