"""Plans as JSON: what is written can be read, and nothing else gets in."""

import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockcache.errors import BlockCacheError, PlanError, PlanMismatchError
from blockcache.plan import (
    BackwardDifference,
    Bathtub,
    ChannelTable,
    Chebyshev,
    Codebook,
    Cooldown,
    Copy,
    Corrector,
    Damped,
    Every,
    Fingerprint,
    Fitted,
    Force,
    Gate,
    Geometric,
    Growing,
    Hermite,
    Layout,
    MaskTable,
    MaxStreak,
    Plan,
    ProbeRatio,
    Ranked,
    Recipe,
    Rule,
    ScaleShift,
    Site,
    Sparse,
    Taylor,
    Verified,
    Warmup,
    Within,
    even_steps,
)
from blockcache.plan import spec as spec_module
from blockcache.plan.geometry import Geometry
from blockcache.plan.spec import from_json, to_json
from blockcache.sparse.sta import STA

ROOM = "blockcache.plan."
MARK = Fingerprint("FluxTransformer2DModel", "0123456789abcdef", 8, "FlowMatch", "bfloat16")
RULES = (
    Rule(Site("stack"), Geometric(0.4), Taylor(2, "sigma"), (Cooldown(1), Force((-1, 3)))),
    Rule(Site("block", 1, -1), Every(3), Copy(), (MaxStreak(2), Warmup(1)), "output"),
    Rule(Site("span", 2), Gate(0.07, "first_block", "previous", True)),
    Rule(Site("span", 0, 4), MaskTable(((0, 2, 5),), 6, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1))),
)
RECIPE = Recipe(RULES, "independent", "everything at once")
PLAN = Plan(RECIPE, MARK, 6, {"psnr_db_median": 41.25, "speedup": 2.0}, "by hand, für 'alle'\n")

CHANNELS = ChannelTable.of("hidden_states", np.arange(12.0).reshape(1, 2, 2, 3))

SPECS = [
    Site("deep", 2, -2),
    Site("attn", 0.25, 0.75),
    Geometry(3, 4, 5, 2, 6, (68, 66)),
    Sparse(STA((3, 3, 3)), 0.25, 1, 2, 8, 3, 0.5, 1024, 64.0, "torch"),
    Site("span", 1, -2),
    Every(4),
    Geometric(0.25),
    Bathtub(0.25),
    Gate(0.1),
    Gate(0.2, "filtered", "previous", True, (1.5, -0.5, 0.25), "sample", 3.0),
    MaskTable(((0, 1), (0,)), 3),
    Growing(4, 2.5, 0.5),
    Within(Every(3), 0.1, 0.8, "time"),
    Ranked(4, (0.001, 0.5), 0.2, (0.1, 0.9)),
    Codebook(((0.05, 4), (0.5, 2)), 0.25),
    Verified(0.2, 0.5, 0.05, 1, 4),
    Copy(),
    Taylor(3),
    Corrector(3),
    Fitted(((), (0,), (1, 0)), ((), (1.0,), (1.5, -0.5))),
    Damped(0.1, 0.4),
    Hermite(3, 0.4),
    BackwardDifference(),
    Chebyshev(3, 0.2, 0.6, 5),
    ProbeRatio(0.9, 1.4),
    CHANNELS,
    ScaleShift((CHANNELS,)),
    Warmup(2),
    Cooldown(3),
    MaxStreak(5),
    Force((0, -1)),
    RULES[0],
    RECIPE,
    MARK,
    PLAN,
]


def good():
    """A fresh JSON form of a valid plan."""
    return json.loads(json.dumps(PLAN.to_json()))


def test_every_kind_of_spec_is_in_the_list():
    """Of this room's; other rooms bring kinds of their own (planners), and test them."""
    own = {name for name, c in spec_module._KNOWN.items() if c.__module__.startswith(ROOM)}
    assert {type(value).__name__ for value in SPECS} == own


@pytest.mark.parametrize("value", SPECS, ids=lambda value: type(value).__name__)
def test_round_trip(value):
    text = json.dumps(to_json(value))
    again = from_json(json.loads(text))
    assert again == value
    assert type(again) is type(value)
    assert json.dumps(to_json(again)) == text


