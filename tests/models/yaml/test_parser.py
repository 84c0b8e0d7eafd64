"""The model YAML: YOLOv5's rows as they are, the four additions, and errors that help."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.builder import build_detector
from models.spec import IMAGE, ModelSpec, make_divisible, scale_repeats
from models.yaml.parser import load_spec, parse_spec
from utils.errors import UserError

ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
# A small model in the layout of the v6 files, rows by number, as reference facts describe it.
V6 = """
nc: 80
depth_multiple: 0.33
width_multiple: 0.25
anchors:
  - [10,13, 16,30, 33,23]
  - [30,61, 62,45, 59,119]
backbone:
  # [from, number, module, args]
  [[-1, 1, Conv, [64, 6, 2, 2]],
   [-1, 1, Conv, [128, 3, 2]],
   [-1, 3, C3, [128]],
   [-1, 1, Conv, [256, 3, 2]],
   [-1, 6, C3, [256]],
   [-1, 1, Conv, [512, 3, 2]],
   [-1, 1, SPPF, [512, 5]],
  ]
head:
  [[-1, 1, nn.Upsample, [None, 2, 'nearest']],
   [[-1, 4], 1, Concat, [1]],
   [-1, 3, C3, [256, False]],
   [[9, 6], 1, Detect, [nc, anchors]],
  ]
"""


def write(folder: Path, text: str, name: str = "model.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def with_rows(
    backbone: str, head: str = "[[[0], 1, Detect, [nc, anchors]]]", extra: str = ""
) -> str:
    return f"anchors: [[10,13, 16,30]]\n{extra}\nbackbone:\n  {backbone}\nhead:\n  {head}\n"


def test_rows_of_a_v6_file(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, V6))
    assert [layer.block for layer in spec.layers] == [
        "Conv", "Conv", "C3", "Conv", "C3", "Conv", "SPPF", "Upsample", "Concat", "C3", "Detect",
    ]  # fmt: skip
    assert spec.layers[0].args == {"c_out": 16, "kernel": 6, "stride": 2, "padding": 2}
    assert spec.layers[0].sources == (IMAGE,)
    assert spec.layers[4].repeats == 2  # round(6 * 0.33)
    assert spec.layers[8].sources == (7, 4)
    assert spec.layers[9].args == {"c_out": 64, "shortcut": False}
    assert spec.layers[7].args == {"size": None, "scale_factor": 2, "mode": "nearest"}
    assert [layer.section for layer in spec.layers] == ["backbone"] * 7 + ["neck"] * 3 + ["head"]
    assert spec.anchors == ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119))
    assert [scale_repeats(n, 0.33) for n in (1, 3, 6, 9)] == [1, 1, 2, 3]
    assert [scale_repeats(n, 1.33) for n in (3, 9)] == [4, 12]
    assert [make_divisible(c * 0.25, 8) for c in (64, 100, 1024)] == [16, 32, 256]


V1 = """
nc: 80
activation: nn.LeakyReLU(0.1)
depth_multiple: 0.33
width_multiple: 0.50
anchors:
  - [116,90, 156,198, 373,326]
  - [30,61, 62,45, 59,119]
  - [10,13, 16,30, 33,23]
backbone:
  [[-1, 1, Focus, [64, 3]], [-1, 1, Conv, [128, 3, 2]], [-1, 3, BottleneckCSP, [128]],
   [-1, 1, Conv, [256, 3, 2]], [-1, 9, BottleneckCSP, [256]], [-1, 1, Conv, [512, 3, 2]],
   [-1, 9, BottleneckCSP, [512]], [-1, 1, Conv, [1024, 3, 2]], [-1, 1, SPP, [1024, [5, 9, 13]]]]
head:
  [[-1, 3, BottleneckCSP, [1024, False]],
   [-1, 1, Conv, [512, 1, 1]], [-1, 1, nn.Upsample, [None, 2, 'nearest']], [[-1, 6], 1, Concat, [1]],
   [-1, 3, BottleneckCSP, [512, False]],
   [-1, 1, Conv, [256, 1, 1]], [-1, 1, nn.Upsample, [None, 2, 'nearest']], [[-1, 4], 1, Concat, [1]],
   [-1, 3, BottleneckCSP, [256, False]],
   [-1, 1, nn.Conv2d, [na * (nc + 5), 1, 1]],
   [-2, 1, Conv, [256, 3, 2]], [[-1, 14], 1, Concat, [1]],
   [-1, 3, BottleneckCSP, [512, False]],
   [-1, 1, nn.Conv2d, [na * (nc + 5), 1, 1]],
   [-2, 1, Conv, [512, 3, 2]], [[-1, 10], 1, Concat, [1]],
   [-1, 3, BottleneckCSP, [1024, False]],
   [-1, 1, nn.Conv2d, [na * (nc + 5), 1, 1]],
   [[], 1, Detect, [nc, anchors]]]
