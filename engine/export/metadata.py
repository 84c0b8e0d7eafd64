"""What an exported file states about its network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from utils.errors import UserError, cause_of
from utils.nms import NmsConfig

FORMAT = "featherdet-export-2"
KEY = "featherdet"  # under which a file keeps it


@dataclass(frozen=True)
class Metadata:
    """Images (B, 3, H, W) float32 in [0, 1] -> boxes (B, N, 4) xyxy pixels, scores (B, N, C).

    With `suppression` -> detections (B, max_det, 6), see `engine.export.suppression`.
    End to end -> detections (B, 300, 6), best first: box, score, class; score 0 where there are
    fewer.
    """

    names: tuple[str, ...]
    stride: int  # the largest; H and W are multiples of it
    size: tuple[int, int] | None  # (H, W); None: any
    batch: int | None  # B; None: any
    head: str
    data: str  # the data set that the network was trained on; '': not known
    precision: str = "float32"  # or float16, int8; images and outputs are float32
    suppression: NmsConfig | None = None  # in the graph
    end_to_end: bool = False
    format: str = FORMAT

    def to_text(self) -> str:
        """JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str | None, file: object) -> Metadata:
        """The inverse of `to_text`. UserError, naming `file`, for anything else."""
        try:
            values: Mapping[str, Any] = json.loads(text or "")
            found = _of(values) if values["format"] == FORMAT else None
        except Exception as error:
            raise UserError(
                f"{file}: not written by FeatherDet's export.py, or damaged: {cause_of(error)}"
            ) from error
        if found is None:
            raise UserError(f"{file}: written by another version of FeatherDet; export it again")
        return found


def _of(values: Mapping[str, Any]) -> Metadata:
    """The inverse of `asdict`; any exception where it is not one."""
    names, size, batch = tuple(map(str, values["names"])), values["size"], values["batch"]
    suppression = values["suppression"]
    found = Metadata(
        names=names,
        stride=int(values["stride"]),
        size=None if size is None else (int(size[0]), int(size[1])),
        batch=None if batch is None else int(batch),
        head=str(values["head"]),
        data=str(values["data"]),
        precision=str(values["precision"]),
        suppression=None if suppression is None else NmsConfig(**suppression),
        end_to_end=bool(values["end_to_end"]),
    )
    if not names or found.stride < 1:
        raise ValueError(f"{len(names)} classes, stride {found.stride}")
    return found
