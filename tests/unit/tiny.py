"""A small random CAT-Seg, a small random CLIP, and adapters and datasets for them."""

import copy
import json
from dataclasses import replace

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from loraseg import seeding
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.peft_io import load_adapter, to_peft_files
from loraseg.adapters.targets.catseg import target_modules
from loraseg.backbones.tokenizer import WordTokenizer
from loraseg.compat import prepare_torchvision
from loraseg.library import AdapterCard, BaseModelInfo, Centroid, Library
from loraseg.segment.open_vocabulary.base import SegmentationBase
from loraseg.segment.open_vocabulary.catseg.checkpoint import save_catseg
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.storage import open_store
from tests.tiny_sizes import tiny_config

CLASSES = ("road", "car", "sky")
SIDE = 24
WORDS = ("a", "photo", "of", "in", "the", "scene", *CLASSES)


def tiny_base(clip_attention_lora="active"):
    """Return a random model whose predictions differ between pixels and between adapters."""
    tokenizer = WordTokenizer(WORDS, context_length=12, buckets=4)
    config = tiny_config(tokenizer.vocab_size, clip_attention_lora=clip_attention_lora)
    model = CATSeg(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator) * 0.25
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + spread if is_gain else spread)
    return SegmentationBase(
        name="tiny",
        digest="ab" * 32,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        prompt="A photo of a {} in the scene",
        mean=(120.0, 120.0, 120.0),
        std=(60.0, 60.0, 60.0),
    )


def write_models(folder):
    """Write a tiny base and a tiny CLIP to files; return the paths."""
    base = tiny_base()
    names = {"vocabulary": json.dumps(WORDS), "prompt": base.prompt}
    statistics = {"mean": json.dumps([120 / 255] * 3), "std": json.dumps([60 / 255] * 3)}
    save_catseg(base.model, folder / "base.safetensors", {**names, **statistics})
    prepare_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    text = {"vocab_size": 20, "context_length": 12, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(8, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    header = {"config": json.dumps(config), "vocabulary": json.dumps(WORDS)}
    safetensors.torch.save_file(model.state_dict(), folder / "clip.safetensors", header)
    return str(folder / "base.safetensors"), str(folder / "clip.safetensors")


class ColorEncoder:
    """Embeds an image by its mean colour."""

    encoder_id = "mean-color"

    def encode_images(self, images):
        return np.stack([i.reshape(-1, 3).mean(axis=0) / 64 for i in images]).astype(np.float32)


def random_pairs(model, seed, *, rank=2, size=0.4):
    pairs = {}
    for name in target_modules(model):
        weight = model.get_submodule(name).weight
        generator = seeding.torch_generator(seed, name)
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], rank, generator=generator) * size
        pairs[name] = LoraPair(down, up, scale=0.5)
    return pairs


def random_adapter(base, name, seed, **options):
    files = to_peft_files(random_pairs(base.model, seed, **options), base_digest=base.digest)
    return load_adapter(files, name=name)


def merged_base(base, parts):
    """Return the base with ``sum_i w_i scale_i B_i A_i`` added to its weights."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        for adapter, weight in parts:
            for name, pair in adapter.pairs.items():
                model.get_submodule(name).weight += weight * pair.scale * (pair.up @ pair.down)
    return replace(base, model=model, digest="cd" * 32)


# Name -> mean RGB colour: two bright, two dark.
DOMAINS = {
    "day": (190, 190, 200),
    "fog": (180, 185, 190),
    "night": (40, 40, 70),
    "dusk": (90, 60, 70),
}


def domain_images(name, count, size=(20, SIDE)):
    generator = seeding.numpy_generator(0, "tiny", name)
    noise = generator.integers(-30, 30, size=(count, *size, 3))
    shift = generator.integers(-8, 8, size=(count, 1, 1, 3))
    return np.clip(np.array(DOMAINS[name]) + noise + shift, 0, 255).astype(np.uint8)


def publish(uri, base, encoder, names=tuple(DOMAINS), **card):
    library = Library(open_store(str(uri)))
    for name in names:
        files = to_peft_files(
            random_pairs(base.model, list(DOMAINS).index(name)), base_digest=base.digest
        )
        embeddings = encoder.encode_images(list(domain_images(name, 6)))
        centroid = Centroid.from_embeddings(
            embeddings, encoder_id=encoder.encoder_id, normalised=False
        )
        library.publish(
            name,
            files,
            AdapterCard(
                name=name,
                role="segmenter",
                base=BaseModelInfo(base.name, base.digest),
                label_space=CLASSES,
                centroids=(centroid,),
                **card,
            ),
        )
    return library


def write_domain(folder, name, count=3, split="val"):
    """Write a dataset folder with random masks; the first two rows are ignored."""
    masks = seeding.numpy_generator(1, "tiny", name).integers(0, 3, size=(count, 20, SIDE))
    masks[:, :2] = 255
    for number, image in enumerate(domain_images(name, count)):
        for kind, array in (("images", image), ("masks", masks[number].astype(np.uint8))):
            path = folder / kind / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / "classes.json").write_text(json.dumps(list(CLASSES)))
    return folder
