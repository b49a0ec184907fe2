"""Planning works with any source of conditions."""

import hashlib

from loraseg.batch.synthesize.conditions import ConditionRef, ConditionSource
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.batch.synthesize.plan import (
    PlanHistory,
    decode_plan,
    encode_plan,
    plan_units,
    scan_conditions,
)
from loraseg.data import LabelSpace
from loraseg.errors import DatasetError


class PromptSource:
    """Prompts as conditions; an empty prompt is invalid."""

    def __init__(self, prompts):
        self._prompts = prompts

    def label_space(self):
        return LabelSpace(("road", "car"))

    def list_conditions(self):
        return [ConditionRef(f"prompt {n}", "prompts.txt", n) for n in range(len(self._prompts))]

    def read_batches(self, refs):
        return [refs[:2], refs[2:]]

    def condition_id(self, ref):
        if not self._prompts[ref.row]:
            raise DatasetError("the prompt is empty")
        return hashlib.sha256(self._prompts[ref.row].encode()).hexdigest()


def test_prompts_are_planned_like_masks(tmp_path):
    source = PromptSource(["a road", "a car", "", "a road", "a road with a car"])
    assert isinstance(source, ConditionSource)
    assert isinstance(MaskSource(str(tmp_path)), ConditionSource)
    scanned = scan_conditions(source, source.list_conditions(), PlanHistory())
    assert [condition.reason for condition in scanned] == [
        *(None, None, "the prompt is empty", "the same ids as 'prompt 0'", None)
    ]
    units = list(plan_units(scanned, 4, 2, PlanHistory()))
    assert [unit.image_count for unit in units] == [8, 4, 0]
    assert str(units[2]) == "conditions 'prompt 3' to 'prompt 3'"
    history = PlanHistory()
    decode_plan(encode_plan(units), "plan", history)
    assert list(plan_units(scanned, 4, 2, history)) == []
    assert [unit.first_image for unit in plan_units(scanned, 5, 2, history)] == [4, 4]