def test_a_plan_survives_a_file(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == PLAN
    assert Plan.load(str(path)) == PLAN
    assert json.loads(path.read_text())["blockcache_plan"] == 1


def test_make_writes_the_schedule_down():
    recipe = Recipe((Rule(Site("stack"), Every(3)),), name="every 3")
    plan = Plan.make(recipe, MARK, even_steps(7), Layout((8,)), "note")
    assert (plan.total, plan.reached, plan.note, plan.fingerprint) == (7, {}, "note", MARK)
    assert plan.recipe.rules[0].policy.computed == ((0, 3, 6),)
    assert plan.recipe.name == "every 3"


def test_specs_are_frozen():
    with pytest.raises(AttributeError):
        RECIPE.name = "other"
    with pytest.raises(AttributeError):
        RULES[0].policy.budget = 0.9


@pytest.mark.parametrize(
    "changes",
    [dict(model="Wan"), dict(config="fedcba9876543210"), dict(blocks=9)],
    ids=lambda changes: next(iter(changes)),
)
def test_a_plan_for_another_model_is_refused(changes):
    settings = dict(model=MARK.model, config=MARK.config, blocks=MARK.blocks)
    other = Fingerprint(**(settings | changes))
    with pytest.raises(PlanMismatchError, match="was made for"):
        MARK.check(other)
    MARK.check(Fingerprint(**settings, sampler="Euler", dtype="float32"))


def changed(**changes):
    """A valid plan with top-level keys replaced; None removes one."""
    data = good()
    for key, value in changes.items():
        data[key] = value
        if value is None:
            del data[key]
    return data


def nested(value, depth):
    for _ in range(depth):
        value = [value]
    return value


def deep_recipe():
    value = {"kind": "Copy"}
    for _ in range(100_000):
        value = {"kind": "Recipe", "rules": [value]}
    return value


HUGE = 10**5000  # more digits than Python turns into text

BAD = {
    "no dict": [good()],
    "null": None,
    "empty": {},
    "no version": changed(blockcache_plan=None),
    "version 2": changed(blockcache_plan=2),
    "version true": changed(blockcache_plan=True),
    "version text": changed(blockcache_plan="1"),
    "version nan": changed(blockcache_plan=math.nan),
    "version huge": changed(blockcache_plan=HUGE),
    "version list": changed(blockcache_plan=[1]),
    "no kind": changed(kind=None),
    "other kind": changed(kind="Recipe"),
    "kind list": changed(kind=["Plan"]),
    "unknown key": changed(speed=3),
    "key self": changed(self=1),
    "key cls": changed(cls=1),
    "key number": {**good(), 7: 1},
    "key surrogate": {**good(), "\ud800": 1},
    "no recipe": changed(recipe=None),
    "recipe text": changed(recipe="balanced"),
    "recipe is a rule": changed(recipe=to_json(RULES[0])),
    "recipe is a plan": changed(recipe=good()),
    "recipe without kind": changed(recipe={"rules": []}),
    "unknown kind": changed(recipe={"kind": "os.system", "rules": []}),
    "kind of python": changed(recipe={"kind": "__class__"}),
    "kind surrogate": changed(recipe={"kind": "\ud800"}),
    "no rules": changed(recipe={"kind": "Recipe", "rules": []}),
    "spec with self": changed(recipe={"kind": "Recipe", "self": 1, "rules": []}),
    "total zero": changed(total=0),
    "total negative": changed(total=-3),
    "total text": changed(total="6"),
    "total true": changed(total=True),
    "total float": changed(total=6.5),
    "total of another run": changed(total=7),
    "total huge": changed(total=HUGE),
    "blocks negative": changed(fingerprint={**to_json(MARK), "blocks": -1}),
    "reached nan": changed(reached={"psnr": math.nan}),
    "reached infinite": changed(reached={"psnr": math.inf}),
    "reached text": changed(reached={"psnr": "41"}),
    "reached huge": changed(reached={"psnr": HUGE}),
    "reached list": changed(reached=[1]),
    "note number": changed(note=1),
    "deep list": changed(note=nested(1, 5000)),
    "deep recipe": changed(recipe=deep_recipe()),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plan_is_refused_in_one_line(name):
    with pytest.raises(PlanError) as caught:
        Plan.from_json(BAD[name])
    text = str(caught.value)
    assert 10 < len(text) < 500
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"kind": "Every", "n": 2, "m": 3}, "m"),
        ({"kind": "Every", "n": None}, "n"),
        ({"kind": "Rule", "site": {"kind": "Site"}}, "policy"),
        ({"kind": "Taylor", "order": 9}, "order"),
        ({"kind": "MaskTable", "computed": [[0, 9]], "total": 3}, r"0\.\.2"),
        ({"kind": "Force", "steps": [0, "a"]}, "steps"),
    ],
)
def test_messages_name_the_field(value, word):
    with pytest.raises(PlanError, match=word):
        from_json(value)


