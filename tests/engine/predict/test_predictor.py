"""The path from a picture to its detections, with a detector whose answer is known."""

from __future__ import annotations

import copy
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.checkpoint import model_payload, save_checkpoint
from engine.measure.bench import Speed
from engine.predict.predictor import Predictor
from engine.predict.result import Result
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
    return partial(Predictor, detector, **{"image_size": 64, "device": text})


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
        ({"image_size": 64}, (40, 100), (32, 64), [16.0, 3.0, 48.0, 29.0], [25.0, 0.0, 75.0, 40.0]),
        # 10 x 20 grows to 32 x 64 on a canvas of 64 x 64, or to 48 x 96 on one of 64 x 96
        (
            *({"image_size": (64, 64)}, (10, 20), (64, 64)),
            *([0.0, 16.0, 64.0, 48.0], [0.0, 0.0, 20.0, 10.0]),
        ),
        (
            *({"image_size": (64, 96)}, (10, 20), (64, 96)),
            *([0.0, 8.0, 48.0, 56.0], [0.0, 0.0, 10.0, 10.0]),
        ),
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
    with pytest.raises(ValueError, match="no images given"):
        predictor.batch([])


def test_best_class_of_an_object_thresholds_and_chosen_classes(made):
    boxes = [[0.0, 0.0, 30.0, 30.0], [1.0, 1.0, 31.0, 31.0], [40.0, 40.0, 60.0, 60.0]]
    scores = [[0.6, 0.5, 0.0], [0.3, 0.0, 0.0], [0.0, 0.0, 0.2]]
    predictor, low = made(), made(nms=NmsConfig(conf=0.9), conf=0.1, iou=0.99)
    assert low.nms == NmsConfig(conf=0.1, iou=0.99)
    for one in (predictor, low):
        answer(one, boxes, scores)
    assert predictor(noise(64, 64)).detections.labels.tolist() == [0]
    for classes, expected in ((None, [0, 1, 0, 2]), (["traffic light", 1], [1, 2])):
        assert low(noise(64, 64), classes=classes).detections.labels.tolist() == expected
    one = made(nms=low.nms, classes=["bus"])
    answer(one, boxes, scores)
    for classes, expected in ((None, [1]), ([], [0, 1, 0, 2]), ([2], [2])):
        assert one(noise(64, 64), classes=classes).detections.labels.tolist() == expected
    predictor = made(names=["car", "bus", "car"], classes=["car"])  # all classes of that name
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


