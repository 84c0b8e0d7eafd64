"""The path from a picture to its detections, with a detector whose answer is known."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from engine.checkpoint import model_payload, save_checkpoint
from engine.measure.bench import Speed
from engine.predict.predictor import Predictor, Result
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.errors import UserError
from utils.nms import NmsConfig
from utils.structures import Detections

NAMES = ("person", "bus", "traffic light")


def tiny(seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(load_spec("yolov5n"), classes=3, names=NAMES).eval()


@pytest.fixture(scope="module")
def detector() -> Detector:
    return tiny()


@pytest.fixture
def made(detector, device):
    """Predictors of the detector at 64 px on the device."""
    text = "0" if device.type == "cuda" else "cpu"
    return partial(Predictor, detector, image_size=64, device=text)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def answer(predictor: Predictor, boxes: list[list[float]], scores: list[list[float]]) -> list:
    """Make the head say this for every image; returns the list of shapes it is asked about."""
    shapes: list[tuple[int, ...]] = []

    def forward(images: torch.Tensor) -> list[torch.Tensor]:
        shapes.append(tuple(images.shape))
        return [images]

    def decode(raw: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        size = len(raw[0])
        return torch.tensor([boxes] * size), torch.tensor([scores] * size)

    predictor.model.forward = forward
    predictor.model.head.decode = decode
    return shapes


def test_boxes_come_back_in_pixels_of_the_image(made):
    predictor = made()
    # 40 x 100 shrinks to 26 x 64, 3 rows of grey above and below in 32 x 64
    shapes = answer(predictor, [[16.0, 3.0, 48.0, 29.0]], [[0.1, 0.8, 0.0]])
    result = predictor(noise(40, 100))
    assert shapes == [(1, 3, 32, 64)]
    assert result.network_size == (32, 64)
    assert torch.allclose(result.detections.boxes, torch.tensor([[25.0, 0.0, 75.0, 40.0]]))
    assert result.detections.labels.tolist() == [1]
    assert result.text == "1 bus"


def test_square_option_and_small_images_are_enlarged(made):
    predictor = made(square=True)
    shapes = answer(predictor, [[0.0, 16.0, 64.0, 48.0]], [[0.9, 0.0, 0.0]])
    result = predictor(noise(10, 20))
    assert shapes == [(1, 3, 64, 64)]
    assert torch.allclose(result.detections.boxes, torch.tensor([[0.0, 0.0, 20.0, 10.0]]))


def test_the_network_sees_rgb_over_255_on_grey(made):
    predictor = made(square=True)
    seen = []
    predictor.model.forward = lambda images: seen.append(images.cpu()) or [images]
    predictor.model.head.decode = lambda raw: (torch.zeros(1, 0, 4), torch.zeros(1, 0, 3))
    image = np.zeros((32, 64, 3), np.uint8)
    image[:] = (255, 51, 0)
    predictor(image)
    assert seen[0].dtype == torch.float32
    assert torch.allclose(seen[0][0, :, 32, 32], torch.tensor([1.0, 0.2, 0.0]))
    assert torch.allclose(seen[0][0, :, 0, 0], torch.full((3,), 114 / 255))


def test_batch_groups_by_shape_and_keeps_the_order(detector):
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=5))
    images = [noise(30, 64, 1), noise(64, 30, 2), noise(60, 128, 3), noise(15, 32, 4)]
    shapes = []
    hook = predictor.model.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    together = predictor.batch(images)
    hook.remove()
    assert shapes == [(3, 3, 32, 64), (1, 3, 64, 32)]
    for image, result in zip(images, together, strict=True):
        alone = predictor(image)
        assert result.image is image
        assert torch.allclose(result.detections.scores, alone.detections.scores, atol=1e-5)
    assert predictor.batch([]) == []


def test_one_name_per_object_and_thresholds(made):
    predictor = made()
    rows = [[0.0, 0, 30, 30], [1, 1, 31, 31], [40, 40, 60, 60]]
    answer(predictor, [[float(v) for v in row] for row in rows],
           [[0.6, 0.5, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.2]])  # fmt: skip
    assert predictor(noise(64, 64)).detections.labels.tolist() == [0]  # best class, NMS, conf
    low = made(nms=NmsConfig(conf=0.1, iou=0.99))
    answer(low, [[float(v) for v in row] for row in rows],
           [[0.6, 0.5, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.2]])  # fmt: skip
    assert low(noise(64, 64)).detections.labels.tolist() == [0, 1, 0, 2]
    low.only(["traffic light", 1])
    assert low(noise(64, 64)).detections.labels.tolist() == [1, 2]
    low.only([])
    assert len(low(noise(64, 64)).detections) == 4


def test_a_file_and_its_array_give_the_same(detector, tmp_path):
    path = tmp_path / "a.png"
    image = noise(48, 64)
    Image.fromarray(image).save(path)
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    first, second = predictor(path), predictor(image)
    assert len(first.detections) == 9
    assert torch.equal(first.detections.boxes, second.detections.boxes)
    result = next(iter(predictor.stream(path)))
    assert torch.equal(result.detections.boxes, second.detections.boxes)
    assert result.frame is not None
    assert result.frame.path == path
    assert len(list(predictor.stream([path, path]))) == 2


def test_the_given_model_is_left_alone_and_fusing_keeps_the_answer(detector):
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in predictor.model.modules())
    after = detector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    image = noise(64, 64)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        expected = detector.head.decode(detector(pixels))[1].amax()
    assert torch.allclose(predictor(image).detections.scores[0], expected, atol=1e-4)


def test_weights_are_converted_once_at_loading(detector, tmp_path):
    """Images are channels_last; other weights would be converted in every forward pass."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"format": "featherdet-1", **model_payload(detector)})
    for given in (detector, path):
        model = Predictor(given, image_size=64, device="cpu").model
        kernels = [p for p in model.parameters() if p.dim() == 4 and min(p.shape[1:3]) > 1]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_half_keeps_the_anchors_exact(detector):
    half = copy.deepcopy(detector).to_half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert torch.equal(half.head.anchors, detector.head.anchors)


