"""Cost of detectors by row, and the command line of the profile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.builder import build_detector
from models.profile.__main__ import main
from models.profile.counting import ModelProfile, findings, profile, profile_spec
from models.yaml.parser import load_spec
from utils.errors import UserError


def profile_file(
    name: str, *, image_size: int = 640, classes: int = 80, **parts: str
) -> ModelProfile:
    return profile_spec(load_spec(name, **parts), image_size=image_size, classes=classes)


@pytest.fixture(scope="module")
def yolov5l() -> ModelProfile:
    return profile_file("yolov5l")


class TestDetector:
    def test_rows_of_yolov5l(self, yolov5l: ModelProfile) -> None:
        """Parameters and convolution GFLOPs per row: reference/yolo_params.json."""
        expected = [
            (7040, 1.4156), (73984, 3.7749), (156928, 7.9692), (295424, 3.7749),
            (1118208, 14.2606), (1180672, 3.7749), (6433792, 20.5521), (4720640, 3.7749),
            (9971712, 7.9692), (2624512, 2.0972), (525312, 0.4194), (0, 0.0), (0, 0.0),
            (2757632, 8.808), (131584, 0.4194), (0, 0.0), (0, 0.0), (690688, 8.808),
            (590336, 1.8874), (0, 0.0), (2495488, 7.9692), (2360320, 1.8874), (0, 0.0),
            (9971712, 7.9692), (457725, 1.4623),
        ]  # fmt: skip
        found = [(row.params, round(2 * row.cost.macs / 1e9, 4)) for row in yolov5l.rows]
        assert found == expected

    def test_totals_and_split(self, yolov5l: ModelProfile) -> None:
        assert yolov5l.params == 46_563_709
        assert round(yolov5l.flops / 1e9, 3) == 108.994
        parts = [yolov5l.part(section) for section in ("backbone", "neck", "head")]
        assert [part.params for part in parts] == [26_582_912, 19_523_072, 457_725]
        assert sum(part.macs for part in parts) == yolov5l.macs
        assert parts[2].macs == 255 * (6400 * 256 + 1600 * 512 + 400 * 1024)

    @pytest.mark.parametrize(
        "name",
        ["yolov5n", "yolov5n-csp", "yolov5n-ghost", "yolov5n-osa", "yolov5n-shuffle",
         "yolov5n-mixconv"],
    )  # fmt: skip
    def test_nothing_escapes(self, name: str) -> None:
        result = profile_file(name, image_size=320, classes=3)
        assert result.outside.macs == 0
        assert result.notes() == []
        cost = result.cost
        assert max(cost.access_bytes, cost.peak_bytes) < cost.bytes
        found = findings(cost)
        assert 0 < found.elementwise < 1 <= found.unequal_widths
        fused = profile(build_detector(load_spec(name), classes=3).fuse(), 320).cost
        assert fused.elements < cost.elements
        assert len(fused.kernels) < len(cost.kernels)

    def test_model_is_left_as_it_was(self) -> None:
        model = build_detector(load_spec("yolov5n-ghost"), classes=3).train()
        model.layers[2].eval()  # a frozen row stays frozen
        before = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [part.training for part in model.modules()]
        first = profile(model, 64)
        assert [part.training for part in model.modules()] == modes
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert not any(part._forward_hooks for part in model.modules())
        with torch.inference_mode():
            assert profile(model, 64) == first
        # the same values without memory for the weights
        assert profile_file("yolov5n-ghost", image_size=64, classes=3) == first

    def test_size_must_fit_the_strides(self) -> None:
        with pytest.raises(UserError, match=r"650 .* stride 32; try 640 or 672"):
            profile_file("yolov5n", image_size=650, classes=80)

    def test_unused_rows_are_named(self, tmp_path: Path) -> None:
        file = tmp_path / "dangling.yaml"
        file.write_text(
            "anchors: [[10, 13, 16, 30, 33, 23]]\n"
            "backbone:\n"
            "  - [-1, 1, Conv, [8, 3, 2]]\n"
            "  - forgotten: [-1, 1, Conv, [8, 3, 2]]\n"
            "  - [0, 1, Conv, [8, 3, 2]]\n"
            "head:\n"
            "  - [[-1], 1, Detect, [nc, anchors]]\n"
        )
        result = profile_file(str(file), image_size=64, classes=2)
        assert result.notes() == ["row 1 (forgotten) is used by no other row"]


class TestCommandLine:
    def test_table_and_summary(self, capsys) -> None:
        main(["yolov5n"])
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[0].split() == [
            "row", "name", "from", "n", "params", "MMACs", "Mops", "stride", "channels", "H", "x",
            "W", "block", "arguments",
        ]  # fmt: skip
        assert len(lines) == 1 + 25 + 1
        # 6400 cells; weights 2 * 64 * 32 + 64 * 64 + 2 * 10 * 32 * 32; 256 channels with BN and SiLU,
        # 2 * 32 additions
        assert lines[5].split() == [
            "4", "P3", "-1", "2", "29,184", "183.50", "5.32", "8", "64", "80x80", "C3", "c_out=64",
        ]  # fmt: skip
        assert lines[25].split()[1] == "17,20,-1"  # Detect has no name
        assert lines[-1].startswith("yolov5n: 25 rows, 1,872,157 parameters; at 640 px ")
        assert "2.234 GMACs = 4.468 GFLOPs" in lines[-1]
        assert err == ""

    def test_json_is_the_list_and_nothing_else(self, capsys) -> None:
        main(["cfg/yolov5n.yaml", "yolov5n-ghost", "--json", "--img", "320", "--classes", "3"])
        out, err = capsys.readouterr()
        first, second = json.loads(out)
        assert [first["model"], second["model"]] == ["cfg/yolov5n.yaml", "yolov5n-ghost"]
        for item in (first, second):
            parts = {"backbone", "neck", "head"}
            assert set(item) == {"model", "image_size", "notes", "params", "macs", "flops", *parts}
            assert item["flops"] == 2 * item["macs"]
            for key in ("params", "macs"):
                assert item[key] == sum(item[part][key] for part in ("backbone", "neck", "head"))
        assert first["head"] == {"params": 24 * (64 + 128 + 256 + 3),
                                 "macs": 24 * (1600 * 64 + 400 * 128 + 100 * 256)}  # fmt: skip
        assert err == ""

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["yolov5n", "--jsn"], "unknown argument '--jsn'; did you mean '--json'"),
            (["yolov5n", "--classes", "0"], "--classes must be at least 1, got 0"),
            (["yolov5n", "--img", "half"], "invalid int value: 'half'"),
            (["yolov5n", "--img", "0"], "--img must be at least 1, got 0"),
            (["yolov5n", "no-such-model"], "no-such-model"),
            (["yolov5n", "--classes", "100000000"], "--classes must be at most 10000"),
            (["yolov5n", "--plot", "none/a.png"], "none/a.png: cannot be written"),
            (["yolov5n", "--plot", "a.xyz"], "cannot be written: .*xyz.* not supported"),
            ([], "FILE is missing"),
            (["yolov5n", "--backbone", "ghostnet-1.1"], "'1.1' is not one of them"),
            (["yolov5n", "--backbone", "ghosnet-1.0"], "did you mean 'ghostnet-1.0'"),
            (["yolov5n", "--neck", "pan-gost"], "did you mean 'pan-ghost'"),
            (["yolov5n6", "--backbone", "ghostnet-1.0"], r"reads the end of its backbone \(P6\), the new one ends in P5.*pan-p6"),
            (["--classify", "ghostnet-1.0", "--neck", "pan"], "takes only backbones"),
            (["yolov5n", "--json", "--yaml"], "give either --json or --yaml"),
        ],
    )  # fmt: skip
    def test_mistakes_are_user_errors(self, argv: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            main(argv)

    def test_matrix_has_a_line_for_each_pair(self, capsys, tmp_path: Path) -> None:
        plot = tmp_path / "shares.png"
        main(["yolov5n", "--backbone", "ghostnet-0.5", "csp-n", "--neck", "pan", "fpn",
              "--plot", str(plot)])  # fmt: skip
        lines = capsys.readouterr().out.splitlines()[2:]
        names = [line.split("  ")[0] for line in lines]
        assert names == [
            f"yolov5n + {backbone} + {neck}"
            for backbone in ("ghostnet-0.5", "csp-n")
            for neck in ("pan", "fpn")
        ]
        whole = profile_file("yolov5n")
        cells = lines[2].split()[5:]
        assert cells[0] == f"{whole.params:,}"
        assert cells[4] == f"{whole.flops / 1e9:.3f}"
        assert plot.read_bytes()[:4] == b"\x89PNG"

    def test_heads_side_by_side(self, capsys) -> None:
        main(["yolov5n", "--head", "anchor", "free", "--classes", "3"])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
        assert [line[2] for line in lines] == ["anchor", "free"]
        assert lines[0][4:6] == lines[1][4:6]  # the same backbone and neck
        assert float(lines[1][-4]) == pytest.approx(4.476, abs=1e-3)

    def test_yaml_is_a_model_file_of_the_same_cost(self, capsys, tmp_path: Path) -> None:
        main(["yolov5n", "--backbone", "shufflenetv2-0.5", "--neck", "pan-p6", "--yaml"])
        file = tmp_path / "composed.yaml"
        file.write_text(capsys.readouterr().out)
        again = profile_file(str(file))
        ours = profile_file("yolov5n", backbone="shufflenetv2-0.5", neck="pan-p6")
        assert (again.params, again.macs) == (ours.params, ours.macs)

    def test_fit_says_what_it_did(self, capsys) -> None:
        main(["yolov5l", "--backbone", "csp-n", "--neck", "pan", "--fit", "gflops=4.5", "--json"])
        out, err = capsys.readouterr()
        (item,) = json.loads(out)
        assert item["params"] == 1_872_157
        assert "gflops=4.46812 (-0.7%) with backbone width 0.25, neck width 1, neck depth" in err

    def test_classifier(self, capsys) -> None:
        main(["--classify", "ghostnet-1.0", "shufflenetv2-1.0-tv", "--img", "224", "--json"])
        ghost, shuffle = json.loads(capsys.readouterr().out)
        assert (ghost["params"], shuffle["params"]) == (5_182_508, 2_278_604)
        assert round(ghost["macs"] / 1e6, 2) == 141.15
        assert ghost["neck"] == {"params": 0, "macs": 0}
