"""Sites: limits and pieces."""

import pytest

from blockcache.errors import PlanError
from blockcache.plan import Layout, Site


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (Site("stack"), (0, 6)),
        (Site("span", 1), (1, 6)),
        (Site("span", 2, 4), (2, 4)),
        (Site("span", -2), (4, 6)),
        (Site("span", 1, -1), (1, 5)),
        (Site("block", 5, 6), (5, 6)),
    ],
)
def test_limits(site, expected):
    assert site.limits(6) == expected


@pytest.mark.parametrize(
    "site",
    [
        Site("span", 6),
        Site("span", 0, 7),
        Site("span", 3, 3),
        Site("span", 0, 0),
        Site("span", 4, 2),
        Site("span", -7),
        Site("span", 0, -6),
        Site("block", 0, -99),
    ],
)
def test_sites_outside_the_model_are_refused(site):
    with pytest.raises(PlanError, match="does not fit a model of 6 blocks"):
        site.limits(6)


@pytest.mark.parametrize(
    ("site", "chains", "expected"),
    [
        (Site("stack"), (6,), ((0, 6),)),
        (Site("stack"), (2, 4), ((0, 2), (2, 6))),
        (Site("span", 1, 5), (2, 4), ((1, 2), (2, 5))),
        (Site("span", 2), (2, 4), ((2, 6),)),
        (Site("span", 1, 2), (2, 4), ((1, 2),)),
        (Site("block", 1, 4), (2, 4), ((1, 2), (2, 3), (3, 4))),
    ],
)
def test_no_unit_reaches_across_two_chains(site, chains, expected):
    assert site.units(Layout(chains)) == expected


@pytest.mark.parametrize("scope", ["stack", "model"])
def test_scopes_without_limits_refuse_them(scope):
    assert Site(scope).lo == 0
    with pytest.raises(PlanError, match="takes no lo and hi"):
        Site(scope, 1)
    with pytest.raises(PlanError, match="takes no lo and hi"):
        Site(scope, 0, 2)


def test_an_unknown_scope_is_refused():
    with pytest.raises(PlanError, match="scope"):
        Site("layer")
