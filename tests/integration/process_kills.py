"""Whom an accident kills, and what it remembers in a folder; Ray's workers import this by name."""

import os
import time

import psutil


def find_target(target, driver_file, driver_module):
    """Return the process to kill: this worker, its node's raylet, or the driver.

    None if it is gone; its number may be another's by now.
    """
    if target == "worker":
        return psutil.Process()
    number = os.getppid() if target == "node" else int(driver_file.read_text())
    # A worker is a child of its node's raylet, without which the node is lost to the cluster.
    words = "raylet" if target == "node" else driver_module
    try:
        process = psutil.Process(number)
        return process if words in " ".join(process.cmdline()) else None
    except psutil.NoSuchProcess:
        return None


def log_and_kill(process, target, when, folder):
    """Write a line into the folder's log, then kill the process if there is one."""
    deed = f"killed the {target} ({process.pid})" if process else "came too late"
    with (folder / "log").open("a") as log:
        log.write(f"{time.strftime('%H:%M:%S')} {deed} {when}\n")
    if process:
        process.kill()


def read_kill_log(folder):
    """Return a line for every strike that has happened."""
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def claim_once(folder, number):
    """Return whether strike ``number`` has not happened, and note that it does now."""
    try:
        (folder / f"strike{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
