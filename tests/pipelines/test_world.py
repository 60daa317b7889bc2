"""The world of coloured shapes: captions, the held-out split, drawing."""

import pytest
import torch

from blockcache.pipelines.embedded import world
from blockcache.pipelines.embedded.text import VOCABULARY
from blockcache.pipelines.embedded.world import (
    COLOR_NAMES,
    COLORS,
    NO_RELATION,
    RELATIONS,
    SHAPES,
    SIZES,
    Painter,
    Scene,
    sample_scene,
)

RED, GREEN, BLUE, WHITE = (COLOR_NAMES.index(name) for name in ("red", "green", "blue", "white"))
CIRCLE, SQUARE, RING = (SHAPES.index(name) for name in ("circle", "square", "ring"))
SMALL, LARGE = range(2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixel(image: torch.Tensor, x: int, y: int) -> list[float]:
    """The colour at ``x`` to the right of and ``y`` above the middle of the picture."""
    return image[:, 32 - y, 32 + x].tolist()


def test_caption_names_every_attribute():
    pair = Scene(GREEN, RED, CIRCLE, LARGE, RELATIONS.index("left of"), BLUE, SQUARE, SMALL)
    assert pair.caption() == (
        "a large red circle left of a small blue square on a green background"
    )
    assert pair.caption(sizes=(False, True), background=False) == (
        "a red circle left of a small blue square"
    )
    assert Scene(GREEN, RED, CIRCLE, LARGE).caption() == "a large red circle on a green background"


def test_split_is_a_fixed_function_of_the_scene():
    """The shipped model's hold-out depends on these values: they must never change."""
    held_out = [
        (background, color, shape)
        for background in range(10)
        for color in range(10)
        for shape in range(8)
        if background != color and Scene(background, color, shape, SMALL).is_held_out
    ]
    assert held_out[:3] == [(0, 1, 0), (0, 5, 7), (1, 3, 1)]
    assert len(held_out) == 34


def test_sizes_do_not_move_a_scene_between_splits():
    g = generator()
    for _ in range(50):
        row = sample_scene(g, held_out=True).row()
        for size in range(2):
            row[3] = size
            assert Scene(*row).is_held_out


def test_splits_are_disjoint():
    g = generator(1)
    train = {sample_scene(g).caption(sizes=(False, False)) for _ in range(1500)}
    test = {s.caption(sizes=(False, False)) for s in world.held_out_scenes(300, seed=1)}
    assert len(test) > 250
    assert not train & test


def test_held_out_prompts_are_distinct_full_and_repeatable():
    prompts = world.held_out_prompts(40, seed=2)
    assert len(set(prompts)) == 40
    assert prompts == world.held_out_prompts(40, seed=2)
    assert prompts[:20] == world.held_out_prompts(20, seed=2)
    assert prompts != world.held_out_prompts(40, seed=3)
    for prompt in prompts:
        assert prompt.endswith(" background")
        assert set(prompt.split()) <= set(VOCABULARY)


def test_colors_of_a_scene_differ():
    g = generator(2)
    for _ in range(200):
        scene = sample_scene(g)
        used = [scene.background, scene.color] + [scene.color2] * (scene.count == 2)
        assert len(set(used)) == len(used)


def test_training_captions_are_now_and_then_empty_or_shorter():
    g = generator(3)
    scene = Scene(GREEN, RED, CIRCLE, LARGE)
    captions = [world.training_caption(scene, g) for _ in range(400)]
    share = {text: captions.count(text) / 400 for text in set(captions)}
    assert 0.02 < share[""] < 0.09
    assert share[scene.caption()] > 0.7
    assert set(share) == {
        "",
        "a large red circle on a green background",
        "a red circle on a green background",
        "a large red circle",
        "a red circle",
    }


@pytest.mark.parametrize("relation", RELATIONS)
def test_relation_holds_in_the_drawn_centres(relation):
    scene = Scene(GREEN, RED, CIRCLE, SMALL, RELATIONS.index(relation), BLUE, SQUARE, SMALL)
    first, second = world.sample_centers([scene] * 30, generator()).unbind(1)
    dx, dy = (first - second).unbind(1)
    along = {"left of": -dx, "right of": dx, "above": dy, "below": -dy}[relation]
    across = dy if "of" in relation else dx
    assert (along == 32).all()
    assert (across.abs() <= 16).all()


def test_pixels_of_a_pair():
    scene = Scene(GREEN, RED, CIRCLE, SMALL, RELATIONS.index("left of"), BLUE, SQUARE, LARGE)
    image = Painter().draw([scene], torch.tensor([[[-16, 2], [16, -4]]]))[0]
    assert image.shape == (3, 64, 64)
    assert pixel(image, -16, 2) == pytest.approx(COLORS["red"])
    assert pixel(image, 16, -4) == pytest.approx(COLORS["blue"])
    # Top row: the background at full brightness; bottom row: a fifth darker.
    assert image[:, 0, 0].tolist() == pytest.approx(COLORS["green"])
    assert image[:, 63, 0].tolist() == pytest.approx([0.8 * c for c in COLORS["green"]])


def test_a_single_object_has_no_second():
    scene = Scene(WHITE, RED, CIRCLE, SMALL, NO_RELATION, GREEN, SQUARE, LARGE)
    image = Painter().draw([scene], torch.zeros(1, 2, 2, dtype=torch.long))[0]
    greenish = image[1] > image[0] + 0.05
    assert not greenish.any()


def test_ring_is_open_and_outlines_are_one_pixel_wide():
    masks = world.shape_masks()
    assert masks.shape == (8, 2, 128, 128)
    assert masks[RING, :, 63, 63].tolist() == [0, 0]
    assert masks[CIRCLE, :, 63, 63].tolist() == [1, 1]
    side = 2 * 0.82 * 13.4
    assert masks[SQUARE, LARGE].sum().item() == pytest.approx(side**2, rel=0.02)
    row = masks[CIRCLE, LARGE, 63]
    assert ((row > 0) & (row < 1)).sum() <= 2


@pytest.mark.parametrize("size", range(len(SIZES)))
def test_shapes_are_distinct_and_fit_beside_each_other(size):
    masks = world.shape_masks()[:, size]
    half = masks.flatten(1)
    common = half @ half.T
    area = common.diagonal()
    overlap = common / (area[:, None] + area - common) - torch.eye(len(SHAPES))
    assert overlap.max() < 0.9
    # Centres of a pair are 32 pixels apart, and 16 or more from the border.
    assert masks[:, : 64 - 16].sum() == 0
    assert masks[:, :, : 64 - 16].sum() == 0
    assert masks[:, 64 + 16 :].sum() == 0


def test_drawing_is_repeatable():
    scenes = [sample_scene(generator(seed)) for seed in range(8)]
    first = Painter().draw(scenes, world.sample_centers(scenes, generator()))
    again = Painter().draw(scenes, world.sample_centers(scenes, generator()))
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 1