def test_outputs_that_are_not_finite_name_the_image(detector, tmp_path):
    predictor = Predictor(detector, image_size=64, device="cpu")
    answer(predictor, [[0.0, 0.0, 9.0, 9.0]], [[0.1, float("nan"), 0.0]])
    with pytest.raises(UserError, match="image 1 of 1: the model's outputs are not finite"):
        predictor(noise(64, 64))
    path = tmp_path / "a.png"
    Image.fromarray(noise(64, 64)).save(path)
    with pytest.raises(UserError, match=r"a\.png: the model's outputs are not finite"):
        next(predictor.stream(path))


def test_own_checkpoint_by_path(detector, tmp_path):
    path = tmp_path / "best.pt"
    payload = {"spec": detector.spec.to_dict(), "names": list(NAMES)}
    save_checkpoint(path, {**payload, "model": detector.state_dict()})
    from_file = Predictor(path, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    direct = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    image = noise(50, 60)
    assert from_file.names == NAMES
    assert torch.equal(from_file(image).detections.boxes, direct(image).detections.boxes)


def test_augmented_views_agree_on_where_things_are(detector):
    """With a head that sees only brightness, mirrored and scaled views find the same place."""
    predictor = Predictor(detector, image_size=128, device="cpu", augment=True)
    image = np.zeros((128, 128, 3), np.uint8)
    image[32:64, 16:48] = 255

    def decode(raw: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        bright = raw[0][0].mean(0) > 0.7
        rows, columns = torch.nonzero(bright, as_tuple=True)
        low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
        boxes = torch.stack((*low, *high)).float()[None, None]
        return boxes, torch.tensor([[[0.9, 0.0, 0.0]]])

    predictor.model.forward = lambda images: [images]
    predictor.model.head.decode = decode
    predictor.nms = NmsConfig(iou=1.0)  # keep all three
    found = predictor(image).detections
    assert len(found) == 3
    assert torch.allclose(found.boxes, torch.tensor([16.0, 32.0, 48.0, 64.0]), atol=2)


def test_text_counts_with_plurals_in_order_of_certainty():
    labels = torch.tensor([0, 1, 0, 0, 1, 2])
    found = Detections(
        box_convert(torch.rand(6, 4), "cxcywh", "xyxy"), torch.linspace(0.9, 0.3, 6), labels
    )
    blank = np.zeros((4, 4, 3), np.uint8)
    result = Result(blank, found, NAMES, Speed(1, 2, 3), (32, 32))
    assert result.text == "3 persons, 2 buses, 1 traffic light"
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert Result(blank, none, NAMES, Speed(1, 2, 3), (32, 32)).text == "(no detections)"


def test_draw_and_save_leave_the_image_alone(detector, tmp_path):
    predictor = Predictor(detector, image_size=64, device="cpu")
    answer(predictor, [[8.0, 8.0, 56.0, 56.0]], [[0.9, 0.0, 0.0]])
    image = noise(64, 64)
    before = image.copy()
    result = predictor(image)
    drawn = result.draw(thickness=2, hide_labels=True)
    assert tuple(drawn[30, 8]) == (230, 25, 75)
    result.save(tmp_path / "out.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), result.draw())
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "not a multiple of the model's largest stride 32; .* 96 and 128"),
        ({"image_size": 0}, "not a multiple"),
        ({"half": True}, "needs a CUDA device"),
        ({"names": ["a", "b"]}, "2 class names given, the model has 3"),
        ({"nms": NmsConfig(classes=(3,))}, "class '3' is unknown .0 to 2"),
        ({"device": "gpu0"}, "--device gpu0"),
    ],
)
def test_impossible_settings_are_refused(detector, options, message):
    with pytest.raises(UserError, match=message):
        Predictor(detector, **{"device": "cpu", **options})


