"""The vision tower of Qwen3-VL: transformers' own module with the checkpoint's weights, frozen and without adapters.

Each image is computed alone, so that its features depend on its content only. M rows of an image, H hidden size, L
layers of the decoder that get features: F = 1 + L features of a row.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from cachetools import LRUCache
from torch import Tensor
from transformers.initialization import no_init_weights
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from knapper import limits
from knapper.engine.images.placed import PlacedImage
from knapper.engine.images.reader import ImageReader
from knapper.engine.models import weight_files
from knapper.engine.models.fields import read_json
from knapper.engine.models.tensor_header import BrokenModel
from knapper.wire.types import Image

FEATURES_BYTES_MAX: Final = 256 * limits.MIB  # of the images seen last: a prompt's samples come as several requests


class VisionTower:
    """The features of images. `features` is for the device's thread only."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BrokenModel for tensors that are missing, unexpected or of another shape."""
        self._reader = ImageReader(directory)
        self._dtype, self._device = dtype, device
        self._module = _loaded(directory, dtype, device)
        self._features: LRUCache[bytes, Tensor] = LRUCache(FEATURES_BYTES_MAX, getsizeof=lambda each: each.nbytes)

    @property
    def nbytes(self) -> int:
        """Of the weights, and the most of what is kept of images."""
        weights: int = sum(p.nbytes for p in self._module.parameters())
        return weights + FEATURES_BYTES_MAX

    def placed(self, images: Sequence[Image], where: str) -> tuple[PlacedImage, ...]:
        """Read on any thread. Raises InvalidField or TooLarge for the first that is wrong; `where` names the prompt."""
        return tuple(self._reader.placed(image, where) for image in images)

    def features(self, image: PlacedImage) -> Tensor:
        """(F, M, H): what stands for the embeddings, then what is added after each of the first L layers."""
        if (kept := self._features.get(image.digest)) is not None:
            return kept
        patches_PD, grid = self._reader.patches(image)
        # Sampling infers and training differentiates, with the same features.
        with torch.inference_mode(mode=False), torch.no_grad():
            seen = self._module(patches_PD.to(self._device, self._dtype), grid_thw=grid.to(self._device))
            features_FMH = torch.stack([seen.pooler_output, *seen.deepstack_features])
        if features_FMH.nbytes <= FEATURES_BYTES_MAX:
            self._features[image.digest] = features_FMH
        return features_FMH


def _loaded(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    raw = read_json(directory / "config.json") or {}
    model: Any = Qwen3VLVisionModel
    try:
        config = Qwen3VLVisionConfig(**{k: v for k, v in raw["vision_config"].items() if k != "model_type"})
        with no_init_weights():  # not on the meta device: there its buffers, which are in no file, would have no values
            module = model._from_config(config, attn_implementation="sdpa", dtype=dtype)
    except Exception as error:
        raise BrokenModel(f"{directory}: transformers makes no vision tower of its config.json: {error!r}") from error
    module.eval().requires_grad_(requires_grad=False)
    headers = weight_files.vision_entries(directory)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if {name: header.shape for name, header in headers.items()} != expected:
        wrong = sorted(
            {*headers} ^ {*expected} or {name for name, shape in expected.items() if headers[name].shape != shape}
        )
        raise BrokenModel(
            f"{directory}: {len(wrong)} tensors of its vision tower are not as config.json promises them: "
            + ", ".join(wrong[:5])
        )
    tensors = {}
    for name, header in headers.items():
        with weight_files.opened(header.path, "pt") as file:
            tensors[name] = file.get_tensor(header.stored).to(device, dtype)
    module.load_state_dict(tensors, assign=True)
    return module.to(device)