"""


def test_v1_detection_rows_become_the_detect_row(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, V1))
    assert [layer.block for layer in spec.layers].count("Conv2d") == 0
    detect = spec.layers[-1]
    assert [spec.layers[source].args["c_out"] for source in detect.sources] == [128, 256, 512]
    assert len(spec.layers) == 25
    assert spec.activation == "LeakyReLU(0.1)"


def test_one_expression_is_a_constant_and_no_other(tmp_path: Path) -> None:
    for spaced in ("na * (nc + 5)", "na*(nc+5)"):
        text = V1.replace("na * (nc + 5)", spaced)
        assert load_spec(write(tmp_path, text)).layers[-1].block == "Detect"
    for other in ("na * (nc + 6)", "__import__('os').system('true')"):
        with pytest.raises(UserError, match=r"model\.yaml:\d+: head\[9\].*c_out.*never run"):
            load_spec(write(tmp_path, V1.replace("na * (nc + 5)", other)))


def test_names_and_mapping_arguments(tmp_path: Path) -> None:
    text = """
anchors: [[10,13]]
backbone:
  - stem: [-1, 1, Conv, {c: 32, k: 3, s: 2}]
  - [-1, 1, Conv, {c_out: 32, kernel: 1}]
  - [[-1, stem], 1, Concat, [1]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""
    spec = load_spec(write(tmp_path, text))
    assert spec.layers[0].args == {"c_out": 32, "kernel": 3, "stride": 2}
    assert spec.layers[2].sources == (1, 0)
    assert spec.layers[0].name == "stem"


def test_extends_swap_keep_and_strides(tmp_path: Path) -> None:
    stem = "[-1, 1, Conv, [64, 6, 2, 2]]"
    write(tmp_path, V6.replace(f"[{stem},", f"[{{stem: {stem}}},"), "base.yaml")
    text = "extends: base.yaml\nswap: {C3: BottleneckCSP, Conv/2: Focus}\nkeep: [stem]\nwidth_multiple: 0.5\n"
    message = (
        r"model\.yaml:2: SPPF in place of Conv .*base\.yaml:.* has no use for stride=2: .*`ignores`"
    )
    with pytest.raises(UserError, match=message):
        load_spec(write(tmp_path, text.replace("Focus", "SPPF")))
    spec = load_spec(write(tmp_path, text.replace("Focus", "DWConv")))
    assert [layer.block for layer in spec.layers] == [
        "Conv", "DWConv", "BottleneckCSP", "DWConv", "BottleneckCSP", "DWConv", "SPPF",
        "Upsample", "Concat", "BottleneckCSP", "Detect",
    ]  # fmt: skip
    assert spec.layers[0].args["c_out"] == 32  # the variant's own width
    assert spec.layers[9].args == {"c_out": 128, "shortcut": False}


def test_swap_in_one_section_and_with_arguments(tmp_path: Path) -> None:
    write(tmp_path, V6, "base.yaml")
    text = "extends: base.yaml\nhead: {swap: {C3: {block: BottleneckCSP, act: ReLU}}}\n"
    blocks = load_spec(write(tmp_path, text)).layers
    assert [blocks[i].block for i in (2, 4, 9)] == ["C3", "C3", "BottleneckCSP"]
    assert blocks[9].args == {"c_out": 64, "shortcut": False, "act": "ReLU"}


def test_included_sections_equal_the_written_ones() -> None:
    text = {
        "backbone": "csp-s", "neck": "pan", "depth_multiple": 0.33, "width_multiple": 0.5,
        "anchors": ANCHORS, "head": [[["out3", "out4", "out5"], 1, "Detect", ["nc", "anchors"]]],
    }  # fmt: skip
    ours, whole = parse_spec(text, "test"), load_spec("yolov5s")
    assert same_rows(ours, whole)
    long_form = {**text, "backbone": {"file": "csp.yaml", "scale": "s"}}
    assert parse_spec(long_form, "test").layers == ours.layers


def test_round_trip_through_a_checkpoint() -> None:
    spec = load_spec("yolov5n-csp")
    assert ModelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (with_rows("- [-1, 1, Convv, [8]]"), r"model\.yaml:4: backbone\[0\]: unknown block 'Convv'; did you mean 'Conv'"),
        (with_rows("- [-1, 1, Conv, ['8+8']]"), r"model\.yaml:4: backbone\[0\]: Conv: c_out must be a whole number \(1 to 1,000,000\), got '8\+8'; expressions are never run"),
        (with_rows("- [-1, 1, Conv, [8, 3, 2, 1, 1, True, 9]]"), r"takes each of c_out, .* once, got"),
        (with_rows("- [-1, 1, Conv, {c: 8, strid: 2}]"), r"no argument 'strid'; did you mean 'stride'"),
        (with_rows("- [-1, 1, Conv, []]"), r"Conv needs c_out"),
        (with_rows("- [-1, 1, Conv, {c: 8, c_out: 8}]"), r"takes each of c_out, .* once, got \{'c': 8, 'c_out': 8\}"),
        (with_rows("- [-1, 0, Conv, [8]]"), r"number must be a whole number \(1 to 1,000,000\), got 0"),
        (with_rows("- [-1, 1, Conv, [.nan]]"), r"Conv: c_out must be a whole number .* got nan"),
        (with_rows("- [-1, 1, Conv]"), r"a row is \[from, number, block, args\]"),
        (with_rows("- [5, 1, Conv, [8]]"), r"row 0 reads 5"),
        (with_rows("- a: [-1, 1, Conv, [8]]\n  - a: [-1, 1, Conv, [8]]"), r"'a' is used twice"),
        (with_rows("- stem: [-1, 1, Conv, [8]]\n  - [stm, 1, Conv, [8]]"), r"reads 'stm'.*did you mean 'stem'"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[-1, 1, Segment, [nc, anchors]]]"), r"Segment is a segmentation model"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[-1, 1, Classify, [nc]]]"), r"Classify is a classification model"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[-1, 1, Conv, [8]]]"), r"exactly one Detect row"),
        (with_rows("- [-1, 1, Conv, [8]]", extra="activatoin: SiLU"), r"unknown key 'activatoin'; did you mean 'activation'"),
        (with_rows("- [-1, 1, Conv, [8]]", extra="activation: eval('x')"), r"activation \"eval"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[[0], 1, Detect, [nc, 'os.x']]]"), r"Detect takes \[nc, anchors\], got \['nc', 'os.x'\]"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[[0], 1, Detect, [nc, [1, 2]]]]"), r"widths and heights over 0, got 1"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[[0], 1, Detect, [nc, [[1, .inf]]]]]"), r"widths and heights over 0, got \[1, inf\]"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[[0], 1, Detect, [nc, []]]]"), r"anchors must be one list .* got \[\]"),
        (with_rows("- [-1, 1, Conv, [8]]", "[[[0, 0], 1, Detect, [nc, anchors]]]"), r"anchors for 1 levels, but Detect reads 2"),
        ("anchors: 3\nhead: []\n", r"key 'backbone' is missing"),
        ("backbone: csp-q\nanchors: 3\nhead: [[[P5], 1, Detect, []]]", r"has the scales n, s, m, l, x; 'q' is not"),
        ("backbone: cps-n\nanchors: 3\nhead: [[[P5], 1, Detect, []]]", r"did you mean 'csp-n'"),
        ("extends: model.yaml\n", r"extends itself"),
        ("extends: yolov5n.yaml\nswap: {C4: C3}\n", r"unknown block 'C4'"),
        ("extends: yolov5n.yaml\nswap: {C3: [[1]]}\n", r"model\.yaml:2: unknown block \[\[1\]\]"),
        ("extends: yolov5n.yaml\nswap: {Conv/1: C3}\nhead: [[-1, 1, Conv, [8, 3, [2]]]]", r"stride"),
        ("extends: yolov5n.yaml\nswap: {DWConv: C3}\n", r"no row of the base model has the block DWConv"),
        ("extends: yolov5n.yaml\nswap: {C3: BottleneckCSP, DWConv: Conv}\n", r"model\.yaml:2: no row of the base model has the block DWConv"),
        ("extends: yolov5n.yaml\nswap: {C3: {block: OSAStage, expnsion: 0.5}}\n", r"model\.yaml:2: OSAStage has no argument 'expnsion'; did you mean 'expansion'"),
        ("extends: yolov5n.yaml\nswap: {C3: BottleneckCSP}\nkeep: [stemm]\n", r"keep names no row 'stemm'; did you mean 'stem'"),
        ("!!python/object/apply:os.system ['true']", r"model\.yaml:1: not plain YAML"),
        ("", r"expected 'key: value' lines, found nothing"),
        ("- a\n- b\n", r"found a list"),
        ("backbone: 1\nbackbone: 2\n", r":2: key 'backbone' appears twice"),
        ("a: [b\n", r"not plain YAML"),
    ],
)  # fmt: skip
def test_errors_name_file_line_row_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_spec(write(tmp_path, text))


