"""The worked example in CONTRIBUTING.md runs as it stands there."""

import re
from pathlib import Path

from blockcache import Recipe, recipes
from blockcache.plan import even_steps

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_example_method_and_its_test():
    method, test = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    made: dict = {}
    exec(compile(method, "late_attention.py", "exec"), made)
    recipe = made["late_attention"]()
    assert isinstance(recipe, Recipe)
    assert recipe.rules[0].site.scope == "attn"

    class Recipes:
        late_attention = staticmethod(made["late_attention"])

    # The file is not in the package, so `recipes` here knows this one only.
    assert "late_attention" not in recipes.names()
    names = {"recipes": Recipes, "even_steps": even_steps}
    exec(compile(test, "test_late_attention.py", "exec"), names)
    names["test_the_second_half_computes_every_other_step"]()
