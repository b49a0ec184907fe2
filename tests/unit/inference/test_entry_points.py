"""Command line, batch job, evaluation and endpoint give the same answer for a mixed library."""

import asyncio
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import loraseg
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.segment_images import segment_images
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.cli.entry import main
from loraseg.errors import AdapterMismatchError, LorasegError
from loraseg.evaluate.leave_one_out import ScoringConfig
from loraseg.evaluate.run import EvaluationConfig, EvaluationDomain, evaluate
from loraseg.inference.selection import AdaptiveSettings
from loraseg.serving.build import build_local_engine
from loraseg.train.core.threads import fixed_threads
from tests.unit.inference.tiny_service import segment_request, service_config
from tests.unit.tiny import CLASSES, ColorEncoder, domain_images, publish, write_domain

K, TEMPERATURE = 3, 3.0
# What is expected to be left out of `mixed_library`, and why.
LEFT_OUT = {
    "dusk": "no centroid of encoder",
    "fog": "not trained with CLIP attention LoRA inert, as most adapters are",
}


@pytest.fixture(autouse=True)
def one_thread():
    with fixed_threads(1):
        yield


@pytest.fixture
def mixed_library(tmp_path, base, encoder, own_cache):
    """Two adapters trained with the attention inert, one with it active, one without centroid."""
    folder = tmp_path / "library"
    publish(folder, base, encoder, names=("day", "night"), recipe={"clip_attention_lora": "inert"})
    publish(folder, base, encoder, names=("fog",), recipe={"clip_attention_lora": "active"})
    publish(folder, base, ColorEncoder(), names=("dusk",), recipe={"clip_attention_lora": "inert"})
    return folder


@dataclass
class Answer:
    label_map: np.ndarray
    adapters: list  # of (name, weight, distance), the largest weight first


def by_python(library, models, folder, image):
    segmenter = loraseg.load_segmenter(
        str(library), base=models[0], encoder=models[1], k=K, temperature=TEMPERATURE
    )
    [result] = segmenter.segment([image], CLASSES)
    used = [(a.name, a.weight, a.distance) for a in result.explanation.adapters]
    return Answer(result.label_map, used)


def by_command_line(library, models, folder, image):
    path, out = folder / "image.png", folder / "segmented"
    Image.fromarray(image).save(path)
    command = ["segment", str(path), "--classes", ", ".join(CLASSES), "--library", str(library)]
    command += ["--base", models[0], "--encoder", models[1], "--out", str(out)]
    command += ["--top-k", str(K), "--temperature", str(TEMPERATURE)]
    assert main(command) == 0
    explanation = json.loads((out / "image.json").read_text())
    used = [(a["name"], a["weight"], a["distance"]) for a in explanation["adapters"]]
    return Answer(np.array(Image.open(out / "image.png")), used)


def by_batch_job(library, models, folder, image):
    (folder / "images").mkdir()
    Image.fromarray(image).save(folder / "images" / "image.png")
    config = SegmentImagesConfig(
        images=str(folder / "images"),
        output=str(folder / "out"),
        classes=CLASSES,
        library=str(library),
        base=models[0],
        encoder=models[1],
        k=K,
        temperature=TEMPERATURE,
    )
    segment_images(config, LocalExecutor())
    [table] = Path(config.output).rglob("*.parquet")
    [row] = pq.read_table(io.BytesIO(table.read_bytes())).to_pylist()
    used = [(a["name"], a["weight"], a["distance"]) for a in row["adapters"]]
    return Answer(np.array(Image.open(folder / "out" / row["mask"])), used)


def by_evaluation(library, models, folder, image):
    data = write_domain(folder / "elsewhere", "fog", count=1)
    Image.fromarray(image).save(data / "images" / "val" / "0.png")
    config = EvaluationConfig(
        library=str(library),
        output=str(folder / "evaluation"),
        domains=(EvaluationDomain(name="elsewhere", data=str(data)),),
        base=models[0],
        encoder=models[1],
        k=K,
        temperature=TEMPERATURE,
        scoring=ScoringConfig(late=False, batch_size=1, examples=1),
    )
    [target] = evaluate(config).targets
    return Answer(target.examples[0].predictions["semla"], list(target.examples[0].retrieved))


def by_endpoint(library, models, folder, image):
    settings = AdaptiveSettings(k=K, temperature=TEMPERATURE)
    with build_local_engine(service_config(models, {"main": library})) as engine:
        assert engine.wait_until_ready(60.0)
        result = asyncio.run(engine.segment(segment_request(image, settings=settings)))
    used = [(a.name, a.weight, a.distance) for a in result.explanation.adapters]
    return Answer(result.label_map, used)


ENTRY_POINTS = [by_command_line, by_batch_job, by_evaluation, by_endpoint]


@pytest.mark.parametrize("domain", ["fog", "night"])
def test_all_entry_points_give_the_same_label_map_adapters_and_weights(
    mixed_library, models, tmp_path, caplog, domain
):
    image = domain_images(domain, 1)[0]
    expected = by_python(mixed_library, models, tmp_path, image)
    assert {name for name, _, _ in expected.adapters} == {"day", "night"}
    assert len(np.unique(expected.label_map)) > 1
    for entry_point in ENTRY_POINTS:
        folder = tmp_path / entry_point.__name__
        folder.mkdir()
        caplog.clear()
        answer = entry_point(mixed_library, models, folder, image)
        np.testing.assert_array_equal(answer.label_map, expected.label_map)
        assert [name for name, _, _ in answer.adapters] == [n for n, _, _ in expected.adapters]
        # The endpoint and the evaluation may embed the image in another process or batch.
        assert [(w, d) for _, w, d in answer.adapters] == [
            (pytest.approx(w, abs=1e-6), pytest.approx(d, abs=1e-6))
            for _, w, d in expected.adapters
        ]
        for name, reason in LEFT_OUT.items():
            assert name in caplog.text
            assert reason in caplog.text


@pytest.mark.parametrize("entry_point", [by_python, by_batch_job, by_evaluation])
def test_a_library_without_any_usable_adapter_is_an_error(
    base, models, tmp_path, own_cache, entry_point
):
    publish(tmp_path / "library", base, ColorEncoder(), names=("day", "fog"))
    with pytest.raises(LorasegError, match=r"can be used: day, fog \(no centroid of encoder") as e:
        entry_point(tmp_path / "library", models, tmp_path, domain_images("fog", 1)[0])
    assert isinstance(e.value, AdapterMismatchError)


def test_the_endpoint_reports_a_library_without_any_usable_adapter(
    base, models, tmp_path, own_cache, caplog
):
    """It cannot refuse to start: adapters may be published later."""
    publish(tmp_path / "library", base, ColorEncoder(), names=("day", "fog"))
    config = service_config(models, {"main": tmp_path / "library"})
    with build_local_engine(config) as engine:
        assert engine.wait_until_ready(60.0)
        request = segment_request(domain_images("fog", 1)[0])
        result = asyncio.run(engine.segment(request))
        view = asyncio.run(engine.catalog("main"))
    assert result.explanation.fallback == "no adapter of library 'main' fits"
    assert (view.adapters, view.incompatible) == ((), 2)
    assert "day, fog (no centroid of encoder" in caplog.text
