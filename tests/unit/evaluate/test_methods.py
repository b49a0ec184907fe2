import typing

from loraseg.evaluate.methods import METHODS, Method
from loraseg.inference.selection import AdapterMode


def test_table_holds_every_method_in_the_order_of_the_type():
    assert list(METHODS) == list(typing.get_args(Method))


def test_every_mode_of_inference_is_one_method():
    modes = [method.mode for method in METHODS.values() if method.mode is not None]
    assert sorted(modes) == sorted(typing.get_args(AdapterMode))


def test_every_method_names_its_paper():
    for method in METHODS.values():
        assert method.paper.url.startswith("https://arxiv.org/abs/")
        assert 0 < method.published_hmean < 1
