"""Pipeline folders: sources, loading, the cache and refused folders."""

import json

import pytest
import torch

from loraseg.backbones import pipeline_source
from loraseg.backbones.diffusion import load_diffusion
from loraseg.backbones.pipeline_layout import pipeline_digest
from loraseg.backbones.pipeline_source import resolve_pipeline
from loraseg.backbones.weights import absolute_spec
from loraseg.cache_dir import cache_dir
from loraseg.errors import ConfigError, IntegrityError, StoreError
from loraseg.storage import LocalStore
from tests.unit.tiny_diffusion import PIPELINE_FILES, tiny_sd, tiny_sdxl, tiny_tokenizer


@pytest.fixture
def bucket(saved, tmp_path, monkeypatch):
    """A fake S3 bucket "b" with a pipeline below "base"; it counts the reads."""
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    store = LocalStore(tmp_path / "bucket")
    for path in saved["sd"].rglob("*"):
        if path.is_file():
            store.put(f"base/{path.relative_to(saved['sd']).as_posix()}", path.read_bytes())
    store.put("base/safety_checker/pytorch_model.bin", b"pickle")
    store.put("base/README.md", b"words")
    reads = []

    class Counting:
        def __init__(self, prefix):
            self.below = store.with_prefix(prefix)

        def list(self, prefix=""):
            return self.below.list(prefix)

        def get(self, key):
            reads.append(key)
            return self.below.get(key)

    monkeypatch.setattr(
        pipeline_source, "open_store", lambda uri: Counting(uri.removeprefix("s3://b/"))
    )
    return store, reads


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_loads_a_saved_pipeline(saved, kind, scheme, caplog, capfd):
    base = load_diffusion(f"{scheme}{saved[kind]}")
    pipeline = tiny_sd("v_prediction") if kind == "sd" else tiny_sdxl()
    assert (base.name, base.kind) == (f"{scheme}{saved[kind]}", kind)
    assert base.prediction_type == ("v_prediction" if kind == "sd" else "epsilon")
    assert base.zero_unconditional == (kind == "sdxl")
    assert type(base.scheduler) is type(pipeline.scheduler)
    assert torch.equal(base.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    stock = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    stock += [pipeline.text_encoder_2] if kind == "sdxl" else []
    for mine, theirs in zip((base.unet, base.vae, *base.text_encoders), stock, strict=True):
        expected = theirs.state_dict()
        assert set(mine.state_dict()) == set(expected)
        assert all(torch.equal(value, expected[key]) for key, value in mine.state_dict().items())
    text = ["sidewalk, car", ""]
    assert [t(text).input_ids for t in base.tokenizers] == [tiny_tokenizer()(text).input_ids] * (
        len(base.tokenizers)
    )
    assert [t.pad_token for t in base.tokenizers] == ["<|endoftext|>", "!"][: len(base.tokenizers)]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_pinned_digest_is_checked(saved):
    digest = pipeline_digest(saved["sd"])
    assert load_diffusion(f"{saved['sd']}#sha256={digest}").name == str(saved["sd"])
    with pytest.raises(IntegrityError, match=f"sha256 is {digest}, pinned {'0' * 64}"):
        load_diffusion(f"{saved['sd']}#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("kind", "dtype", "vae"),
    [("sd", torch.float16, torch.float16), ("sdxl", torch.bfloat16, torch.float32)],
)
def test_dtypes(saved, kind, dtype, vae, caplog):
    base = load_diffusion(str(saved[kind]), dtype=dtype)
    assert (base.dtype, base.vae.dtype) == (dtype, vae)
    assert {encoder.dtype for encoder in base.text_encoders} == {dtype}
    if kind == "sdxl":  # not rounded
        expected = tiny_sdxl().vae.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in base.vae.state_dict().items())
    assert not caplog.records


@pytest.mark.parametrize("spec", ["nowhere", "file:///nowhere", "s3:/b/x", "gs://b/x"])
def test_a_missing_folder_is_named(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"folder .* does not exist; expected 'miniature', a diffusers folder"
    ):
        resolve_pipeline(spec)