def test_unknown_class_names_the_nearest(detector):
    with pytest.raises(UserError, match="did you mean 'person'"):
        Predictor(detector, device="cpu").only(["persan"])


def test_a_name_stands_for_all_classes_of_that_name(detector):
    predictor = Predictor(detector, image_size=64, device="cpu", names=["car", "bus", "car"])
    predictor.only(["car"])
    assert predictor.nms.classes == (0, 2)


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))]
)
def test_other_arrays_are_refused(detector, image):
    with pytest.raises(ValueError, match="uint8 RGB"):
        Predictor(detector, device="cpu")(image)


def test_a_bad_file_is_named_with_its_cause(detector, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jpg: empty file"):
        Predictor(detector, device="cpu")(tmp_path / "a.jpg")


def test_names_can_be_replaced(made):
    predictor = made(names=["Mensch", "Bus", "Ampel"])
    answer(predictor, [[8.0, 8.0, 56.0, 56.0]], [[0.0, 0.0, 0.9]])
    assert predictor(noise(64, 64)).text == "1 Ampel"


def test_genuine_weights_find_the_known_objects(shared: Path):
    """000000555009 of COCO val2017 shows two screens, a laptop, a keyboard and a mouse."""
    weights = shared / "weights" / "yolov5n.pt"
    image = shared / "datasets" / "coco_tiny" / "val2017" / "000000555009.jpg"
    if not (weights.is_file() and image.is_file()):
        pytest.skip("the genuine weights or the picture are not on this machine")
    result = Predictor(weights, device="cpu")(image)
    assert result.network_size == (480, 640)
    found = {result.names[label] for label in result.detections.labels.tolist()}
    assert {"laptop", "keyboard", "mouse", "tv"} <= found
    row = [result.names[label] for label in result.detections.labels.tolist()].index("laptop")
    assert result.detections.scores[row] > 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_on_cuda_agrees_with_float_on_the_cpu(detector):
    image = noise(96, 128)
    config = NmsConfig(conf=0.0, max_det=5)
    cpu = Predictor(detector, image_size=128, device="cpu", nms=config)(image)
    gpu = Predictor(detector, image_size=128, device="0", nms=config)(image)
    half = Predictor(detector, image_size=128, device="0", nms=config, half=True)(image)
    assert torch.allclose(cpu.detections.scores, gpu.detections.scores, atol=1e-3)
    assert torch.allclose(cpu.detections.scores, half.detections.scores, atol=1e-2)
    assert half.detections.boxes.device.type == "cpu"
    assert half.detections.boxes.dtype == torch.float32