def test_a_missing_model_offers_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"yolov5n-gost: .*did you mean 'yolov5n-ghost'"):
        load_spec("yolov5n-gost")


def test_a_file_too_large_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    start = time.perf_counter()
    for text, message in (
        (bomb, "after expanding aliases; refused"),
        (f"a: [{'1,' * 3_000_000}1]", r"model\.yaml: over 1 MiB; refused"),
    ):
        with pytest.raises(UserError, match=message):
            load_spec(write(tmp_path, text))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": [[-1, 2**31, "Conv", [8]]]}, r"number must be .*\(1 to 1,000,000\), got 2147483648"),
        ({"backbone": [[-1, 10**6, "Conv", [8, 3, 2]]]}, r"number .*\(1 to 1,000\), got 1000000"),
        ({"backbone": [[-1, 10**6, "NormAct", []]]}, r"number .*\(1 to 1,000\), got 1000000"),
        ({"backbone": [[-1, 10**6, "DenseStage", [8]]]}, r"number .*\(1 to 1,000\), got 1000000"),
        ({"backbone": [[-1, 1, "VoVStage", {"c": 8, "layers": 10**7}]]}, "VoVStage: .*layers"),
        ({"backbone": [[-1, 1, "Conv", [25_000]]] * 2}, "row 1 Conv: over 500,000,000 parameters"),
        ({"backbone": [[-1, 1, "Conv", [10**9]]] * 2}, "Conv: c_out .* got 1000000000"),
        ({"backbone": [[-1, 1, "Conv", [8, 10**9]]]}, "Conv: kernel .* got 1000000000"),
        ({"backbone": [[-1, 1, "Conv", [8, 10**6]]]}, "row 0 Conv: "),
        ({"backbone": [[-1, 900, "Conv", [8]]] * 100}, "Conv: over 10,000 weights"),
        ({"anchors": 10_000_000}, r"anchors .*\(1 to 64\), got 10000000"),
        ({"anchors": [[8.0, 8.0] * 800_000]}, "row 1 Detect: over 500,000,000 parameters"),
    ],
)  # fmt: skip
def test_a_model_too_large_is_refused_at_once(changes: dict, message: str) -> None:
    rows = {"anchors": 3, "backbone": [[-1, 1, "Conv", [8, 3, 2]]], **changes}
    rows["head"] = [[-1, 1, "Detect", []]]
    start = time.perf_counter()
    with pytest.raises(UserError, match=message):
        build_detector(parse_spec(rows, "x"), classes=80)
    assert time.perf_counter() - start < 10


