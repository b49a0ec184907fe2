"""Small random diffusers pipelines, and the public UNets on the meta device."""

import contextlib
import logging

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
# One token each; other words, such as "sidewalk", have several tokens.
WHOLE_WORDS = (
    *("road", "sky", "car", "tree", "building", "person", "grass", "water", "bus", "train"),
    *("wall", "fence", "light", "bird", "cat", "dog", "snow", "night", "rain", "fog", "heavy"),
    *("in", "a", "photo", "of", "the", "and"),
)
PIECES = ("side", "walk", "traf", "fic", "bi", "cy", "cle", "ve", "ta", "tion", "er", "ing")
TEXT_LENGTH = 77
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
# The files of a saved pipeline that loraseg reads.
PIPELINE_FILES = {
    "sd": {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
}
PIPELINE_FILES["sdxl"] = PIPELINE_FILES["sd"] | {
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
}
FULL_UNETS = {
    "sd1.4": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def tiny_sd(prediction="epsilon", *, seed=0):
    """Return an SD1-like pipeline: 32x32 images, latents 4x16x16, cross attention at 16 and 8."""
    with _seeded(seed):
        tokenizer = tiny_tokenizer()
        return _quiet(
            StableDiffusionPipeline,
            unet=_unet(cross_attention_dim=16),
            vae=_vae(0.18215),
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(_text_config(tokenizer, 16)).eval(),
            scheduler=PNDMScheduler(
                **SCHEDULE,
                skip_prk_steps=True,
                set_alpha_to_one=False,
                prediction_type=prediction,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(prediction="epsilon", *, seed=0):
    """Return an SDXL-like pipeline: text widths 16 and 24, pooled text of 12, six time ids."""
    with _seeded(seed):
        first, second = tiny_tokenizer(), tiny_tokenizer(pad="!")
        return _quiet(
            StableDiffusionXLPipeline,
            unet=_unet(
                cross_attention_dim=40,
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=12 + 6 * 4,
                transformer_layers_per_block=[1, 2],
                use_linear_projection=True,
            ),
            vae=_vae(0.13025),
            tokenizer=first,
            tokenizer_2=second,
            text_encoder=CLIPTextModel(_text_config(first, 16)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 24)).eval(),
            scheduler=EulerDiscreteScheduler(
                **SCHEDULE, timestep_spacing="leading", prediction_type=prediction
            ),
            add_watermarker=False,
        )


def full_unet(name):
    """Return the UNet of "sd1.4", "sd2.1" or "sdxl" on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**FULL_UNETS[name])


def tiny_tokenizer(*, pad=END, length=TEXT_LENGTH):
    """Return CLIP's byte-pair tokenizer with a small vocabulary that can encode any text."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        pad_token=pad,
        model_max_length=length,
    )


def _vocabulary():
    letters = sorted(
        {chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))} - {"\xad"}
    )
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in (*WHOLE_WORDS, *PIECES):
        ends = ("</w>",) if word in WHOLE_WORDS else ("", "</w>")
        for end in ends:
            symbols = [*word[:-1], word[-1] + end]
            while len(symbols) > 1:
                joined = symbols[0] + symbols[1]
                if joined not in vocabulary:
                    vocabulary.append(joined)
                    merges.append((symbols[0], symbols[1]))
                symbols[:2] = [joined]
    return [*vocabulary, START, END], merges


def _unet(**settings):
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    ).eval()


def _vae(scaling_factor):
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    ).eval()


def _text_config(tokenizer, width):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )


def _quiet(pipeline_class, **parts):
    # diffusers warns about the missing safety checker.
    logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        pipeline = pipeline_class(**parts)
    finally:
        logger.setLevel(before)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _seeded(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
