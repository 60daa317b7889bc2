"""The embedded diffusion policy: its pushing task, its model and pipeline, its training."""
