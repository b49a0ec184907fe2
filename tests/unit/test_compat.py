import subprocess
import sys


def test_open_clip_and_peft_import_in_a_fresh_process():
    code = (
        "from loraseg.compat import prepare_torchvision as p; p(); p(); "
        "import open_clip, peft, torchvision; print(open_clip.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