def test_a_result_as_text_and_plain_values():
    labels = torch.tensor([0, 1, 0, 0, 1, 2])
    found = Detections(torch.zeros(6, 4), torch.zeros(6), labels)
    result = Result(noise(4, 5), found, NAMES, Speed(1, 2, 3), (32, 32))
    assert result.text == "3 persons, 2 buses, 1 traffic light"  # most certain first
    assert repr(result) == "<Result: 4x5, 3 persons, 2 buses, 1 traffic light>"
    found = Detections(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([0.5]), torch.tensor([2]))
    result = replace(result, detections=found, path="x/000042.jpg")
    assert repr(result) == "<Result: x/000042.jpg, 4x5, 1 traffic light>"
    assert len(result) == 1
    assert result.to_dict() == {
        **{"path": "x/000042.jpg", "frame": None, "height": 4, "width": 5},
        "speed": {"pre": 1, "inference": 2, "nms": 3},
        "detections": [
            {"class": 2, "name": "traffic light", "confidence": 0.5, "box": [1, 2, 4, 8]}
        ],
    }
    assert json.loads(result.to_json()) == result.to_dict()
    row = {"image_id": 42, "category_id": 2, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert result.to_coco() == [row]
    changed = {**row, "image_id": "a", "category_id": 10}
    assert result.to_coco("a", category_ids=[1, 3, 10]) == [changed]
    assert replace(result, path="x/cat.jpg").to_coco()[0]["image_id"] == "cat"
    with pytest.raises(ValueError, match="image_id"):
        replace(result, path=None).to_coco()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_form_of_an_image_gives_the_network_the_same_pixels(made, tmp_path):
    predictor = made()
    rgb = noise(48, 64)
    grey = rgb[..., 0]
    path = tmp_path / "a.png"
    path.write_bytes(png(rgb))
    alpha = np.dstack((rgb, noise(48, 64, 1)[..., 0]))
    forms = [path, str(path), png(rgb), bytearray(png(rgb)), Image.fromarray(rgb), alpha]
    forms += [Image.fromarray(alpha), rgb[:, ::-1][:, ::-1]]
    for form in (rgb, *forms):
        result = predictor(form)
        assert np.array_equal(result.image, rgb)
        assert result.path == (str(path) if isinstance(form, str | Path) else None)
    assert np.array_equal(predictor(rgb[..., ::-1], bgr=True).image, rgb)
    assert np.array_equal(predictor(alpha[..., [2, 1, 0, 3]], bgr=True).image, rgb)
    for form in (grey, grey[..., None], Image.fromarray(grey), png(grey)):
        assert np.array_equal(predictor(form).image, np.dstack([grey] * 3))
    turned = Image.fromarray(rgb)
    turned.getexif()[0x0112] = 6  # the camera lay on its side
    assert np.array_equal(predictor(turned).image, np.rot90(rgb, -1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((5, 5, 3)), "uint8 of .*, not float64"),
        (np.zeros((5, 5, 2), np.uint8), "uint8 of"),
        (np.zeros((1, 5, 5, 3), np.uint8), "uint8 of"),
        (b"", "no bytes"),
        ("", "file name is empty"),
        ([], "not list; several of them go to batch"),
        (None, "not NoneType"),
        (Image.new("F", (4, 4)), "mode F"),
    ],
)
def test_what_is_no_image_is_a_value_error(made, image, message):
    with pytest.raises(ValueError, match=f"image 1 of 1: .*{message}"):
        made()(image)


def test_threads_share_a_predictor(detector):
    predictor = Predictor(detector, image_size=64, device="cpu", nms=NmsConfig(conf=0.0, max_det=5))
    jobs = [(noise(64, 64, seed), [seed % 3]) for seed in range(12)]
    alone = [predictor(image, classes=classes) for image, classes in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda job: predictor(job[0], classes=job[1]), jobs)
    for expected, found, (_, classes) in zip(alone, together, jobs, strict=True):
        assert set(found.detections.labels.tolist()) == set(classes)
        assert torch.equal(found.detections.boxes, expected.detections.boxes)
        assert torch.equal(found.detections.scores, expected.detections.scores)


def test_without_a_size_the_checkpoint_s_own_counts(detector, tmp_path):
    for config, size in (({"imgsz": 96}, 96), ({"imgsz": "96"}, 640), ({}, 640), (None, 640)):
        payload = {**model_payload(detector), "config": config}
        save_checkpoint(tmp_path / "best.pt", payload)
        predictor = Predictor(tmp_path / "best.pt", device="cpu")
        assert predictor.image_size == size
        assert predictor.trained.image_size == (96 if size == 96 else None)


def test_draw_and_save_leave_the_image_alone(detector, tmp_path):
    predictor = Predictor(detector, image_size=64, device="cpu")
    answer(predictor, [[8.0, 8.0, 56.0, 56.0]], [[0.9, 0.0, 0.0]])
    image = noise(64, 64)
    before = image.copy()
    result = predictor(image)
    drawn = result.plot(thickness=2, hide_labels=True)
    assert tuple(drawn[30, 8]) == (230, 25, 75)
    result.save(tmp_path / "out.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), result.plot())
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "not a multiple of the model's largest stride 32; .* 96 and 128"),
        ({"image_size": 0}, "not a multiple"),
        ({"image_size": (64, 70)}, "image size 70 is not a multiple .* 64 and 96"),
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
