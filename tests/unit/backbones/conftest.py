"""Pipelines saved once per module."""

import logging
import shutil

import pytest

from tests.unit.tiny_diffusion import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folders = {}
    for kind, pipeline in (("sd", tiny_sd("v_prediction")), ("sdxl", tiny_sdxl())):
        folders[kind] = tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a pipeline that a test can modify."""
    return shutil.copytree(saved["sd"], tmp_path / "pipeline")
