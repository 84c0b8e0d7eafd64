"""The anchor-free head's decoding, first biases and shapes, by hand; in YAML, any level."""

from __future__ import annotations

import pytest
import torch
import yaml

from models.builder import build_detector
from models.heads.anchor import Detect
from models.heads.free import FreeDetect
from models.profile.counting import profile_spec
from models.spec import ModelSpec
from models.yaml.parser import load_spec, parse_spec
from utils.errors import UserError


def head(device: torch.device, **options) -> FreeDetect:
    torch.manual_seed(0)
    free = FreeDetect([8, 16], classes=2, **options)
    free.set_stride((8, 16), ())
    return free.to(device)


def test_decode_by_hand(device: torch.device) -> None:
    raw = [torch.full((2, 4, 5, 6), -9.0), torch.full((2, 2, 3, 6), -9.0)]
    raw[1][1, 1, 2] = torch.tensor([1.0, 0.5, 2.0, -0.25, 0.0, 1.0])
    raw[0][0, 3, 0] = torch.tensor([-1.0, -2.0, 0.5, 1.0, torch.nan, -9.0])
    image, boxes, scores = head(device).decode([y.to(device) for y in raw], 0.49)
    # the point (2.5, 1.5) * 16; a negative side: the box ends before the point
    expected = torch.tensor([[40 - 16, 24 - 8, 40 + 32, 24 - 4.0]])
    assert image.tolist() == [0, 1]  # what is not a number is kept
    assert torch.allclose(boxes[1:].cpu(), expected)
    assert torch.allclose(scores[1:].cpu(), torch.tensor([[0.5, 0.73105858]]))
    all_boxes, all_scores = head(device).dense([y.to(device) for y in raw])
    assert all_boxes.shape == (2, 20 + 6, 4)
    assert torch.equal(all_boxes[1, 20 + 5], boxes[1])  # row 1, column 2 of the second level
    assert torch.equal(all_scores[1, 20 + 5], scores[1])
    left, top, right, bottom = boxes[0].tolist()
    assert right == left  # sides that cross make an empty box, in its middle
    assert bottom == top


def test_a_distribution_is_decoded_to_its_mean(device: torch.device) -> None:
    raw = [torch.full((1, 1, 1, 4 * 4 + 2), -9.0), torch.full((1, 1, 1, 18), -9.0)]
    sides = torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 0, 1], [0, 0.5, 0.5, 0]])
    raw[1][0, 0, 0] = torch.cat((sides.clamp(min=1e-12).log().flatten(), torch.ones(2)))
    _, boxes, _ = head(device, reg_max=4).decode([y.to(device) for y in raw], 0.1)
    expected = torch.tensor([8 - 1.5 * 16, 8 - 0.5 * 16, 8 + 3.0 * 16, 8 + 1.5 * 16])
    assert torch.allclose(boxes[0].cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"reg_max": 16}, {"depthwise": False, "width": 24}])
def test_first_outputs_are_the_priors(device: torch.device, options: dict) -> None:
    free = head(device, **options)
    maps = [torch.zeros(1, 8, 4, 4, device=device), torch.zeros(1, 16, 2, 2, device=device)]
    raw = free.eval()(maps)
    assert [y.shape for y in raw] == [(1, n, n, 4 * free.reg_max + 2) for n in (4, 2)]
    image, boxes, scores = free.decode(raw, 0.001)
    assert len(image) == 20
    assert scores.min().item() == pytest.approx(0.01, rel=0.5)
    width = 16.0 if free.reg_max == 1 else 16 * 7.5  # 2 strides; the mean of 0 to 15, twice
    assert (boxes[0, 2] - boxes[0, 0]).item() == pytest.approx(width, rel=0.2)


