import pytest

from loraseg.miniature.captions import tokenizer
from loraseg.miniature.catseg_training import CatsegTraining
from loraseg.miniature.clip_model import build_clip
from loraseg.miniature.pretrain import main, make_catseg
from loraseg.miniature.weights_io import write_clip
from loraseg.segment.base import load_base


def test_the_written_catseg_is_a_base_with_its_own_words_and_pixels(tmp_path):
    write_clip(build_clip(tokenizer().vocab_size), tmp_path / "clip.safetensors")
    make_catseg(CatsegTraining(steps=1, scenes=2, batch=1), tmp_path)
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
