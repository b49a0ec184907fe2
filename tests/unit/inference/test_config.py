import dataclasses

import pytest

from loraseg import config as configuration
from loraseg.batch.segment_images.config import SegmentImagesConfig
from loraseg.errors import ConfigError
from loraseg.evaluate.run import EvaluationConfig
from loraseg.inference.config import AdaptiveSegmenterConfig, SegmenterConfig
from loraseg.inference.selection import AdaptiveSettings
from loraseg.serving.config import ServiceConfig

JOB_CONFIGS = {
    SegmentImagesConfig: {"images": "i", "output": "o", "classes": ["a"], "library": "l"},
    ServiceConfig: {"libraries": {"m": "l"}},
    EvaluationConfig: {"library": "l", "output": "o", "domains": [{"name": "d", "data": "x"}]},
}


@pytest.mark.parametrize("cls", JOB_CONFIGS)
def test_configs_of_jobs_have_the_keys_of_the_segmenter_config(cls):
    config = configuration.build(cls, JOB_CONFIGS[cls])
    keys = configuration.to_dict(config)
    assert isinstance(config, SegmenterConfig)
    assert {field.name for field in dataclasses.fields(SegmenterConfig)} <= set(keys)
    assert configuration.build(cls, keys) == config


@pytest.mark.parametrize(
    ("cls", "digest"),
    [
        (SegmentImagesConfig, "1217e62269f9789ee965222aeda15917915308b0e49788cca6bbe54402d39ea2"),
        (ServiceConfig, "e2cb5544af2360f6d11656812cd8360caa09c2a099714d77bc856df3055e987d"),
    ],
)
def test_digests_of_configs_are_those_of_separately_declared_fields(cls, digest):
    """Computed when each config declared all its fields itself."""
    assert configuration.digest(configuration.build(cls, JOB_CONFIGS[cls])) == digest


def test_missing_settings_come_from_the_preset_of_the_encoder():
    assert SegmenterConfig().adaptive_settings() == AdaptiveSettings(k=2, temperature=0.04)
    config = AdaptiveSegmenterConfig(encoder="ViT-L-14/openai", k=3)
    assert config.adaptive_settings("uniform") == AdaptiveSettings(
        k=3, temperature=0.05, mode="uniform"
    )
    with pytest.raises(ConfigError, match="k: got 0, expected at least 1"):
        SegmenterConfig(k=0).adaptive_settings()
