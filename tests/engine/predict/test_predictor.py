"""The path from a picture to its detections, with a detector whose answer is known."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import model_payload, save_checkpoint
from engine.measure.bench import Speed
from engine.predict.predictor import Predictor, Result
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.boxes import Detections
from utils.errors import UserError
from utils.nms import NmsConfig

NAMES = ("person", "bus", "traffic light")


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return build_detector(load_spec("yolov5n"), classes=3, names=NAMES).eval()


@pytest.fixture
def made(detector, device):
    """Predictors of the detector at 64 px on the device."""
    text = "0" if device.type == "cuda" else "cpu"
    return partial(Predictor, detector, image_size=64, device=text)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def answer(predictor: Predictor, boxes: list, scores: list) -> list[torch.Tensor]:
    """Make the head answer this for every image; returns the batches it is asked about."""
    seen: list[torch.Tensor] = []

    def decode(raw: list[torch.Tensor], conf: float) -> tuple[torch.Tensor, ...]:
        images, device = len(raw[0]), raw[0].device
        image = torch.arange(images).repeat_interleave(len(boxes))
        answer = (image, torch.tensor(boxes * images), torch.tensor(scores * images))
        return tuple(item.to(device) for item in answer)

    predictor.model.forward = lambda images: seen.append(images.cpu()) or [images]
    predictor.model.head.decode = decode
    return seen


@pytest.mark.parametrize(
    ("options", "size", "shape", "box", "expected"),
    [  # 40 x 100 shrinks to 26 x 64, 3 rows of grey above and below in 32 x 64
        ({}, (40, 100), (32, 64), [16.0, 3.0, 48.0, 29.0], [25.0, 0.0, 75.0, 40.0]),
        ({"square": True}, (10, 20), (64, 64), [0.0, 16.0, 64.0, 48.0], [0.0, 0.0, 20.0, 10.0]),
    ],
)
def test_the_network_sees_rgb_on_grey_and_boxes_come_back_in_pixels_of_the_image(
    made, options, size, shape, box, expected
):
    predictor = made(**options)
    seen = answer(predictor, [box], [[0.1, 0.8, 0.0]])
    result = predictor(np.full((*size, 3), (255, 51, 0), np.uint8))
    (batch,) = seen
    assert (batch.shape, batch.dtype) == ((1, 3, *shape), torch.float32)
    assert torch.allclose(batch[0, :, shape[0] // 2, 32], torch.tensor([1.0, 0.2, 0.0]))
    assert torch.allclose(batch[0, :, 0, 0], torch.full((3,), 114 / 255))
    assert result.network_size == shape
    assert torch.allclose(result.detections.boxes, torch.tensor([expected]))
    assert (result.detections.labels.tolist(), result.text) == ([1], "1 bus")


def test_images_of_one_shape_go_together_and_come_back_in_order(detector):
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=5))
    images = [noise(30, 64, 1), noise(64, 30, 2), noise(60, 128, 3), noise(15, 32, 4)]
    shapes = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    together = predictor.batch(images)
    assert shapes == [(3, 3, 32, 64), (1, 3, 64, 32)]
    for image, result in zip(images, together, strict=True):
        assert result.image is image
        alone = predictor(image)
        assert torch.allclose(result.detections.scores, alone.detections.scores, atol=1e-5)
    assert predictor.batch([]) == []


def test_best_class_of_an_object_thresholds_and_chosen_classes(made):
    boxes = [[0.0, 0.0, 30.0, 30.0], [1.0, 1.0, 31.0, 31.0], [40.0, 40.0, 60.0, 60.0]]
    scores = [[0.6, 0.5, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.2]]
    predictor, low = made(), made(nms=NmsConfig(conf=0.1, iou=0.99))
    for one in (predictor, low):
        answer(one, boxes, scores)
    assert predictor(noise(64, 64)).detections.labels.tolist() == [0]
    for classes, expected in (([], [0, 1, 0, 2]), (["traffic light", 1], [1, 2])):
        low.only(classes)
        assert low(noise(64, 64)).detections.labels.tolist() == expected
    predictor = made(names=["car", "bus", "car"])
    predictor.only(["car"])  # all classes of that name
    assert predictor.nms.classes == (0, 2)


def test_files_arrays_and_streams_give_the_same(detector, tmp_path):
    path, bad = tmp_path / "a.png", tmp_path / "a.jpg"
    image = noise(48, 64)
    Image.fromarray(image).save(path)
    bad.write_bytes(b"")
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    first, second = predictor(image), next(iter(predictor.stream([path, path])))
    assert len(first.detections) == 9
    for result in (predictor(path), second):
        assert torch.equal(result.detections.boxes, first.detections.boxes)
    assert second.frame is not None
    assert second.frame.path == path
    with pytest.raises(UserError, match=r"a\.jpg: empty file"):
        predictor(bad)
    for array in (image[..., 0], np.zeros((9, 9, 4), np.uint8), image.astype(float)):
        with pytest.raises(ValueError, match="uint8 RGB"):
            predictor(array)
    answer(predictor, [[0.0, 0.0, 9.0, 9.0]], [[0.1, float("nan"), 0.0]])
    with pytest.raises(UserError, match="image 1 of 1: the model's outputs are not finite"):
        predictor(image)
    with pytest.raises(UserError, match=r"a\.png: the model's outputs are not finite"):
        next(predictor.stream(path))


def test_the_given_model_is_left_alone_and_fusing_keeps_the_answer(detector):
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=9))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in predictor.model.modules())
    torch.testing.assert_close(dict(detector.state_dict()), before, rtol=0, atol=0)
    image = noise(64, 64)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        expected = detector.head.decode(detector(pixels), 0.0)[2].amax()
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


def test_text_of_a_result():
    labels = torch.tensor([0, 1, 0, 0, 1, 2])
    found = Detections(torch.zeros(6, 4), torch.zeros(6), labels)
    result = Result(noise(4, 4), found, NAMES, Speed(1, 2, 3), (32, 32))
    assert result.text == "3 persons, 2 buses, 1 traffic light"  # most certain first


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
