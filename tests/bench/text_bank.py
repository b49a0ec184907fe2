"""Text features with active LoRA against a pass over all 77 tokens, text tower of ViT-B/16.

peft's layers wrap five linear layers of every text block in all variants: text features must be
recomputed when adapters change the text encoder.
"""

import peft
import torch
from torch import Tensor

from loraseg.adapters import target_modules
from loraseg.seeding import derive, torch_generator
from loraseg.segment.open_vocabulary.catseg import CATSeg, CATSegConfig
from tests.bench.harness import Times, interleave, ratio, setting, single_thread
from tests.bench.plain_catseg import plain_text, trimmed_text

CLASSES, ROUNDS, RANK = (19, 59, 150), 2, 8
# CLIP's token ids of "A photo of a {} in the scene", with start and end.
BEFORE, AFTER = (49406, 320, 1125, 539, 320), (530, 518, 4668, 49407)
NAME_TOKENS = (1, 1, 1, 1, 2, 2, 3)


@single_thread()
def run() -> dict[str, object]:
    model = _model()
    times: Times = {}
    errors: dict[str, float] = {}
    for classes in CLASSES:
        ids = _prompts(classes)
        times |= _time(model, ids, f"c{classes}")
        with torch.inference_mode():
            difference = model.encode_text(ids) - plain_text(model.clip, ids)
        errors[f"c{classes}"] = float(difference.abs().max())
    model.to(torch.bfloat16)
    times |= _time(model, _prompts(CLASSES[0]), f"c{CLASSES[0]}_bf16")
    names = [f"c{classes}" for classes in CLASSES]
    bfloat16 = f"c{CLASSES[0]}_bf16"
    return {
        "bench": "text_bank",
        "ratios": {f"speedup_{n}": round(1 / ratio(times, n, f"plain_{n}"), 2) for n in names},
        "checks": {"exact_1e5": max(errors.values()) <= 1e-5},
        "setting": setting(
            times,
            exact="largest difference between unit vectors, float32",
            differences=errors,
            lora=f"peft, rank {RANK}, q, k, v, c_fc and c_proj of every text block",
            tokens_of_a_name=NAME_TOKENS,
            over_trimmed={n: round(1 / ratio(times, n, f"trimmed_{n}"), 2) for n in names},
            speedup_bf16_c19=round(1 / ratio(times, bfloat16, f"plain_{bfloat16}"), 2),
        ),
    }


def _model() -> CATSeg:
    torch.manual_seed(derive(0, "bench", "text_bank"))
    model = CATSeg(CATSegConfig(vision_layers=1)).eval().requires_grad_(requires_grad=False)
    sites = [name for name in target_modules(model) if ".clip_model.transformer." in name]
    config = peft.LoraConfig(r=RANK, target_modules=sites, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    return model


def _prompts(classes: int) -> Tensor:
    """Return prompts (t, 77) whose names have typical numbers of tokens."""
    generator = torch_generator(0, "bench", "text_bank", classes)
    ids = torch.zeros(classes, 77, dtype=torch.long)
    for index, row in enumerate(ids):
        length = NAME_TOKENS[index % len(NAME_TOKENS)]
        name = torch.randint(1000, 40000, (length,), generator=generator).tolist()
        prompt = torch.tensor([*BEFORE, *name, *AFTER])
        row[: len(prompt)] = prompt
    return ids


@torch.inference_mode()
def _time(model: CATSeg, ids: Tensor, name: str) -> Times:
    rivals = {
        name: lambda: model.encode_text(ids),
        f"trimmed_{name}": lambda: trimmed_text(model.clip, ids),
        f"plain_{name}": lambda: plain_text(model.clip, ids),
    }
    return interleave(rivals, rounds=ROUNDS)
