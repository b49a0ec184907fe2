"""``loraseg generate``: files, contact sheet and lineage; error messages."""

import json

import numpy as np
import pytest
from PIL import Image

from loraseg.adapters.peft_io import to_peft_files
from loraseg.backbones.diffusion import load_diffusion
from loraseg.cli import main
from loraseg.data.labels import write_classes
from loraseg.data.masks import read_mask, write_mask
from loraseg.library import AdapterCard, BaseModelInfo, Library
from loraseg.storage import open_store
from loraseg.synth.lineage import mask_digest
from tests.unit.synth.tiny_generator import (  # noqa: F401
    SPACE,
    block_mask,
    one_thread,
    random_adapter,
    tiny_pipeline,
)

CLASSES = ", ".join(SPACE.names)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("sd").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def digest(folder):
    return load_diffusion(str(folder)).digest


@pytest.fixture
def masks(tmp_path):
    write_mask(tmp_path / "one.png", block_mask(0), SPACE)
    write_mask(tmp_path / "two.png", block_mask(2, (16, 32)))
    return [str(tmp_path / "one.png"), str(tmp_path / "two.png")]


@pytest.fixture
def generate(folder, masks, tmp_path):
    def run(*more, images=masks, classes=CLASSES, out=tmp_path / "out"):
        class_option = ["--classes", classes] if classes else []
        options = ["--base", str(folder), "--steps", "2", "--k", "2", "--out", str(out)]
        return main(["generate", *images, *class_option, *options, *more])

    return run


def card(digest, **more):
    values = {"name": "rain", "role": "generator", "base": BaseModelInfo("tiny", digest), **more}
    return AdapterCard(**values)


def write_adapter(folder, digest, adapter=None, sidecar=None):
    folder.mkdir()
    pairs = (adapter or random_adapter("x", base_digest=None)).pairs
    for name, data in to_peft_files(pairs, base_digest=digest).items():
        (folder / name).write_bytes(data)
    if sidecar is not None:
        (folder / "card.json").write_bytes(sidecar.to_bytes())
    return str(folder)


def test_images_labels_sheet_and_lineage(generate, masks, tmp_path, capsys, digest):
    assert generate("--seed", "3", "--prompt-template", "{classes} in fog") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            f"{stem}_{k}{end}"
            for stem in ("one", "two")
            for k in (0, 1)
            for end in (".png", "_label.png", ".json")
        ]
        + ["sheet.png"]
    )
    for stem, source in zip(("one", "two"), (block_mask(0), block_mask(2, (16, 32))), strict=True):
        label = read_mask(out / f"{stem}_1_label.png", classes=len(SPACE))
        assert (label == source).all()
        with Image.open(out / f"{stem}_1.png") as image:
            assert (image.mode, image.size) == ("RGB", source.shape[::-1])
        record = json.loads((out / f"{stem}_1.json").read_text())
        assert record["mask_id"] == mask_digest(source)
        assert (record["k"], record["sampling"]["seed"], record["sampling"]["steps"]) == (1, 3, 2)
        assert record["prompt"].endswith(" in fog")
        assert record["base"]["digest"] == digest
        assert {"pair_id", "generator", "adapters", "heads", "code_revision"} <= record.keys()
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size[0] > 3 * 96
    captured = capsys.readouterr()
    assert [line.split(" -> ")[0] for line in captured.out.splitlines()[:2]] == ["one", "two"]
    assert captured.err.splitlines()[-1].startswith("4/4 images, ")


def test_the_same_command_gives_the_same_bytes(generate, tmp_path, masks):
    assert generate() == 0
    assert generate("--batch", "1", images=masks[::-1], out=tmp_path / "again") == 0
    for name in ("one_0.json", "two_1_label.png"):
        first, second = tmp_path / "out" / name, tmp_path / "again" / name
        if name.endswith(".json"):
            ids = [json.loads(path.read_text())["pair_id"] for path in (first, second)]
            assert ids[0] == ids[1]
        else:
            assert first.read_bytes() == second.read_bytes()
    images = [np.asarray(Image.open(tmp_path / at / "one_0.png"), int) for at in ("out", "again")]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_adapters_of_folders_and_libraries(generate, tmp_path, digest):
    plain = write_adapter(tmp_path / "plain", digest)
    library = Library(open_store(str(tmp_path / "library")))
    own = random_adapter("y", base_digest=None)
    entry = library.publish(
        "rain",
        to_peft_files(own.pairs, base_digest=digest),
        card(digest, label_space=SPACE.names),
    )
    published = f"{tmp_path / 'library'}#rain@1"
    # The card of the published adapter lists the classes.
    assert (
        generate(
            *("--adapter", plain, "--adapter", published, "--weight", "0.5", "--weight", "2"),
            classes=None,
        )
        == 0
    )
    record = json.loads((tmp_path / "out" / "one_0.json").read_text())
    assert [used["weight"] for used in record["adapters"]] == [0.5, 2.0]
    assert record["adapters"][1]["digest"] == entry.digest
    assert record["adapters"][1]["name"] == "rain"


