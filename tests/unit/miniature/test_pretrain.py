from pathlib import Path

import pytest

from loraseg.miniature import pretrain
from loraseg.miniature.models.catseg.training import CatsegTrainingConfig
from loraseg.miniature.models.clip.model import build_clip
from loraseg.miniature.models.generator.training import GeneratorTrainingConfig
from loraseg.miniature.models.weights_io import write_clip
from loraseg.miniature.pretrain import main, make_catseg
from loraseg.miniature.world.captions import tokenizer
from loraseg.segment.open_vocabulary.base import load_base


def test_the_written_catseg_is_a_base_with_its_own_vocabulary_and_pixel_statistics(tmp_path):
    write_clip(build_clip(tokenizer().vocab_size), tmp_path / "clip.safetensors")
    make_catseg(CatsegTrainingConfig(steps=1, scenes=2, batch=1), tmp_path)
    base = load_base(str(tmp_path / "catseg.safetensors"))
    assert base.tokenizer(["a zebra"]).tolist() == tokenizer()(["a zebra"]).tolist()
    assert base.prompt == "A photo of a {} in the scene"
    assert base.mean == pytest.approx((127.5,) * 3)
    assert base.std == pytest.approx((63.75,) * 3)
    assert base.model.config.grid == 16


def test_unknown_commands_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["unet"])
    assert "invalid choice: 'unet'" in capsys.readouterr().err


def test_judge_and_generator_are_trained_with_the_options_of_the_command(tmp_path, monkeypatch):
    calls = []
    for name in ("make_judge", "make_generator"):
        monkeypatch.setattr(
            pretrain, name, lambda *args, _name=name, **more: calls.append((_name, args, more))
        )
    options = ["--folder", str(tmp_path), "--steps", "7"]
    main(["judge", *options, "--seed", "3"])
    main(["generator", *options, "--device", "cuda", "--init", "earlier"])
    judge = GeneratorTrainingConfig(seed=3, judge_steps=7)
    generator = GeneratorTrainingConfig(steps=7, device="cuda", compiled=True)
    assert calls == [
        ("make_judge", (judge, tmp_path), {"processes": 1}),
        ("make_generator", (generator, tmp_path), {"init": Path("earlier"), "processes": 1}),
    ]


def test_figures_are_written_to_the_folder_of_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "check_generator", lambda folder, seed: {"seed": seed})
    main(["generator-gates", "--folder", str(tmp_path), "--seed", "2"])
    written = (tmp_path / "generator_gates.json").read_text()
    assert written == capsys.readouterr().out == '{\n "seed": 2\n}\n'
