"""A model in; an ONNX file out, from normalised images of any batch size to logits.

A base without a head gives features instead.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vitft.files import write_bytes
from vitft.model.vit import VisionTransformer

OPSET = 18


class Features(nn.Module):
    """A model without its head, from images to the head's input (B, D) or (B, 2 D)."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D) or (B, 2 D) of normalised images (B, C, height, width)."""
        return self.model.features(images)


def exported(model: VisionTransformer) -> tuple[nn.Module, str]:
    """Return the module to export, and the name of its output, "logits" or "features"."""
    return (model, "logits") if model.has_head else (Features(model), "features")


def write_onnx(model: VisionTransformer, path: Path) -> None:
    """Write the model to `path` as ONNX, the whole file or nothing.

    Raises:
        ValueError: the packages onnx and onnxscript are missing, or torch can't export the model.
        OSError: the file can't be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX needs onnx and onnxscript; install vitft[onnx]") from error
    computed, output = exported(model)
    size = model.image_size
    images = torch.zeros(2, model.config.n_channels, size, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about itself
            program = torch.onnx.export(
                computed,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"torch does not export this model: {error}".splitlines()[0]) from error
    assert program is not None
    write_bytes(path, program.model_proto.SerializeToString())


def check_onnx(model: VisionTransformer, path: Path, images: Tensor) -> float:
    """Return the largest absolute difference between ONNX Runtime's output and the model's.

    Args:
        model: that was exported.
        path: of the ONNX file.
        images: normalised (B, C, height, width); the first one is also tried alone.

    Raises:
        ValueError: the package onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("the export is checked by onnxruntime; install vitft[onnx]") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst, (computed, _) = 0.0, exported(model)
    for some in (images[:1], images):
        (found,) = session.run(None, {"images": some.numpy()})
        worst = max(worst, float((computed(some) - torch.from_numpy(found)).abs().max()))
    return worst
