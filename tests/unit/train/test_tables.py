"""The tables of the training job."""

from loraseg.train.tables import plan_table, result_table
from loraseg.train.tasks import TaskResult, TrainingPlan


def planned(name, *, published):
    return TrainingPlan(
        name=name, images=8, parameters=12345, steps=40, digest="d" * 64, published=published
    )


def test_the_plan_lists_new_published_and_broken_adapters():
    plans = [
        TrainingPlan(
            name="fog", images=8, parameters=12345, steps=40, digest="d" * 64, published=False
        ),
        TrainingPlan(
            name="rain", images=8, parameters=12345, steps=40, digest="e" * 64, published=True
        ),
        ("snow", "snow/classes.json: no such file"),
    ]
    header, fog, rain, snow = plan_table(plans, "1 CPU").splitlines()
    assert header.split() == ["adapter", "images", "parameters", "steps", "resources", "state"]
    assert "12,345" in fog
    assert fog.endswith("to be trained")
    assert rain.endswith("published, to be skipped")
    assert snow.endswith("broken: snow/classes.json: no such file")


def test_the_results_list_failures_with_their_reason():
    results = [
        TaskResult(
            name="fog",
            digest="ab" * 32,
            version=1,
            metrics={"miou": 0.5},
            skipped=False,
            resumed_from_step=20,
            seconds=1.5,
        ),
        ("snow", "DatasetError: snow/classes.json: no such file"),
    ]
    _, fog, snow = result_table(results).splitlines()
    assert fog.split() == ["fog", "published", "abababababab", "20", "1.5", "miou", "0.500"]
    assert snow.split()[:2] == ["snow", "failed"]
    assert snow.endswith("DatasetError: snow/classes.json: no such file")


def test_metrics_of_the_role_come_first():
    result = TaskResult(
        name="fog",
        digest="ab" * 32,
        version=1,
        metrics={"c": 0.3, "a": 0.1, "b": 0.2},
        skipped=False,
        resumed_from_step=0,
        seconds=1.5,
    )
    _, row = result_table([result], ("b", "absent")).splitlines()
    assert row.endswith("b 0.200  a 0.100  c 0.300")
