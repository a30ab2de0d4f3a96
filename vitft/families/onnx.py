"""A model in, an ONNX file with a free batch out; takes normalised images, gives logits."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from vitft.files import write_bytes
from vitft.model.vit import VisionTransformer

OPSET = 18


def write_onnx(model: VisionTransformer, path: Path) -> None:
    """Write `path`, whole or not at all.

    Raises:
        ValueError: the packages onnx and onnxscript are missing.
        OSError: the file can't be written.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("ONNX needs onnx and onnxscript; install vitft[onnx]") from error
    size = model.image_size
    images = torch.zeros(2, model.config.n_channels, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    write_bytes(path, program.model_proto.SerializeToString())


def check_onnx(model: VisionTransformer, path: Path, images: Tensor) -> float:
    """Return the largest difference of ONNX Runtime's logits, for one image and for all.

    Raises:
        ValueError: the package onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("the export is checked by onnxruntime; install vitft[onnx]") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for some in (images[:1], images):
        (logits,) = session.run(None, {"images": some.numpy()})
        worst = max(worst, float((model(some) - torch.from_numpy(logits)).abs().max()))
    return worst
