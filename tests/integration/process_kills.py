"""Which process a fault kills, and the log of kills in a folder; Ray's workers import this."""

import os
import time

import psutil


def find_target(target, driver_file, driver_module):
    """Return the process to kill: this worker, the raylet of its node, or the driver.

    None if it has exited; another process may have its id.
    """
    if target == "worker":
        return psutil.Process()
    process_id = os.getppid() if target == "node" else int(driver_file.read_text())
    # A worker is a child of the raylet of its node; without it the cluster loses the node.
    expected = "raylet" if target == "node" else driver_module
    try:
        process = psutil.Process(process_id)
        return process if expected in " ".join(process.cmdline()) else None
    except psutil.NoSuchProcess:
        return None


def log_and_kill(process, target, when, folder):
    """Append a line to the folder's log, then kill the process unless it has exited."""
    action = f"killed the {target} ({process.pid})" if process else "came too late"
    with (folder / "log").open("a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {action} {when}\n")
    if process:
        process.kill()


def read_kill_log(folder):
    """Return one line per kill."""
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def claim_once(folder, number):
    """Return True for the first call with this number by any process, False afterwards."""
    try:
        (folder / f"kill{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
