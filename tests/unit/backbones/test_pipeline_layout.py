"""The files of pipeline folders: digests, checks and refused folders."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline

from loraseg.backbones.diffusion import load_diffusion
from loraseg.backbones.pipeline_fit import check_parts_fit
from loraseg.backbones.pipeline_layout import pipeline_digest
from loraseg.errors import ConfigError, IntegrityError
from loraseg.synth.schedulers import SchedulerSteps
from tests.unit.tiny_diffusion import PIPELINE_FILES, tiny_tokenizer


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_digest_covers_the_used_files(saved, kind):
    folder = saved[kind]
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in PIPELINE_FILES[kind]
    }
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    assert pipeline_digest(folder) == hashlib.sha256(text.encode()).hexdigest()
    assert load_diffusion(str(folder)).digest == pipeline_digest(folder)


def test_the_digest_ignores_other_files(folder):
    before = pipeline_digest(folder)
    (folder / "README.md").write_text("words")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    (folder / "safety_checker").mkdir()
    assert pipeline_digest(folder) == before
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert pipeline_digest(folder) != before


def test_sharded_weights(folder):
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / "unet" / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = whole.with_name(f"{whole.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    base = load_diffusion(str(folder))
    assert all(torch.equal(value, tensors[key]) for key, value in base.unet.state_dict().items())
    shutil.move(folder / "unet" / shard, folder / "vae" / shard)
    with pytest.raises(IntegrityError, match=f"{shard} is missing"):
        load_diffusion(str(folder))
    for strange in ({}, None, [1], {"a": 1}, {"a": "../vae/x.safetensors"}, {"a": "x.bin"}):
        edit(index, weight_map=strange)
        with pytest.raises(IntegrityError, match=r"does not name plain \.safetensors files"):
            load_diffusion(str(folder))


def test_tokenizer_in_the_older_format(folder):
    """Vocabulary and merges are separate files, as in the public folders."""
    tokenizer = folder / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    (tokenizer / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(merge) for merge in model["merges"]]
    (tokenizer / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tokenizer / "tokenizer.json").unlink()
    base = load_diffusion(str(folder))
    text = "sidewalk, car and a building in heavy fog"
    assert base.tokenizers[0](text).input_ids == tiny_tokenizer()(text).input_ids
    (tokenizer / "merges.txt").unlink()
    with pytest.raises(IntegrityError, match=r"tokenizer: merges\.txt is missing"):
        load_diffusion(str(folder))


@pytest.mark.parametrize("name", sorted(PIPELINE_FILES["sd"]))
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    if name == "tokenizer/tokenizer.json":
        name = "tokenizer/vocab.json"
    part, _, file = name.rpartition("/")
    with pytest.raises(IntegrityError, match=f"{part}: {file} is missing"):
        load_diffusion(str(folder))


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_pickles_are_refused(folder, name):
    pickle = (folder / name).with_name("pytorch_model.bin")
    (folder / name).rename(pickle)
    with pytest.raises(IntegrityError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        load_diffusion(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "is a StableDiffusionInpaintPipeline"),
        ({"_class_name": ["my_pipeline", "Mine"]}, r"is a \['my_pipeline', 'Mine'\], expected"),
        ({"_class_name": None}, "is a None, expected StableDiffusionPipeline or"),
        ({"unet": ["my_unet", "MyUNet"]}, r"unet is \['my_unet', 'MyUNet'\], expected UNet2D"),
        ({"unet": ["diffusers", "UNet3DConditionModel"]}, "expected UNet2DConditionModel of"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "expected AutoencoderKL of diffusers"),
        ({"vae": None}, "vae is None, expected AutoencoderKL"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "expected CLIPTextModel of"),
        (
            {"tokenizer": ["transformers", "T5Tokenizer"]},
            "expected CLIPTokenizer or CLIPTokenizerF",
        ),
        ({"scheduler": ["diffusers", "UNet2DConditionModel"]}, "expected one of its schedulers"),
        ({"scheduler": ["scheduling_mine", "PNDMScheduler"]}, "expected one of its schedulers"),
        (
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            "cannot be loaded|has no",
        ),
        ({"force_zeros_for_empty_prompt": "yes"}, "is not a boolean"),
    ],
)
def test_other_classes_are_refused(folder, changes, message):
    edit(folder / "model_index.json", **changes)
    (folder / "my_unet.py").write_text("raise SystemExit('custom code ran')")
    (folder / "unet" / "my_unet.py").write_text("raise SystemExit('custom code ran')")
    with pytest.raises((IntegrityError, ConfigError), match=message):
        load_diffusion(str(folder))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_an_index_that_is_not_an_object(folder, text):
    (folder / "model_index.json").write_text(text)
    with pytest.raises(
        IntegrityError, match=r"model_index\.json: (not valid JSON|got list, expected a JSON)"
    ):
        load_diffusion(str(folder))


def test_the_size_of_the_index_is_limited(folder):
    with (folder / "model_index.json").open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(IntegrityError, match="larger than"):
        load_diffusion(str(folder))


def test_an_adapter_in_a_part_is_refused(folder):
    """transformers would load it implicitly, and also the base that it names."""
    (folder / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"text_encoder: holds adapter_config\.json"):
        load_diffusion(str(folder))


def test_weights_that_do_not_fit_their_config_are_refused(folder):
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{file}.safetensors"
        whole = path.read_bytes()
        tensors = safetensors.torch.load(whole)
        name = sorted(tensors)[0]
        for changed in (
            {key: value for key, value in tensors.items() if key != name},
            {**tensors, name: torch.zeros(3, 3)},
        ):
            path.write_bytes(safetensors.torch.save(changed, {"format": "pt"}))
            with pytest.raises(IntegrityError, match=f"{part}: cannot be loaded"):
                load_diffusion(str(folder))
        path.write_bytes(whole[:-7])
        with pytest.raises(IntegrityError, match=f"{part}: cannot be loaded"):
            load_diffusion(str(folder))
        path.write_bytes(whole)


def test_weight_names_of_the_public_folders(folder, caplog):
    """Old names in the VAE's attention; prefixes and position ids in the text encoder."""
    before = load_diffusion(str(folder))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in safetensors.torch.load_file(vae).items():
        part = next((part for part in old if f".{part}." in key), None)
        renamed[key.replace(f".{part}.", f".{old[part]}.") if part else key] = value
    assert any(".proj_attn." in key for key in renamed)
    safetensors.torch.save_file(renamed, vae, {"format": "pt"})
    encoder = folder / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(encoder)
    prefixed = {f"text_model.{key}": value for key, value in tensors.items()}
    prefixed["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(prefixed, encoder, {"format": "pt"})
    after = load_diffusion(str(folder))
    pairs = ((before.vae, after.vae), (before.text_encoders[0], after.text_encoders[0]))
    for mine, theirs in pairs:
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("tokenizer/tokenizer_config.json", {"model_max_length": 4000}, "model_max_length 4000"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": None}, "model_max_length"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}, "tokenizer: "),
        ("unet/config.json", {"norm_num_groups": 0}, "unet: cannot be loaded: ZeroDivisionError"),
        ("unet/config.json", {"attention_head_dim": 0}, "unet: cannot be loaded: "),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "text_encoder: cannot be loaded"),
        ("vae/config.json", {"block_out_channels": []}, "vae: cannot be loaded: "),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor 'x'"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor '0'"),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "unet: "),
    ],
)
def test_untrusted_configs_are_checked(folder, file, changes, reason):
    values = json.loads((folder / file).read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match=reason):
        load_diffusion(str(folder))


