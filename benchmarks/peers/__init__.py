"""The race: every peer's cache, fewer steps and blockcache, on the same pictures in the same run.

`python -m benchmarks.peers`; what is raced and how to read it stands in docs/race.md.
"""
