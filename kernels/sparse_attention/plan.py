"""The tables every block-sparse method is written in, and the merge of partial results."""

from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = int | Tensor


@dataclass(frozen=True)
class SparsePlan:
    """Which key blocks each query block attends.

    The mask is kept as bits, 32 key blocks in one int32, because plans are cached per layer and
    branch: at 75k tokens a table of block numbers would take about 100 MiB per layer, bits take 4.

    A leading size of 1 is shared by all batch entries or heads.

    Args:
        bits: int32 `[B|1, H|1, nQ, ceil(nK / 32)]`; bit `j % 32` of word `j // 32` is key block
            `j`.
        num_k_blocks: nK. Bits beyond it must be 0.
        q_blocks: Tokens per query block, a power of two (the last block may be short), or int32
            offsets `[B|1, H|1, nQ + 1]` of blocks of any lengths, 0 included.
        k_blocks: The same for key blocks.
        q_order: int32 or int64 `[B|1, H|1, Sq]`. Blocks are cut from the sequence whose token `i`
            is token `q_order[i]` of the input; must be a permutation. Outputs stay in input order.
        k_order: The same for keys and values; any list of tokens is allowed.

    Raises:
        ValueError: Tables whose shapes, dtypes or devices do not fit together.
    """

    bits: Tensor
    num_k_blocks: int
    q_blocks: Blocks
    k_blocks: Blocks
    q_order: Tensor | None = None
    k_order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_k_blocks < 1:
            raise ValueError(
                f"SparsePlan has {self.num_k_blocks} key blocks; it needs at least one."
            )
        words = -(-self.num_k_blocks // 32)
        if self.bits.dim() != 4 or self.bits.dtype != torch.int32 or self.bits.shape[3] != words:
            raise ValueError(
                f"SparsePlan.bits is {self.bits.dtype} {tuple(self.bits.shape)}; for "
                f"{self.num_k_blocks} key blocks it must be int32 [B|1, H|1, nQ, {words}]. "
                "SparsePlan.from_mask packs a bool mask."
            )
        _check_blocks("q_blocks", self.q_blocks, self.num_q_blocks, self.bits.device)
        _check_blocks("k_blocks", self.k_blocks, self.num_k_blocks, self.bits.device)
        for name, order in (("q_order", self.q_order), ("k_order", self.k_order)):
            if order is None:
                continue
            if order.dim() != 3 or order.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"SparsePlan.{name} is {order.dtype} {tuple(order.shape)}; "
                    "it must be int32 or int64 [B|1, H|1, S]."
                )
            _check_device(name, order, self.bits.device)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        q_blocks: Blocks,
        k_blocks: Blocks,
        q_order: Tensor | None = None,
        k_order: Tensor | None = None,
    ) -> "SparsePlan":
        """Pack a bool mask `[B|1, H|1, nQ, nK]`, True where a block is attended."""
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise ValueError(
                f"SparsePlan.from_mask got {mask.dtype} {tuple(mask.shape)}; "
                "it needs bool [B|1, H|1, nQ, nK]."
            )
        return cls(pack_bits(mask), mask.shape[3], q_blocks, k_blocks, q_order, k_order)

    @property
    def num_q_blocks(self) -> int:
        """NQ."""
        return self.bits.shape[2]

    def mask(self) -> Tensor:
        """The bool mask `[B|1, H|1, nQ, nK]`."""
        return unpack_bits(self.bits, self.num_k_blocks)

    def sizes(self, side: str, length: int) -> Tensor:
        """Tokens in each block of `side` "q" or "k" of a sequence of `length`, `[B|1, H|1, n]`."""
        blocks = self.q_blocks if side == "q" else self.k_blocks
        if isinstance(blocks, Tensor):
            return blocks.diff(dim=-1)
        count = self.num_q_blocks if side == "q" else self.num_k_blocks
        starts = torch.arange(count, device=self.bits.device) * blocks
        return (length - starts).clamp(0, blocks)[None, None]

    def density(self, q_length: int, k_length: int) -> Tensor:
        """Kept fraction of all (query, key) token pairs, fp32 `[B|1, H|1]`, without a host read."""
        q_sizes, k_sizes = self.sizes("q", q_length).float(), self.sizes("k", k_length).float()
        keys_per_row = (self.mask().float() @ k_sizes[..., None]).squeeze(-1)
        kept = (keys_per_row * q_sizes).sum(-1)
        return kept / (float(q_length) * float(k_length))


@dataclass(frozen=True)
class Centroids:
    """What stands for a key block that was not chosen: one extra key in the same softmax.

    Its logit is `q . key * scale + log(counts)` and its value is `value`; SVG-EAR (2603.08982)
    takes cluster means, block means work alike.

    Args:
        key: `[B, H, nK, D]`, mean key of each block, dtype of the keys.
        value: `[B, H, nK, D]`, mean value of each block.
        counts: `[B|1, H|1, nK]` tokens that the block stands for; 0 leaves the block out.
    """

    key: Tensor
    value: Tensor
    counts: Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool `[..., n]` into int32 `[..., ceil(n / 32)]`, lowest bit first."""
    n = mask.shape[-1]
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -n % 32))
    octets = padded.unflatten(-1, (-1, 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (octets * weights).sum(-1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(bits: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: bool `[..., n]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    octets = bits.contiguous().view(torch.uint8)
    return ((octets[..., None] >> shifts) & 1).flatten(-2)[..., :n].bool()


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys, exactly.

    Args:
        o_a: Output `[..., S, D]` over the first set.
        lse_a: Its log-sum-exp `[..., S]`, natural logarithm; -inf says the set is empty.
        o_b: Output over the second set.
        lse_b: Its log-sum-exp.

    Returns:
        Output in fp32 or wider, and its log-sum-exp; 0 and -inf where both sets are empty.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    known = torch.where(lse == -torch.inf, 0.0, lse)
    w_a, w_b = (lse_a - known).exp()[..., None], (lse_b - known).exp()[..., None]
    # An empty side has weight 0; its output is replaced too, since 0 * NaN is NaN.
    part_a = torch.where(w_a > 0, o_a.to(w_a.dtype) * w_a, 0.0)
    part_b = torch.where(w_b > 0, o_b.to(w_b.dtype) * w_b, 0.0)
    return part_a + part_b, lse


def _check_blocks(name: str, blocks: Blocks, count: int, device: torch.device) -> None:
    if isinstance(blocks, Tensor):
        if blocks.dim() != 3 or blocks.dtype != torch.int32 or blocks.shape[2] != count + 1:
            raise ValueError(
                f"SparsePlan.{name} is {blocks.dtype} {tuple(blocks.shape)}; offsets of {count} "
                f"blocks must be int32 [B|1, H|1, {count + 1}]."
            )
        _check_device(name, blocks, device)
    elif blocks < 16 or blocks & (blocks - 1):
        raise ValueError(
            f"SparsePlan.{name} is {blocks}; a fixed block size must be a power of two of at least "
            "16. Cut other sizes into such blocks, or give offsets."
        )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"SparsePlan.{name} is on {tensor.device}, bits are on {device}; all tables must be on "
            "the device of the tensors they are used with."
        )
