"""Drawn boxes: places, colours, labels, and an input that stays as it was."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from utils import drawing
from utils.drawing import color, draw_boxes, grid, text_color, write_image
from utils.errors import UserError


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 114, np.uint8)


def changed(image: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that are no longer grey."""
    rows, columns = np.nonzero((image != 114).any(2))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_input_is_not_touched_and_no_boxes_is_a_plain_copy():
    image = grey()
    assert (draw_boxes(image, [[10, 40, 60, 90]], [1], names=["a", "b"]) != 114).any()
    empty = draw_boxes(image, np.zeros((0, 4)), [], names=["a"])
    assert empty is not image
    assert (image == 114).all()
    assert (empty == 114).all()


def test_the_line_lies_on_the_box_in_the_colour_of_the_best_class():
    boxes, names = [[10, 40, 60, 90]] * 2, ["a"] * 4
    hidden = {"hide_labels": True, "thickness": 1}
    out = draw_boxes(grey(), boxes, [3, 2], names=names, scores=[0.9, 0.1], **hidden)
    assert changed(out) == (10, 40, 60, 90)
    assert tuple(out[65, 10]) == tuple(out[90, 30]) == color(3)
    assert (out[45:85, 15:55] == 114).all()


def test_colours_are_fixed_and_distinct():
    assert color(0) == color(256) == (230, 25, 75)
    colours = np.array([color(label) for label in range(256)])
    assert len(np.unique(colours, axis=0)) == 256
    assert 0 <= colours.min() <= colours.max() <= 255
    pairs = itertools.combinations(colours[:80], 2)
    assert min(np.linalg.norm(a - b) for a, b in pairs) > 40


def test_text_is_black_on_light_and_white_on_dark_with_contrast_over_4_5():
    assert text_color((255, 225, 25)) == (0, 0, 0)
    assert text_color((0, 0, 117)) == (255, 255, 255)

    def luminance(shade):
        v = np.array(shade) / 255
        linear = np.where(v <= 0.03928, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    for label in range(80):
        pair = luminance(color(label)), luminance(text_color(color(label)))
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5


def shows(image: np.ndarray, text: str, label: int) -> bool:
    """Whether the whole label is somewhere in the image."""
    patch = drawing._label(text, drawing.SMALLEST_FONT, color(label))
    found = cv2.matchTemplate(image, patch, cv2.TM_SQDIFF)
    y, x = np.unravel_index(found.argmin(), found.shape)
    return np.array_equal(image[y : y + patch.shape[0], x : x + patch.shape[1]], patch)


@pytest.mark.parametrize(
    "box", [[0, 0, 30, 30], [150, 0, 159, 20], [140, 100, 159, 119], [0, 110, 10, 119]]
)
def test_labels_stay_inside_and_show_their_whole_text(box):
    tight = draw_boxes(grey(), [box], [1], names=["x", "umbrella"], scores=[0.87])
    assert tight.shape == (120, 160, 3)
    assert shows(tight, "umbrella 0.87", 1)


def test_labels_of_near_boxes_do_not_hide_each_other():
    boxes, names = [[40, 60, 90, 100], [42, 61, 92, 101], [44, 62, 94, 102]], ["one", "two", "six"]
    out = draw_boxes(grey(200, 200), boxes, [0, 1, 2], names=names, scores=[0.9, 0.8, 0.7])
    assert all(shows(out, f"{name} 0.{9 - row}0", row) for row, name in enumerate(names))


@pytest.mark.parametrize("box", [[0, 0, 59, 19], [float("nan"), -1e30, float("inf"), 1e30]])
def test_wide_labels_and_boxes_that_are_not_finite_do_not_break_it(box):
    out = draw_boxes(grey(20, 60), [box], [0], names=["a very long name indeed"])
    assert out.shape == (20, 60, 3)


def test_score_and_label_can_be_hidden():
    box = {"boxes": [[10, 40, 150, 90]], "labels": [0], "names": ["cat"]}
    out = [draw_boxes(grey(), **box, scores=[0.5], hide_conf=hidden) for hidden in (True, False)]
    assert [shows(image, "cat 0.50", 0) for image in out] == [False, True]
    assert np.array_equal(out[0], draw_boxes(grey(), **box))
    assert changed(draw_boxes(grey(), **box, scores=[0.5], hide_labels=True))[1] >= 39


def test_line_and_letters_grow_with_the_image():
    sizes = []
    for side in (300, 3000):
        box = np.array([[1, 2, 5, 5]]) * side // 6
        out = draw_boxes(grey(side, side), box, [0], names=["a"])
        line = int((out[side * 2 // 3] != 114).any(1).sum()) // 2
        sizes.append((line, box[0, 1] - changed(out)[1]))
    (thin, low), (thick, high) = sizes
    assert thin == 1
    assert 12 <= thick <= 13
    assert high > 5 * low  # the labels above the box


def test_names_have_glyphs_or_become_the_class_number(monkeypatch):
    for name in ("Fußgänger", "пешеход", "πεζός"):
        assert drawing._text(0, [name], 0.5) == f"{name} 0.50"
        letters = {bytes(drawing._font(drawing._latin(), 16).getmask(char)) for char in set(name)}
        assert len(letters) == len(set(name))  # all different: none is the missing-glyph square
    assert drawing._text(9, ["only one"], 0.25) == "class 9 0.25"
    monkeypatch.setattr(drawing, "WIDE_FONTS", ())
    drawing._font_for.cache_clear()
    assert drawing._text(7, ["x"] * 7 + ["行人"], None) == "class 7"
    drawing._font_for.cache_clear()


def test_grid_places_cells_row_by_row_and_shrinks_them_where_they_are_too_large():
    images = [np.full((40, 60, 3), value, np.uint8) for value in (10, 20, 30)]
    out = grid(images)
    assert out.shape == (82, 122, 3)
    assert [int(out[y, x, 0]) for y, x in ((20, 20), (20, 90), (60, 20))] == [10, 20, 30]
    assert out[60, 90, 0] == 255  # no fourth image
    assert grid([np.zeros((960, 1920, 3), np.uint8)] * 2).shape == (480, 1922, 3)


def test_write_image_keeps_rgb_and_names_what_it_cannot_write(tmp_path):
    image = grey()
    image[:, :, 0] = 200
    path = tmp_path / "bild äöü.png"
    write_image(path, image)
    assert np.array_equal(cv2.imdecode(np.fromfile(path, np.uint8), 1)[..., ::-1], image)
    with pytest.raises(UserError, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", image)
    with pytest.raises(UserError, match="cannot write"):
        write_image(tmp_path / "missing" / "a.png", image)
