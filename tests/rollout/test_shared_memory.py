"""Files of weights in shared memory: whose are removed, and which of them an engine reads.  No vLLM is needed."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_plugin.rollout.transports.shm import PREFIX, SharedMemory, received, shared_folder

ROOT = Path(__file__).parents[2]

SENDER = """
import os, sys
from megatron_plugin.rollout.transports.shm import SharedMemory
transport = SharedMemory(sys.argv[1])
transport.start_bucket(64)
print(transport.path.name, flush=True)
sys.stdin.read()
"""


def _sender(folder):
    """Another trainer, in the midst of a bucket."""
    process = subprocess.Popen([sys.executable, "-c", SENDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return process, folder / process.stdout.readline().strip()


def test_files_of_killed_trainers_are_removed_and_no_others(tmp_path):
    """A process id is no sign of life: containers that share /dev/shm do not share those; so this file bears one that nobody has here."""
    nobody = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True).stdout.strip()
    process, path = _sender(tmp_path)
    live = path.rename(tmp_path / f"{PREFIX}{nobody}-aa")
    left = tmp_path / f"{PREFIX}{os.getpid()}-bb"
    left.touch()
    (tmp_path / "other").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / f"{PREFIX}pipe")
    SharedMemory(tmp_path)
    assert live.exists() and not left.exists() and (tmp_path / "other").exists()
    process.kill()
    process.communicate()
    SharedMemory(tmp_path)
    assert not live.exists() and (tmp_path / "other").exists()


def test_a_new_file_that_is_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another trainer that starts in between finds no sign of life."""
    transport, lock, removed = SharedMemory(tmp_path), fcntl.flock, []

    def late(handle, how):
        if not removed:
            (found,) = tmp_path.iterdir()
            found.unlink()
            removed.append(found)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    transport.start_bucket(64)
    assert removed and transport.path.exists() and transport.path not in removed
    transport.close()


def test_only_a_bucket_of_the_shared_folder_is_read(tmp_path, monkeypatch):
    """The routes are open to whoever reaches the port: no path that he sends may lead elsewhere."""
    shared, secret = tmp_path / "shm", tmp_path / "secret"
    shared.mkdir()
    (secret / "deep").mkdir(parents=True)
    monkeypatch.setenv("MEGATRON_PLUGIN_SHM", str(shared))
    for folder in (shared, secret):
        (folder / f"{PREFIX}a").write_bytes(b"weights")
    (shared / "link").symlink_to(secret)
    (shared / f"{PREFIX}link").symlink_to(secret / f"{PREFIX}a")
    (shared / f"{PREFIX}folder").mkdir()
    (tmp_path / "same").symlink_to(shared)
    for path in (shared / f"{PREFIX}a", tmp_path / "same" / f"{PREFIX}a"):
        assert bytes(received(str(path), 7).tolist()) == b"weights"
    parents = (secret, shared / "link", shared / ".." / "secret", shared / "link" / "deep" / "..")
    for path in (*(parent / f"{PREFIX}a" for parent in parents), shared / f"{PREFIX}link", shared / "weights", f"{PREFIX}a", ""):
        with pytest.raises(ValueError, match=f"expected a file of weights called {shared}/{PREFIX}"):
            received(str(path), 7)
    for path, size, message in (("none", 7, "got no such file"), ("a", 8, "got 7 bytes, expected 8"), ("folder", 7, "got no file, expected")):
        with pytest.raises(ValueError, match=message):
            received(str(shared / f"{PREFIX}{path}"), size)
    assert not (shared / f"{PREFIX}none").exists(), "torch.from_file makes what is not there"
    assert SharedMemory().folder == shared, "trainer and engines must mean the same folder"


def test_the_default_folder(monkeypatch):
    monkeypatch.delenv("MEGATRON_PLUGIN_SHM", raising=False)
    assert shared_folder() == Path("/dev/shm")
