"""What a sample looks like: a small picture, or a few words."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib.image
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samplewise.attribution import ScoreTask

from .failures import InputError, user_code

IMAGE_KEYS = ("image", "pixel_values", "img")
TEXT_KEYS = ("text", "sentence")
SMALLEST_SIDE = 5
LARGEST_SIDE = 128
TEXT_LENGTH = 280


@dataclass(frozen=True)
class Preview:
    """One of the two, or neither."""

    image: str = ""  # a PNG as a data URI
    text: str = ""


def preview(task: ScoreTask, index: int) -> Preview:
    """Preview of a sample: what the task's `preview` gives, or what its item seems to hold."""
    try:
        with user_code("no preview"):
            item = task.dataset[index]
            return _shown(task.preview(item) if task.preview else _first_look(item))
    except InputError as error:
        return Preview(text=str(error))  # a report without pictures is better than none


def _shown(content: object) -> Preview:
    if isinstance(content, str):
        return Preview(text=content if len(content) <= TEXT_LENGTH else content[: TEXT_LENGTH - 1] + "…")
    image = _as_image(content)
    return Preview() if image is None else Preview(image=_data_uri(image))


def _first_look(item: object) -> object:
    if isinstance(item, Mapping):
        return next((item[key] for key in (*IMAGE_KEYS, *TEXT_KEYS) if key in item), None)
    if isinstance(item, Sequence) and not isinstance(item, str) and item:
        return item[0]
    return item


def _as_image(content: object) -> Tensor | None:
    """The content as `(c, h, w)` with values from 0 to 1, where it has the shape of an image."""
    if isinstance(content, np.ndarray) and content.dtype.kind in "buif":
        content = torch.from_numpy(np.ascontiguousarray(content))
    if not isinstance(content, Tensor) or content.ndim not in (2, 3) or content.is_complex():
        return None
    channels_first = content[None] if content.ndim == 2 else content
    channels, *sides = channels_first.shape
    if channels not in (1, 3, 4) or min(sides) < SMALLEST_SIDE:
        return None
    return _scaled(channels_first[:3].detach().float().cpu())


def _scaled(image: Tensor) -> Tensor:
    # Data sets normalise in many ways, so each picture is stretched from its own darkest to its brightest value.
    low, high = image.amin(), image.amax()
    image = ((image - low) / (high - low).clamp(min=1e-12)).nan_to_num()
    shrink = LARGEST_SIDE / max(image.shape[1:])
    if shrink >= 1:
        return image
    return F.interpolate(image[None], size=[max(1, round(side * shrink)) for side in image.shape[1:]], mode="area")[0]


def _data_uri(image: Tensor) -> str:
    pixels = (image.expand(3, -1, -1).permute(1, 2, 0) * 255).round().byte().numpy()
    png = BytesIO()
    matplotlib.image.imsave(png, pixels, format="png")
    return "data:image/png;base64," + b64encode(png.getvalue()).decode()
