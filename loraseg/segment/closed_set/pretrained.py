"""Pretrained weights of a network or its backbone, from a local file."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.closed_set.mask_former import Mask2Former
from loraseg.segment.closed_set.networks import ClosedSetNetwork

__all__ = ["load_pretrained"]

logger = logging.getLogger(__name__)

_PIXEL_MODULE_PREFIX = "model.pixel_level_module."
# Norms after the stages of the backbone, which backbone-only files do not contain.
_STAGE_NORMS = "hidden_states_norms."


def load_pretrained(network: ClosedSetNetwork, path: str | Path) -> None:
    """Load the weights of a complete network or of its backbone from a file.

    Tensors of another shape, such as a head for another number of classes, are skipped outside
    the backbone.

    Args:
        network: The network; changed in place.
        path: A safetensors file, or a folder with ``model.safetensors``. Names are those of
            torchvision and timm for ResNets, of transformers for Swin and Mask2Former, and of
            segmentation_models_pytorch for complete DeepLabV3+ networks.

    Raises:
        ConfigError: The file does not exist, or the network has no backbone.
        IntegrityError: The file cannot be read as safetensors, or a tensor of the backbone is
            missing or has another shape.
    """
    prefix = network.backbone_prefix()
    if not prefix:
        raise ConfigError(f"weights {str(path)!r}: {network.config.name} has no backbone")
    state = _read(Path(path).expanduser())
    if isinstance(network.body, Mask2Former):
        state = _to_mask2former_names(network.body, state)
    if not any(name.startswith(prefix) for name in state):
        state = {prefix + name: value for name, value in state.items()}
    target = network.body.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name in target and target[name].shape == value.shape
    }
    missing = [
        name
        for name, _ in network.body.named_parameters()
        if name.startswith(prefix) and name not in fitting and _STAGE_NORMS not in name
    ]
    if missing:
        raise IntegrityError(
            f"{path}: lacks {missing[0]} of shape {tuple(target[missing[0]].shape)} and "
            f"{len(missing) - 1} more tensors of the backbone of {network.config.name}"
        )
    network.body.load_state_dict(fitting, strict=False)
    logger.info("%s: loaded %d of %d tensors", path, len(fitting), len(target))


def _read(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        # Copied: the rounding of products depends on the alignment of the weights.
        return {k: v.clone() for k, v in safetensors.torch.load_file(file).items()}
    except OSError as error:
        raise ConfigError(f"weights: cannot read {file}: {error.strerror}") from error
    except SafetensorError as error:
        raise IntegrityError(f"{file}: cannot be read as safetensors: {error}") from error


def _to_mask2former_names(body: Mask2Former, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the parameter names of the installed transformers.

    They differ from the names in files and between releases; transformers converts them on load.
    """
    from transformers import SwinBackbone
    from transformers.utils import logging as hf_logging

    is_complete = any(name.startswith(_PIXEL_MODULE_PREFIX) for name in state)
    encoder = body.network.model.pixel_level_module.encoder
    cls: Any = type(body.network) if is_complete else SwinBackbone
    config = body.network.config if is_complete else encoder.config
    level, progress_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        loaded, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        hf_logging.set_verbosity(level)
        if progress_bar:
            hf_logging.enable_progress_bar()
    unset = {name for name in report["missing_keys"]} | {n for n, *_ in report["mismatched_keys"]}
    prefix = "network." if is_complete else "network.model.pixel_level_module.encoder."
    return {prefix + name: v for name, v in loaded.state_dict().items() if name not in unset}
