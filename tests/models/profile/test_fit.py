"""Budgets: what is reached, how it is named, and what cannot be."""

from __future__ import annotations

import pytest

from models.profile.counting import profile_spec
from models.profile.fit import TOLERANCE, fit, read_budget
from models.yaml.parser import load_draft, load_spec, parse_spec
from utils.errors import UserError


def cost(spec, size: int = 640):
    return profile_spec(spec, image_size=size, classes=80)


@pytest.mark.parametrize(
    ("backbone", "neck", "text"),
    [
        ("shufflenetv2-0.5", "pan-shuffle", "gflops=1.5"),
        ("ghostnet-0.5", "pan-ghost", "params=1.2e6"),
        (None, None, "macs=2.3e9"),
    ],
)
def test_within_two_percent(backbone, neck, text) -> None:
    budget = read_budget(text, image_size=640)
    fitted = fit(load_draft("yolov5n", backbone=backbone, neck=neck), budget, classes=80)
    profile = cost(fitted.spec)
    found = {"gflops": profile.flops, "params": profile.params, "macs": profile.macs}[budget.kind]
    assert abs(found / budget.value - 1) <= TOLERANCE
    assert found == fitted.cost
    name = backbone or "yolov5n"
    note = f"backbone {name} at width {fitted.backbone_width:g}, not published"
    assert fitted.spec.notes == (note,)


def test_the_result_is_plain_yaml_of_the_same_cost() -> None:
    budget = read_budget("gflops=0.6@320", image_size=640)
    fitted = fit(load_draft("yolov5n", backbone="ghostnet-0.5", neck="pan"), budget, classes=80)
    again = parse_spec(fitted.spec.to_yaml_dict(), "again")
    assert cost(again, 320).macs == cost(fitted.spec, 320).macs
    assert abs(cost(again, 320).flops / 0.6e9 - 1) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "parts", "notes"),
    [
        ("yolov5n", {}, ()),  # what costs the budget stays as it is
        ("yolov5l", {"backbone": "csp-n", "neck": "pan"}, None),  # the neck becomes as deep
    ],
)
def test_from_both_ends_comes_yolov5n(name, parts, notes) -> None:
    budget = read_budget("gflops=4.5", image_size=640)
    fitted = fit(load_draft(name, **parts), budget, classes=80)
    rows = [(layer.args, layer.repeats) for layer in fitted.spec.layers]
    assert rows == [(layer.args, layer.repeats) for layer in load_spec("yolov5n").layers]
    assert fitted.neck_depth == 0.33
    assert notes is None or fitted.spec.notes == notes


@pytest.mark.parametrize(("text", "end"), [("gflops=0.001", "lowest"), ("params=1e12", "highest")])
def test_unreachable_budgets_say_what_can_be_reached(text: str, end: str) -> None:
    draft = load_draft("yolov5n", backbone="shufflenetv2-0.5", neck="fpn")
    with pytest.raises(UserError, match=rf"the {end} reachable cost is {text.split('=')[0]}="):
        fit(draft, read_budget(text, image_size=64), classes=80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gflop=4", "did you mean 'gflops'"),
        ("4.5", "expected KIND=NUMBER"),
        *((f"gflops={value}", "a number over 0") for value in ("many", "-1", "inf", "4@big")),
    ],
)
def test_impossible_budgets(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_budget(text, image_size=640)


def test_a_budget_names_its_own_size() -> None:
    assert read_budget("gflops=4.5", image_size=320).image_size == 320
    assert read_budget("gflops=4.5@640", image_size=320).image_size == 640