def test_adapters_of_another_base_or_role_are_refused(generate, tmp_path, digest, capsys):
    other = write_adapter(tmp_path / "other", "cd" * 32)
    segmenter = write_adapter(tmp_path / "segmenter", None, sidecar=card(digest, role="segmenter"))
    carded = write_adapter(tmp_path / "carded", None, sidecar=card("cd" * 32))
    for folder, message in (
        (other, "trained on base cdcdcdcdcdcd, expected"),
        (carded, "trained on base cdcdcdcdcdcd, expected"),
        (segmenter, "its role is segmenter, expected generator"),
    ):
        assert generate("--adapter", folder) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (["--k", "0"], {}, "images: got 0"),
        (["--size", "32"], {}, "--size: got '32', expected HxW"),
        (["--size", "30x32"], {}, "size 30 x 32: expected multiples of 4"),
        (["--scheduler", "dimm"], {}, "did you mean 'ddim'"),
        (["--weight", "1"], {}, "--weight: got 1, expected one for each of 0"),
        (["--adapter", "absent"], {}, "absent: no such folder, and no LIBRARY#NAME"),
        (["--adapter", "lib#x@y"], {}, "version 'y', expected a number"),
        (["--prompt-template", "fog"], {}, "{classes}"),
        ([], {"classes": None}, "--classes: expected the classes of the masks"),
        ([], {"classes": "car, Car"}, "--classes: class name 'Car' appears twice"),
        ([], {"classes": "absent.json"}, "--classes: absent.json"),
        ([], {"images": ["absent.png"]}, "no such mask: absent.png"),
    ],
)
def test_usage_errors_are_one_line_with_status_2(generate, options, arguments, message, capsys):
    assert generate(*options, **arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_unusable_masks_are_refused(generate, tmp_path, capsys):
    cases = {
        "unknown": (np.full((32, 32), 7, dtype=np.uint8), "ids [7] outside the class list"),
        "ignored": (np.full((32, 32), 255, dtype=np.uint8), "every pixel is ignored"),
        "odd": (np.zeros((31, 32), dtype=np.uint8), "31 x 32 pixels, expected multiples of 4"),
    }
    for name, (values, message) in cases.items():
        write_mask(tmp_path / f"{name}.png", values)
        assert generate(images=[str(tmp_path / f"{name}.png")]) == 1
        assert message in capsys.readouterr().err
    Image.new("RGB", (32, 32)).save(tmp_path / "colour.png")
    assert generate(images=[str(tmp_path / "colour.png")]) == 1
    assert "a mask of mode RGB" in capsys.readouterr().err


def test_no_mask_is_overwritten(generate, masks, tmp_path, capsys):
    write_mask(tmp_path / "one_1.png", block_mask(1))
    write_mask(tmp_path / "one_1_label.png", block_mask(1))
    write_mask(tmp_path / "sheet.png", block_mask(1))
    for name in ("one_1.png", "one_1_label.png", "sheet.png"):
        assert generate(images=[masks[0], str(tmp_path / name)], out=tmp_path) == 2
        assert f"{name} is a mask and would be overwritten" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    write_mask(tmp_path / "other" / "one.png", block_mask(1))
    assert generate(images=[*masks, str(tmp_path / "other" / "one.png")]) == 2
    assert "2 masks are called 'one'" in capsys.readouterr().err


def test_classes_from_a_file_and_another_size(generate, tmp_path):
    write_classes(tmp_path / "classes.json", SPACE)
    assert generate("--size", "16x24", "--no-regions", classes=str(tmp_path / "classes.json")) == 0
    with Image.open(tmp_path / "out" / "two_0.png") as image:
        assert image.size == (24, 16)
    assert read_mask(tmp_path / "out" / "two_0_label.png").shape == (16, 24)
