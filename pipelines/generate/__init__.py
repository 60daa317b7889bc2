"""Batch generation: a file of prompts, one process or many, nothing lost.

>>> from blockcache.pipelines.generate import generate
>>> for result in generate("prompts.txt", "tiny-image", "runs/a"):  # doctest: +SKIP
...     print(result.id, result.file)
"""

from blockcache.pipelines.generate.run import generate
from blockcache.pipelines.generate.saving import Result

__all__ = ["Result", "generate"]
