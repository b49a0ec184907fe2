"""The table of roles."""

import dataclasses
import typing

import pytest

from loraseg.library.card import Role
from loraseg.train.manifest import TrainingManifest
from loraseg.train.roles import ROLES


def test_every_role_of_a_card_can_be_trained():
    assert set(ROLES) == set(typing.get_args(Role))
    assert {name: role.task.role for name, role in ROLES.items()} == {name: name for name in ROLES}


@pytest.mark.parametrize("name", ROLES)
def test_a_row_fits_task_job_and_manifest(name):
    role = ROLES[name]
    assert role.named_recipe(role.default_recipe).name == role.default_recipe
    job = role.load_job()
    assert all(callable(getattr(job, method)) for method in ("prepare", "plan", "run"))
    fields = {field.name for field in dataclasses.fields(TrainingManifest)}
    assert set(role.manifest_fields) <= fields
