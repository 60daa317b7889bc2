"""Dense attention by the sparse kernel's own loop."""

from .api import dense_attention

__all__ = ["dense_attention"]