def test_a_store_is_copied_to_the_cache_by_digest(bucket, saved):
    _, reads = bucket
    base = load_diffusion("s3://b/base")
    digest = pipeline_digest(saved["sd"])
    copy = cache_dir("pipelines") / digest
    assert (base.name, base.digest) == ("s3://b/base", digest)
    files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert files == PIPELINE_FILES["sd"]
    assert set(reads) == PIPELINE_FILES["sd"]
    assert [path.name for path in copy.parent.iterdir()] == [digest]
    count = len(reads)
    # The store may have changed, so only a pinned pipeline is not read again.
    assert load_diffusion(f"s3://b/base#sha256={digest}").digest == digest
    assert len(reads) == count
    load_diffusion("s3://b/base")
    assert len(reads) == 2 * count


def test_a_damaged_copy_is_replaced(bucket, saved):
    _, reads = bucket
    spec = f"s3://b/base#sha256={pipeline_digest(saved['sd'])}"
    copy = resolve_pipeline(spec).folder
    whole = (copy / "unet" / "config.json").read_bytes()
    for damage in (lambda path: path.write_bytes(b"{}"), lambda path: path.unlink()):
        reads.clear()
        damage(copy / "unet" / "config.json")
        assert resolve_pipeline(spec).folder == copy
        assert (copy / "unet" / "config.json").read_bytes() == whole
        assert reads


def test_a_changed_store_gets_a_new_copy(bucket):
    store, _ = bucket
    first = resolve_pipeline("s3://b/base")
    config = json.loads(store.get("base/scheduler/scheduler_config.json"))
    config["prediction_type"] = "epsilon"
    store.put("base/scheduler/scheduler_config.json", json.dumps(config).encode())
    second = resolve_pipeline("s3://b/base")
    assert first.folder != second.folder
    with pytest.raises(IntegrityError, match=f"pinned {'0' * 64}"):
        resolve_pipeline(f"s3://b/base#sha256={'0' * 64}")


def test_a_store_without_a_pipeline(bucket):
    with pytest.raises(IntegrityError, match=r"s3://b/none: model_index\.json is missing"):
        resolve_pipeline("s3://b/none")
    assert not list(cache_dir("pipelines").iterdir())


def test_a_failing_store_leaves_no_partial_copy(bucket, monkeypatch):
    store, _ = bucket
    store.delete("base/vae/config.json")
    listed = [*store.with_prefix("base").list(), "vae/config.json"]
    below = store.with_prefix("base")
    failing = type(
        "Failing", (), {"list": lambda _: iter(listed), "get": lambda _, k: below.get(k)}
    )
    monkeypatch.setattr(pipeline_source, "open_store", lambda uri: failing())
    with pytest.raises(StoreError):
        resolve_pipeline("s3://b/base")
    assert not list(cache_dir("pipelines").iterdir())


def test_only_the_used_files_are_requested_from_the_hub(saved, monkeypatch):
    import fnmatch

    import huggingface_hub

    request = {}

    def snapshot_download(repo, **settings):
        request.update(settings, repo=repo)
        return str(saved["sdxl"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    base = load_diffusion("hf:org/name@v1")
    assert (request["repo"], request["revision"]) == ("org/name", "v1")
    assert base.digest == pipeline_digest(saved["sdxl"])
    load_diffusion("hf:org/name")
    assert request["revision"] is None
    patterns = request["allow_patterns"]
    others = ["unet/diffusion_pytorch_model.bin", "unet/model.onnx", "sd_xl_base_1.0.safetensors"]
    others += ["unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"]
    for name in (*PIPELINE_FILES["sdxl"], "tokenizer/merges.txt", *others):
        matches = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        assert matches == (name not in others), name

    def unknown(repo, **settings):
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    with pytest.raises(ConfigError, match="download from the hub failed: no such repository"):
        load_diffusion("hf:org/name")


@pytest.mark.parametrize("spec", ["hf:org", "hf:org/name@", "hf:org/name:file", "hf:a/b/c"])
def test_malformed_hub_specs_are_refused_before_any_request(spec):
    with pytest.raises(ConfigError, match="expected hf:org/name or hf:org/name@revision"):
        resolve_pipeline(spec)


def test_the_spec_of_a_folder_becomes_absolute(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved["sd"].parent)
    name = saved["sd"].name
    assert absolute_spec(name) == str(saved["sd"].resolve())
    assert (
        absolute_spec(f"{name}#sha256={'0' * 64}") == f"{saved['sd'].resolve()}#sha256={'0' * 64}"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for spec in ("miniature", "", "other", "nowhere", "s3://b/base", "hf:org/name"):
        assert absolute_spec(spec) == spec
