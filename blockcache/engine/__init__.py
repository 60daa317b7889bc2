"""The machine: block discovery, hooks, tracking and the runner."""
