"""Drawn boxes: places, colours, labels, and an input that stays as it was."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from utils import drawing
from utils.drawing import Tile, color, draw_boxes, draw_tiles, plot_name, text_color, write_image
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


def tile(height, width, value, title="a.jpg"):
    box = np.array([[width / 4, height / 4, width / 2, height / 2]])
    image = np.full((height, width, 3), value, np.uint8)
    return Tile(image, box, np.array([1]), title)


def test_small_tiles_are_enlarged_before_drawing_and_have_the_names_of_their_files():
    titles = ["a.jpg", "b.jpg", "c.jpg"]
    out = draw_tiles([tile(40, 60, 10 * n + 10, name) for n, name in enumerate(titles)], ["a", "b"])
    strip = drawing._title("a.jpg", 400).shape[0]
    height, gap = strip + 267, 4  # 60 x 40 becomes 400 x 267
    assert out.shape == (2 * height + gap, 800 + gap, 3)
    for n, title in enumerate(titles):
        top, left = n // 2 * (height + gap), n % 2 * (400 + gap)
        assert np.array_equal(out[top : top + strip, left : left + 400], drawing._title(title, 400))
        image = out[top + strip : top + height, left : left + 400]
        assert tuple(image[100, 100]) == color(1)  # the box's left side, not blurred
        assert tuple(image[260, 390]) == (10 * n + 10,) * 3
    assert (out[height + gap :, 404:] == 255).all()  # no fourth image
    large = draw_tiles([tile(960, 1920, 0)] * 2, ["a", "b"])
    assert large.shape == (480 + strip, 1924, 3)


def test_a_long_title_keeps_both_ends_and_is_no_wider_than_its_tile():
    name = "camera_7_2026-11-27_" + "x" * 80 + "_frame_0042.jpg"
    strip = drawing._title(name, 160)
    assert strip.shape[1] == 160
    patch = drawing._label("camera_", drawing.TITLE_FONT, drawing.WHITE)[:, :-8]
    assert np.array_equal(strip[:, : patch.shape[1]], patch)
    assert not np.array_equal(strip, drawing._title(name.replace("42", "43"), 160))


def test_a_label_never_covers_its_whole_box_nor_another_one():
    names = ["person", "umbrella"]
    for x, y in itertools.product(range(0, 150, 10), range(14, 112, 7)):
        boxes = [[x, y, x + 8, y + 8], [x, y - 13, x + 8, y - 5]]  # just where its label would be
        out = draw_boxes(grey(), boxes, [0, 1], names=names)
        for number, (left, top, right, bottom) in enumerate(boxes):
            patch = out[top : bottom + 1, left : right + 1]
            assert (patch == 114).all(2).sum() + (patch == color(number)).all(2).sum() >= 40


def test_no_box_of_a_crowd_disappears_under_the_labels_of_others():
    boxes = np.array([[x, y, x + 8, y + 8] for x in range(40, 100, 10) for y in range(40, 80, 10)])
    out = draw_boxes(grey(), boxes, [0] * len(boxes), names=["person"], scores=[0.5] * len(boxes))
    bare = draw_boxes(grey(), boxes, [0] * len(boxes), names=["person"], hide_labels=True)
    for left, top, right, bottom in boxes:
        area = slice(top, bottom), slice(left, right)
        assert (out[area] == bare[area]).all(2).mean() > 0.1
    assert (out != bare).any()  # those at the edge have labels


def test_plots_show_names_as_they_are():
    assert plot_name("$1 coin") == r"\$1 coin"
    assert plot_name("_x") == " _x"
    assert len(plot_name("x" * 80)) == 28


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