@pytest.mark.parametrize("width", [64, [32, 64]])
def test_the_text_width_must_be_that_of_the_unet(width):
    text = SimpleNamespace(hidden_size=32, max_position_embeddings=77)
    parts = {
        "tokenizer": SimpleNamespace(model_max_length=77),
        "text_encoder": SimpleNamespace(config=text),
        "unet": SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width)),
        "vae": SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0)),
    }
    with pytest.raises(IntegrityError, match=r"here/unet: cross_attention_dim .* expected 32"):
        check_parts_fit(parts, "here")
    parts["unet"].config.cross_attention_dim = [32, 32]
    check_parts_fit(parts, "here")


def test_old_configs_get_the_steps_offset_of_the_stock_pipeline(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(path.read_text())
    del values["steps_offset"]
    path.write_text(json.dumps(values))
    with pytest.warns(FutureWarning, match="steps_offset"):
        stock = StableDiffusionPipeline.from_pretrained(folder).scheduler
    scheduler = load_diffusion(str(folder)).scheduler
    assert scheduler.config.steps_offset == stock.config.steps_offset == 1
    for name in ("pndm", "ddim"):
        assert int(
            SchedulerSteps(scheduler, name, 10, torch.device("cpu")).timestep(9)
        ) == 101 - 100 * (name == "ddim")
