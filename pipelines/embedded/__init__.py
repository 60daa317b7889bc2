"""The embedded text-to-image model: its world of coloured shapes, its training, its folder."""