def test_evaluation_predicts_in_the_type_of_the_weights_and_fusing_changes_nothing(
    device: torch.device,
) -> None:
    model = build_detector(load_spec("yolov5n", head="free"), classes=3).to(device).eval()
    images = torch.rand(1, 3, 64, 64, device=device)
    with torch.no_grad():
        plain = model(images)
        with torch.autocast(device.type, torch.bfloat16):
            assert {y.dtype for y in model(images)} == {torch.float32}
        fused = model.fuse()(images)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in model.head.modules())
    for one, two in zip(plain, fused, strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_cost_of_the_smallest_size_is_bounded() -> None:
    """The gain is not bought by FLOPs."""
    flops = {
        name: profile_spec(load_spec("yolov5n", head=name), image_size=640, classes=3).flops / 1e9
        for name in ("anchor", "free", "free-e2e")
    }
    assert flops["anchor"] == pytest.approx(4.137, abs=1e-3)
    assert flops["anchor"] < flops["free"] == flops["free-e2e"] <= 4.7  # one branch is deployed
    dense = load_spec("yolov5s", head="free")
    convolutions = [
        part
        for part in build_detector(dense, classes=3).head.modules()
        if isinstance(part, torch.nn.Conv2d)
    ]
    assert {part.groups for part in convolutions} == {1}  # wider sizes are dense


@pytest.mark.parametrize("neck", ["pan-p2", "pan-p6"])
def test_any_level(neck: str, device: torch.device) -> None:
    spec = load_spec("yolov5n", backbone="ghostnet-0.5", neck=neck, head="free")
    model = build_detector(spec, classes=2).to(device).eval()
    assert len(model.stride) == 4
    with torch.no_grad():
        raw = model(torch.rand(1, 3, 128, 128, device=device))
    assert [128 // y.shape[1] for y in raw] == list(model.stride)
    again = parse_spec(yaml.safe_load(yaml.safe_dump(spec.to_yaml_dict())), "resolved")
    assert (again.layers[-1].block, again.anchors) == ("FreeDetect", ())
    assert ModelSpec.from_dict(spec.to_dict()) == spec


class TestYaml:
    @staticmethod
    def variant(tmp_path, text: str) -> ModelSpec:
        file = tmp_path / "variant.yaml"
        file.write_text(f"extends: yolov5n.yaml\n{text}")
        return load_spec(str(file))

    def test_a_swap_is_all_it_takes(self, tmp_path) -> None:
        plain = self.variant(tmp_path, "swap: {Detect: FreeDetect}")
        assert plain.layers[-1].args == {}
        assert plain.layers[:-1] == load_spec("yolov5n").layers[:-1]
        text = "swap: {Detect: {block: FreeDetect, width: 200, reg_max: 16, depthwise: true}}"
        last = self.variant(tmp_path, text).layers[-1]
        # the width follows the model's multiple of 0.25, rounded up to 8
        assert last.args == {"width": 56, "reg_max": 16, "depthwise": True}
        assert last.section == "head"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("swap: {Detect: {block: FreeDetect, reg_mx: 4}}", "did you mean 'reg_max'"),
            ("swap: {Detect: {block: FreeDetect, reg_max: 0}}", "reg_max must be"),
            ("swap: {Detect: {block: FreeDetect, depthwise: 1}}", "depthwise must be true"),
            ("swap: {Detect: FreeDetct}", "did you mean 'FreeDetect'"),
            (
                "swap: {Detect: {block: FreeDetect, assigner: simota, small_objects: true}}",
                "small_objects changes nothing",
            ),
            ("swap: {Detect: {block: FreeDetect, assigner: topk}}", "assigner must be aligned or"),
            ("swap: {C3: FreeDetect}", "FreeDetect in place of C3"),
        ],
    )
    def test_mistakes_name_the_remedy(self, tmp_path, text: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            build_detector(self.variant(tmp_path, text), classes=2)

    def test_the_flag_replaces_either_head_and_keeps_its_own_options(self, tmp_path) -> None:
        file = tmp_path / "free.yaml"
        file.write_text(
            "backbone: csp-n\nneck: pan\n"
            "head: [[[out3, out4, out5], 1, FreeDetect, {reg_max: 4}]]\n"
        )
        assert load_spec(str(file)).anchors == ()
        assert load_spec(str(file), head="free").layers[-1].args == {"reg_max": 4}
        two = load_spec(str(file), head="free-e2e").layers[-1].args
        assert two == {"reg_max": 4, "end_to_end": True}
        file.write_text(file.read_text().replace("reg_max: 4", "reg_max: 4, end_to_end: true"))
        assert load_spec(str(file), head="free").layers[-1].args == {"reg_max": 4}
        anchor = load_spec(str(file), head="anchor")
        assert (anchor.layers[-1].block, anchor.anchors) == ("Detect", 3)  # AutoAnchor finds them
        assert isinstance(build_detector(anchor, classes=2).head, Detect)
        same = load_spec("yolov5n", head="anchor")
        assert (same.layers, same.anchors) == (load_spec("yolov5n").layers, same.anchors)
        narrow = load_spec(str(file), neck="pan-p2")
        assert narrow.layers[-1].args == two
        assert len(narrow.layers[-1].sources) == 4
