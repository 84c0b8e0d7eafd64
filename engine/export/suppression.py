"""Non-maximum suppression as ONNX operators, behind the boxes and scores of a network."""

from __future__ import annotations

from typing import Any

from engine.export.config import MOST_DETECTIONS
from utils.nms import NmsConfig

# The best boxes of an image enter: to sort them is cheap, a map of all boxes and classes is not.
# Each box has its best class only, so that (image, box) names a candidate: its score goes to that
# place of a zero map, from which the best are taken.
TAIL = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
suppression (float[B, N, 4] boxes, float[B, N, C] scores) => (float[B, D, 6] detections)
<float conf = {{{conf}}}, float iou = {{{iou}}}, int64[1] most = {{{most}}}, float nothing = {{0}},
 int64[1] last = {{2}}, int64[2] where = {{0, 2}}, int64 zero = {{0}}, int64 one = {{1}},
 int64[1] one_1d = {{1}}, int64[1] enter = {{{enter}}}>
{{
  box_best = ReduceMax <keepdims = 0> (scores, last)
  box_count = Shape <start = 1, end = 2> (boxes)
  entering = Min (box_count, enter)
  best, row = TopK <axis = 1> (box_best, entering)
  row_3d = Unsqueeze (row, last)
  near = GatherND <batch_dims = 1> (boxes, row_3d)
  near_scores = GatherND <batch_dims = 1> (scores, row_3d)
  labels_int = ArgMax <axis = 2> (near_scores)
  labels = Cast <to = 1> (labels_int)
  best_3d = Unsqueeze (best, last)
  table = Concat <axis = 2> (near, best_3d, labels)
  class_count = Shape <start = 2, end = 3> (scores)
  class_scalar = Squeeze (class_count)
  classes_int = Range (zero, class_scalar, one)
  classes_1d = Cast <to = 1> (classes_int)
  classes = Unsqueeze (classes_1d, one_1d)
  labels_flat = Squeeze (labels, last)
  labels_row = Unsqueeze (labels_flat, one_1d)
  is_class = Equal (labels_row, classes)
  best_row = Unsqueeze (best, one_1d)
  by_class = Where (is_class, best_row, nothing)
  kept = NonMaxSuppression (near, by_class, most, iou, conf)
  cell = Gather <axis = 1> (kept, where)
  kept_scores = GatherND (best, cell)
  shape = Shape (best)
  empty = ConstantOfShape (shape)
  left = ScatterND (empty, cell, kept_scores)
  rows = Min (entering, most)
  score, place = TopK <axis = 1> (left, rows)
  score_3d = Unsqueeze (score, last)
  place_3d = Unsqueeze (place, last)
  found = GatherND <batch_dims = 1> (table, place_3d)
  is_kept = Greater (score_3d, nothing)
  detections = Where (is_kept, found, nothing)
}}
"""


def suppressed(model: Any, config: NmsConfig) -> Any:
    """An ONNX model of outputs boxes and scores -> one of output detections (B, max_det, 6).

    Rows x1 y1 x2 y2 score class, best first, as `utils.nms.nms` keeps them with `multi_label` off;
    rows of zeros fill up.  There are fewer rows where the network has fewer boxes.
    """
    import onnx

    opset = next(item.version for item in model.opset_import if not item.domain)
    values = {
        "conf": config.conf,
        "iou": config.iou,
        "most": config.max_det,
        "enter": MOST_DETECTIONS,
    }
    tail = onnx.parser.parse_model(TAIL.format(ir=model.ir_version, opset=opset, **values))
    tail.opset_import.extend(item for item in model.opset_import if item.domain)
    tail = onnx.compose.add_prefix(tail, "nms_", rename_inputs=False, rename_outputs=False)
    names = [("boxes", "boxes"), ("scores", "scores")]
    return onnx.compose.merge_models(model, tail, io_map=names)
