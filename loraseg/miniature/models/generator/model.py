"""The miniature text-to-image model: small models of diffusers' and transformers' classes.

The saved model is a regular Stable Diffusion folder. It differs from Stable Diffusion as follows:

- The latents have half the side of the image, since a person is four pixels wide.
- Only the coarsest and the middle block have self-attention (``only_cross_attention``), for speed
  on a CPU; the first attention of the other blocks is cross-attention too.
- It predicts v, which is stable with few sampling steps.
- Sampling starts at the last noise level ("trailing"), which determines the brightness of a domain.
- The text encoder is a ``CLIPTextModel`` without layers, see :func:`build_text_encoder`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraseg.compat import prepare_torchvision
from loraseg.miniature.models.generator.text import CONTEXT_LENGTH, build_tokenizer, pruned_bpe
from loraseg.miniature.world.canvas import SIZE
from loraseg.seeding import torch_generator
from loraseg.storage.safetensors_io import encode_safetensors

__all__ = ["NOISE_SCHEDULE", "build_codec", "build_text_encoder", "build_unet", "write_pipeline"]

_TEXT_WIDTH = 96
_LATENT_CHANNELS = 4
NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}


def build_codec(scaling_factor: float = 1.0) -> Any:
    """Return a new ``AutoencoderKL`` that halves the side."""
    return _diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def build_text_encoder() -> Any:
    """Return the ``CLIPTextModel`` over the pruned vocabulary: a table of fixed random vectors.

    Without layers and positions, a word has the same vector in every prompt, nearly orthogonal to
    all others, and padding is independent of the prompt. In a trained tower of two layers the class
    words of a prompt differed by 2 % only, which left the masks, which select words, almost without
    effect.
    """
    prepare_torchvision()
    from transformers import CLIPTextConfig, CLIPTextModel

    ids, _ = pruned_bpe()
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=0,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=len(ids) - 2,
            eos_token_id=len(ids) - 1,
            pad_token_id=len(ids) - 1,
        )
    )
    words = torch.randn(len(ids), _TEXT_WIDTH, generator=torch_generator(0, "generator-words"))
    state = {name: torch.zeros_like(tensor) for name, tensor in encoder.state_dict().items()}
    for name in state:
        if name.endswith("token_embedding.weight"):
            state[name] = words
        elif name.endswith("final_layer_norm.weight"):
            state[name] = torch.ones_like(state[name])
    encoder.load_state_dict(state)
    return encoder.requires_grad_(False).eval()


def build_unet() -> Any:
    """Return a new ``UNet2DConditionModel`` of 4.3 M parameters."""
    return _diffusers().UNet2DConditionModel(
        sample_size=SIZE // 2,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
        only_cross_attention=(True, True, False),
    )


def write_pipeline(
    folder: Path, *, unet: nn.Module, codec: nn.Module, text_encoder: nn.Module
) -> None:
    """Write a ``StableDiffusionPipeline`` folder with float16 weights.

    Equal models give equal bytes. In addition to the files of ``save_pretrained`` there are
    ``vocab.json`` and ``merges.txt``, which older releases of transformers read.
    """
    diffusers = _diffusers()
    pipeline = diffusers.StableDiffusionPipeline(
        vae=codec,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(
            **NOISE_SCHEDULE,
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    ids, merges = pruned_bpe()
    tokenizer = folder / "tokenizer"
    (tokenizer / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (tokenizer / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for path in sorted(folder.glob("*/*.safetensors")):
        _convert_to_float16(path)
    for path in sorted(folder.glob("*/config.json")):
        _drop_source_path(path)


def _diffusers() -> Any:
    prepare_torchvision()
    import diffusers

    return diffusers


def _drop_source_path(path: Path) -> None:
    """Remove the path from which the weights were loaded, so that equal models give equal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    text = json.dumps(config, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _convert_to_float16(path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        name: tensor.half() if tensor.dtype == torch.float32 else tensor
        for name, tensor in load_file(path).items()
    }
    path.write_bytes(encode_safetensors(tensors, {"format": "pt"}))