@pytest.mark.parametrize("make", [lambda: Every(HUGE), lambda: Every(-HUGE), lambda: Gate(HUGE)])
def test_huge_integers_are_plan_errors(make):
    with pytest.raises(PlanError, match="Every|Gate"):
        make()


def test_a_name_that_means_something_to_the_format_cannot_spoil_a_file():
    """`reached={"kind": 1.0}` once wrote a file that could not be read."""
    try:
        plan = Plan(RECIPE, MARK, 6, {"kind": 1.0})
    except PlanError:
        return  # refused when it is made: as good
    assert Plan.from_json(plan.to_json()) == plan


# Files.


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "JSON"),
        (b"not json", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, "JSON|nested"),
        (b'{"a":' * 100_000, "JSON|nested"),
        (b"1" * 5000, "JSON|plan"),
        (b"NaN", "plan"),
        (b"{}", "blockcache_plan"),
        (b'{"blockcache_plan": 1e999, "kind": "Plan"}', "format"),
        (b"\x80\x04K\x01.", "JSON"),  # a pickle
    ],
)
def test_files_that_are_no_plans(tmp_path, content, word):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=word) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_directory_and_nothing_at_all(tmp_path):
    with pytest.raises(PlanError, match="a directory"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="nothing"):
        Plan.load(tmp_path / "missing.json")


@pytest.mark.parametrize("path", ["x" * 5000 + ".json", "a\0b.json", "\ud800.json", ""])
def test_paths_no_file_can_have(path):
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(path)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**30)  # sparse: takes no room on the disk
    monkeypatch.setattr(type(path), "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(PlanError, match="larger than 32 MiB"):
        Plan.load(path)


# Anything at all.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63) - 1, 10**400, "<huge>"]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters()),  # with surrogates
    st.sampled_from([*spec_module._KNOWN, "kind", "self", "cls", "stack", "block", "residual"]),
)
KEYS = st.one_of(
    st.sampled_from(
        ["kind", "self", "rules", "site", "policy", "steps", "computed", "total", "scope", "n"]
    ),
    st.text(max_size=4),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.builds(
            lambda kind, fields: {"kind": kind, **fields},
            st.sampled_from(sorted(spec_module._KNOWN)),
            st.dictionaries(KEYS, inner, max_size=3),
        ),
    ),
    max_leaves=12,
)


def enlarged(data):
    """`data` with a number in place of each "<huge>" that hypothesis itself could not print."""
    if isinstance(data, dict):
        return {key: enlarged(value) for key, value in data.items()}
    if isinstance(data, list):
        return [enlarged(value) for value in data]
    return HUGE if data == "<huge>" else data


def accepts(data):
    """Whether `data` is read as a plan; anything but a plan or our error fails the test."""
    data = enlarged(data)
    try:
        plan = Plan.from_json(data)
    except BlockCacheError as error:
        str(error)
        return False
    assert isinstance(plan, Plan)
    assert Plan.from_json(plan.to_json()) == plan
    return True


@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_arbitrary_values(data):
    accepts(data)
    if isinstance(data, dict):
        accepts({"blockcache_plan": 1, "kind": "Plan", **data})
    try:
        from_json(enlarged(data))
    except BlockCacheError:
        pass


def places(data, path=()):
    """Every position in nested lists and dictionaries."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items if isinstance(data, (dict, list)) else ():
        yield from (
            places(value, (*path, key)) if isinstance(value, (dict, list)) else ((*path, key),)
        )


def mutated(rng, replacement):
    """A valid plan with one position replaced, removed or renamed."""
    data = good()
    path = rng.choice([p for p in places(data) if p])
    where = data
    for key in path[:-1]:
        where = where[key]
    way = rng.randrange(3)
    if way == 0:
        where[path[-1]] = replacement
    elif way == 1:
        del where[path[-1]]
    elif isinstance(where, dict):
        where[rng.choice(["self", "kind", "x", "rules"])] = where.pop(path[-1])
    else:
        where.append(copy.deepcopy(where[path[-1]]))
    return data


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), replacement=ANYTHING)
def test_mutated_plans(seed, replacement):
    accepts(mutated(random.Random(seed), replacement))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 3000), flip=st.integers(0, 255))
def test_damaged_files(tmp_path, seed, cut, flip):
    text = bytearray(json.dumps(good()).encode())
    rng = random.Random(seed)
    text[rng.randrange(len(text))] = flip
    path = tmp_path / "plan.json"
    path.write_bytes(bytes(text[: len(text) - cut] if cut % 2 else text))
    try:
        assert isinstance(Plan.load(path), Plan)
    except BlockCacheError:
        pass
