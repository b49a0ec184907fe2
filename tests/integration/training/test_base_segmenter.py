"""Fine-tuning a base with data on disk and the result in a bucket."""

import torch

from loraseg.data.transforms import AugmentConfig
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.train.base_segmenter import BaseRecipe, BaseTrainingTask, train_base
from loraseg.train.core.loop import LoopConfig


def test_the_result_in_a_bucket_is_that_of_a_folder(domains, tiny_models, tmp_path, s3_env):
    def train(output):
        recipe = BaseRecipe(
            batch_size=2,
            augment=AugmentConfig(crop=32, shortest_edge=(32,)),
            loop=LoopConfig(steps=2, clip_norm=1.0),
        )
        task = BaseTrainingTask(
            output=output, data=str(domains["fog"]), base=tiny_models["base"], recipe=recipe
        )
        return train_base(task)

    local, remote = (
        train(f"{folder}/bases/further.safetensors") for folder in (tmp_path, s3_env.uri)
    )
    assert remote.path.startswith("s3://")
    assert (remote.metrics, remote.skipped) == (local.metrics, False)
    weights = load_base(remote.path).model.state_dict()
    expected = load_base(local.path).model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert train(remote.path).skipped
