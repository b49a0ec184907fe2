import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from loraseg.backbones.clip import load_clip
from loraseg.cli import main
from loraseg.data.masks import read_mask
from loraseg.fuse.merging import load_table
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.predictor import Predictor
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, publish, write_domain, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def library(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    publish(folder, load_base(models[0]), load_clip(models[1]), metrics={"miou": 0.42})
    return str(folder)


@pytest.fixture
def photos(tmp_path):
    paths = []
    for name in ("day", "night"):
        Image.fromarray(domain_images(name, 1)[0]).save(tmp_path / f"{name}.png")
        paths.append(str(tmp_path / f"{name}.png"))
    return paths


@pytest.fixture
def segment(models, library, photos, tmp_path):
    def run(*more, images=photos, uri=library, classes="road, car, sky"):
        options = ["--base", models[0], "--encoder", models[1], "--out", str(tmp_path / "out")]
        library_option = ["--library", uri] if uri else []
        return main(["segment", *images, "--classes", classes, *library_option, *options, *more])

    return run


def test_segment_writes_mask_overlay_and_explanation(segment, photos, tmp_path, capsys):
    assert segment("--top-k", "2", "--temperature", "0.3") == 0
    for name, path in zip(("day", "night"), photos, strict=True):
        with Image.open(tmp_path / "out" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", (24, 20))
            assert set(np.unique(np.asarray(mask))) <= {0, 1, 2}
        with Image.open(tmp_path / "out" / f"{name}_overlay.png") as overlay:
            assert overlay.mode == "RGB"
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert record["image"] == path
        assert len({used["name"] for used in record["adapters"]} & set(DOMAINS)) == 2
        assert sum(used["weight"] for used in record["adapters"]) == pytest.approx(1.0)
        assert record["settings"] == {"k": 2, "temperature": 0.3, "mode": "fused"}
        assert sum(record["shares"].values()) == pytest.approx(1.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{photos[0]} -> ")


def test_segment_without_a_library_needs_mode_base(segment, models, photos, tmp_path, capsys):
    assert segment(uri=None) == 2
    assert "--library: expected" in capsys.readouterr().err
    assert segment("--mode", "base", uri=None) == 0
    [scores] = Predictor(load_base(models[0])).predict(list(domain_images("day", 1)), CLASSES, None)
    written = read_mask(tmp_path / "out" / "day.png")
    assert (written == scores.numpy().argmax(axis=0)).all()


def test_segment_uses_the_base_alone_with_an_empty_library_and_reports_it(
    segment, tmp_path, capsys
):
    assert segment(uri=str(tmp_path / "nothing")) == 0
    assert "is empty" in capsys.readouterr().out
    assert "is empty" in json.loads((tmp_path / "out" / "day.json").read_text())["fallback"]


def test_a_broken_image_does_not_stop_the_others(segment, photos, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    assert segment(images=[str(broken), *photos]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {broken}: ")
    assert len(captured.err.splitlines()) == 1
    assert len(captured.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": " , "}, "--classes: "),
        ({"classes": "car, Car"}, "'Car' appears twice"),
        ({"images": ["absent.png"]}, "no such image: absent.png"),
        ({"uri": "ftp://x"}, "store URI of kind 'ftp'"),
    ],
)
def test_usage_errors_are_one_line_with_status_2(segment, arguments, message, capsys):
    assert segment(**arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_two_images_with_the_same_name_are_refused(segment, photos, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "day.png")
    assert segment(images=[*photos, str(tmp_path / "other" / "day.png")]) == 2
    assert "2 images are called 'day'" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--top-k", "0"), ("--temperature", "-1")])
def test_settings_out_of_range_are_refused(segment, option, capsys):
    assert segment(*option) == 2
    assert "error: " in capsys.readouterr().err


def test_invalid_options_exit_with_2(segment, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["segment"])
    with pytest.raises(SystemExit, match="2"):
        main([])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "library" in capsys.readouterr().out


def test_library_ls(library, capsys):
    assert main(["library", "ls", library]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["NAME", "VERSION", "ROLE", "BASE"]
    assert [line.split()[0] for line in lines[1:]] == ["day", "dusk", "fog", "night"]
    assert "42.0" in lines[1]


def test_library_ls_by_base(library, models, tmp_path, capsys):
    digest = load_base(models[0]).digest
    assert main(["library", "ls", library, "--base", digest[:8]]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["library", "ls", library, "--base", "x"]) == 0
    assert "no adapters for base x" in capsys.readouterr().out
    assert main(["library", "ls", str(tmp_path / "nowhere")]) == 0
    assert "no adapters" in capsys.readouterr().out


def test_library_show(library, capsys):
    assert main(["library", "show", library, "fog"]) == 0
    first, _, card = capsys.readouterr().out.partition("\n")
    assert first.startswith("* version 1")
    card = json.loads(card)
    assert card["name"] == "fog"
    assert card["centroids"][0]["vector"] == "8 numbers"
    assert main(["library", "show", library, "fgo"]) == 2
    assert "did you mean 'fog'" in capsys.readouterr().err
    assert main(["library", "show", library, "fog", "--version", "7"]) == 2


def test_library_rollback_and_retire(models, tmp_path, capsys):
    base, encoder = load_base(models[0]), load_clip(models[1])
    library = publish(tmp_path, base, encoder, names=("day",))
    files, card = library.load("day")
    library.publish(
        "day", {**files, "adapter_config.json": files["adapter_config.json"] + b" "}, card
    )
    assert library.entry("day").version == 2
    assert main(["library", "rollback", str(tmp_path), "day", "1"]) == 0
    assert library.entry("day").version == 1
    assert capsys.readouterr().out.startswith("day is now version 1")
    assert main(["library", "rollback", str(tmp_path), "day", "9"]) == 2
    capsys.readouterr()
    assert main(["library", "retire", str(tmp_path), "day"]) == 0
    assert capsys.readouterr().out == "day is retired\n"
    assert main(["library", "show", str(tmp_path), "day"]) == 2
    assert "'day' is retired" in capsys.readouterr().err


def test_library_verify_reports_damage(models, tmp_path, capsys):
    publish(tmp_path, load_base(models[0]), load_clip(models[1]), names=("day", "fog"))
    assert main(["library", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("objects checked, ok")
    [blob, *_] = sorted((tmp_path / "blobs").rglob("sha256/*/*"))
    blob.write_bytes(b"damaged")
    assert main(["library", "verify", str(tmp_path)]) == 1
    assert "corrupt: blobs/sha256/" in capsys.readouterr().out


def test_miniature_write(tmp_path, capsys):
    counts = ["--train", "2", "--val", "1", "--domains", "snow, dusk"]
    assert main(["miniature", "write", str(tmp_path), *counts]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dusk", "snow"]
    assert len(list((tmp_path / "snow" / "images" / "train").iterdir())) == 2
    assert "(snow family)" in capsys.readouterr().out
    assert main(["miniature", "write", str(tmp_path), "--domains", "mars"]) == 2
    assert main(["miniature", "write", str(tmp_path), "--val", "0"]) == 2


def test_train_base_writes_a_base_that_can_be_loaded(models, tmp_path, capsys):
    for split in ("train", "val"):
        write_domain(tmp_path / "data", "day", count=2, split=split)
    out = str(tmp_path / "further.safetensors")
    command = ["train-base", "--data", str(tmp_path / "data"), "--out", out, "--base", models[0]]
    quick = ["recipe.loop.steps=2", "recipe.augment.crop=16", "recipe.batch_size=2"]
    assert main([*command, *quick]) == 0
    assert load_base(out).digest in capsys.readouterr().out
    assert main([*command, *quick]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command, "recipe.loop.stepz=2"]) == 2
    assert "did you mean 'recipe.loop.steps'" in capsys.readouterr().err


def test_the_parser_is_built_without_loading_torch():
    code = "import sys, loraseg.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_doctor(tmp_path, capsys):
    assert main(["doctor", "--store", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "conditional writes work" in output
    assert "torch" in output
    assert main(["doctor", "--store", "ftp://x"]) == 1
    assert "BAD" in capsys.readouterr().out


def test_doctor_measures_merging_and_stores_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path))
    monkeypatch.setattr("loraseg.doctor._COMMON_SHAPES", ((8, 4),))
    assert main(["doctor", "--measure-merging"]) == 0
    assert "layer shapes measured" in capsys.readouterr().out
    table = load_table(torch.device("cpu"), torch.float32)
    assert (8, 4) in table.measured


def test_spread_of_a_missing_file(tmp_path, capsys):
    assert main(["spread", str(tmp_path / "absent.json")]) == 2
    assert "absent.json: cannot be read" in capsys.readouterr().err


def test_a_closed_pipe_prints_no_traceback(library):
    command = [sys.executable, "-c", "import sys; from loraseg.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "library", "ls", library], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr as stream:
        assert b"Traceback" not in stream.read()
    assert process.wait() != 0
