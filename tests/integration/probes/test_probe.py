"""The probe job on Ray: the report, a repeated run, and an error in the worker."""

import pytest

import jobs.probe as job
from loraseg import config as configuration
from loraseg.adapters.targets.layer_report_io import read_layer_report
from tests.tiny_training import write_domain
from tests.unit.train.tiny_generator import write_pipeline

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def run_job(*overrides):
    with pytest.raises(SystemExit) as exit_info:
        configuration.main(job.main, job.Config, list(overrides))
    return exit_info.value.code


def test_job_writes_the_report_once_and_reports_errors(tmp_path, capsys):
    output = tmp_path / "reports" / "fog.json"
    settings = [
        "method=gradient",
        f"base={write_pipeline(tmp_path / 'pipeline')}",
        f"data={write_domain(tmp_path / 'fog', 'fog')}",
        "images=2",
        "gradient.epochs=1",
        "gradient.learning_rate=1e-3",
        f"output={output}",
    ]
    assert run_job(*settings) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"{output}: written\n")
    report = read_layer_report(str(output))
    assert report.top(1)[0] in printed
    assert report.samples["images"] == 2
    written = output.read_bytes()
    assert run_job(*settings) == 0
    assert capsys.readouterr().out.endswith(f"{output}: probed before\n")
    assert output.read_bytes() == written
    assert run_job(*settings, "gradient.top=1000") == 2
    assert "top 1000, expected at most" in capsys.readouterr().err
