"""Pretrained weights of a segmenter, or of its backbone, from a file that the user has."""

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
# Norms behind the backbone's stages, which no file of a backbone alone has.
_STAGE_NORMS = "hidden_states_norms."


def load_pretrained(network: ClosedSetNetwork, path: str | Path) -> None:
    """Put weights from a file into a network: those of all of it, or those of its backbone.

    A head for another number of classes is left as it is.

    Args:
        network: Changed in place.
        path: A safetensors file, or a folder with ``model.safetensors``. ResNets have the names of
            torchvision and timm, Swin transformers and Mask2Former those of transformers; whole
            DeepLabV3+ those of segmentation_models_pytorch.

    Raises:
        ConfigError: There is no such file, or the network has no backbone.
        IntegrityError: It cannot be read as safetensors, lacks a tensor of the backbone or has one
            of another shape.
    """
    prefix = network.backbone_prefix()
    if not prefix:
        raise ConfigError(f"weights {str(path)!r}: {network.config.name} has no backbone")
    state = _read(Path(path).expanduser())
    named = (
        _to_mask2former_names(network.body, state)
        if isinstance(network.body, Mask2Former)
        else state
    )
    if not any(name.startswith(prefix) for name in named):
        named = {prefix + name: value for name, value in named.items()}
    own = network.body.state_dict()
    fitting = {name: v for name, v in named.items() if name in own and own[name].shape == v.shape}
    missing = [
        name
        for name, _ in network.body.named_parameters()
        if name.startswith(prefix) and name not in fitting and _STAGE_NORMS not in name
    ]
    if missing:
        raise IntegrityError(
            f"{path}: lacks {missing[0]} of shape {tuple(own[missing[0]].shape)} and "
            f"{len(missing) - 1} more of the backbone of {network.config.name}"
        )
    network.body.load_state_dict(fitting, strict=False)
    logger.info("%s: %d of %d tensors used", path, len(fitting), len(own))


def _read(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        # Copies of their own: products round otherwise where a weight lies unaligned.
        return {k: v.clone() for k, v in safetensors.torch.load_file(file).items()}
    except OSError as error:
        raise ConfigError(f"weights: cannot read {file}: {error.strerror}") from error
    except SafetensorError as error:
        raise IntegrityError(f"{file}: cannot be read as safetensors: {error}") from error


def _to_mask2former_names(body: Mask2Former, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that the installed transformers gives them in memory.

    Those differ from the names in files, and from release to release; transformers knows both.
    """
    from transformers import SwinBackbone
    from transformers.utils import logging as chatter

    whole = any(name.startswith(_PIXEL_MODULE_PREFIX) for name in state)
    kind: Any = type(body.network) if whole else SwinBackbone
    own: Any = body.network if whole else body.network.model.pixel_level_module.encoder
    level, bar = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        made, report = kind.from_pretrained(
            None,
            config=own.config,
            state_dict=dict(state),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        chatter.set_verbosity(level)
        if bar:
            chatter.enable_progress_bar()
    unset = {name for name in report["missing_keys"]} | {n for n, *_ in report["mismatched_keys"]}
    start = "network." if whole else "network.model.pixel_level_module.encoder."
    return {start + name: v for name, v in made.state_dict().items() if name not in unset}