ROWS = {
    "anchors": [[10, 13, 16, 30], [30, 61, 62, 45]],
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 2, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
    ],
    "head": [[[1, 2], 1, "Detect", ["nc", "anchors"]]],
}


def test_names_are_those_given_and_training_gives_raw_maps() -> None:
    model = build_detector(load_spec("yolov5n"), classes=2, names=["a", "b"])
    assert model.names == ("a", "b")
    shapes = [tuple(y.shape) for y in model(torch.rand(2, 3, 64, 96))]  # evaluation: test_contract
    assert shapes == [(2, 3, 8, 12, 7), (2, 3, 4, 6, 7), (2, 3, 2, 3, 7)]


def test_repeats_stack_blocks_that_have_no_inner_number() -> None:
    model = build_detector(parse_spec(ROWS, "t"), classes=1)
    assert model.stride == (8, 16)  # the second row strides twice
    assert "model.1.1.conv.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": [[[0, 1], 1, "Concat", [1]], [[1, 2], 1, "Detect", []]]},
         r"t:1: head\[0\]: row 3 Concat cannot take maps of 8x128x128, 8x32x32"),
        ({"backbone": [[-1, 1, "Conv", [7, 3, 2, 1, 2]], *ROWS["backbone"][1:]]}, r"row 0 Conv: c_in must be a multiple of 2, got 3"),
        ({"backbone": [[-1, 1, "Concat", [1]], *ROWS["backbone"][1:]]}, r"backbone\[0\]: Concat: needs at least two maps"),
        ({"backbone": [[-1, 1, "Conv", [8, 3, 3]], *ROWS["backbone"][1:]]}, r"must divide the image evenly"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_detector(parse_spec({**ROWS, **change}, "t"), classes=2)


HEAD = [[["out3", "out4", "out5"], 1, "Detect", ["nc", "anchors"]]]


def same_rows(one: ModelSpec, other: ModelSpec) -> bool:
    rows = [[replace(row, where="") for row in spec.layers] for spec in (one, other)]
    return rows[0] == rows[1]


class TestSections:
    def test_a_resolved_neck_of_odd_widths_reloads_as_it_is(self, tmp_path: Path) -> None:
        write(tmp_path, (
            "divisor: 4\nrows:\n  - out3: [P3, 1, Conv, [20]]\n  - out4: [P4, 1, Conv, [36]]\n"
            "  - out5: [P5, 1, Conv, [52]]\n"
        ), "neck.yaml")  # fmt: skip
        for width, channels in ((1.0, [20, 36, 52]), (0.6, [12, 20, 32])):
            data = {"anchors": 3, "backbone": "shufflenetv2-0.5", "head": HEAD,
                    "neck": {"file": str(tmp_path / "neck.yaml"), "width": width}}  # fmt: skip
            spec = parse_spec(data, str(tmp_path / "model.yaml"))
            outs = [layer.args["c_out"] for layer in spec.layers if layer.section == "neck"]
            assert outs == channels
            assert same_rows(parse_spec(spec.to_yaml_dict(), "again"), spec)

    def test_notes_survive_the_resolved_file(self) -> None:
        backbone = {"file": "ghostnet.yaml", "scale": "1.0", "width": 0.7}
        spec = parse_spec({"anchors": 3, "backbone": backbone, "neck": "fpn", "head": HEAD}, "x")
        assert spec.notes == ("backbone ghostnet-1.0 at width 0.7, not published",)
        again = parse_spec(spec.to_yaml_dict(), "again")
        assert again.notes == spec.notes
        assert same_rows(again, spec)
        published = {**backbone, "width": 1.3}
        data = {"anchors": 3, "backbone": published, "neck": "fpn", "head": HEAD}
        assert parse_spec(data, "x").notes == ()

    def test_an_extending_section_has_the_sizes_of_its_base(self, tmp_path: Path) -> None:
        write(tmp_path, "extends: shufflenetv2.yaml\nswap: {MaxPool: MaxPool}\n", "mine.yaml")
        name = str(tmp_path / "mine-0.5")
        mine = load_spec("yolov5n", backbone=name, neck="pan")
        assert same_rows(mine, load_spec("yolov5n", backbone="shufflenetv2-0.5", neck="pan"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("scales: {}\nrows: [[-1, 1, Conv, [8]]]", "scales must map names"),
            ("scales: {a: {c: 8}}\nrows: [[-1, 1, Conv, [$d]]]", r"\$d is not a key of the scale"),
            ("rows: [[-1, 1, Conv, [P7]]]", "neither a number nor the name of an earlier row"),
            ("rows: [[[], 1, Conv, [8]]]", "reads no row: 'from' is empty"),
            ("norm: {eps: 0, momentum: 0.1}\nrows: [[-1, 1, Conv, [8]]]", "norm.eps must be"),
            ("extends: csp.yaml\ndivisor: 4", "unknown key 'divisor'"),
            ("rows: [[-1, 1, Conv, [8]]]\nswap: {Conv: DWConv}", "unknown key 'swap'"),
        ],
    )  # fmt: skip
    def test_mistakes_in_a_section_file(self, tmp_path: Path, text: str, message: str) -> None:
        name = write(tmp_path, text, "part.yaml")
        if "{a:" in text:
            name = str(tmp_path / "part-a")
        with pytest.raises(UserError, match=message):
            build_detector(load_spec("yolov5n", backbone=name, neck="pan"), classes=2)

    @pytest.mark.parametrize("mean", [[0.5], [0.5, float("nan"), 0], "grey"])
    def test_impossible_normalisations(self, mean: object) -> None:
        data = {"anchors": 3, "backbone": "csp-n", "neck": "pan", "head": HEAD,
                "normalisation": {"mean": mean, "std": [1, 1, 1]}}  # fmt: skip
        with pytest.raises(UserError, match="three means and three stds"):
            parse_spec(data, "x")
