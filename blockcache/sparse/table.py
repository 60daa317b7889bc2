"""The table of methods, from the planners' own cards."""

from blockcache.plan.geometry import Geometry
from blockcache.sparse import by_name, names

EXAMPLE = Geometry(21, 30, 52)
"""Wan 2.1 1.3B, 81 frames of 480 x 832: 12 heads of 128, bf16."""

HEADER = ("planner", "paper", "layout", "score", "select", "force", "remainder", "state")


def methods_table() -> str:
    """Markdown: one row per planner with its defaults.

    State is what one layer keeps for one branch of the example, in MiB.
    """
    rows = [HEADER, ("---",) * len(HEADER)]
    for name in names():
        planner = by_name(name)
        card = planner.describe()
        mib = planner.state_bytes(EXAMPLE, batch=1, heads=12, head_dim=128, itemsize=2) / 2**20
        state = f"{card.state}: {mib:.3g} MiB" if mib else "none"
        what = (card.layout, card.score, card.select, card.force, card.remainder)
        rows.append((f"`{name}`", card.paper, *what, state))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
