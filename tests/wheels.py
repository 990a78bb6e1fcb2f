"""Other people's packages for the suites that need them: unpacked under build/versions/, never installed into the environment.

Wheels come from the package index.  They are Python, but for libraries that are not needed, so those for Python 3.12 run on 3.11 too.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / "build/versions"
INSTALLED = version("megatron-core")
VERL = ("verl==0.9.1", "tensordict==0.15.3", "ray==2.60.0", "msgpack==1.2.4", "pyvers==0.2.3", "codetiming==1.4.0", "orjson==3.13.0")


def fetch_megatron(number: str) -> Path | None:
    """The unpacked wheel of a megatron-core; None for the one that is installed."""
    if number == INSTALLED:
        return None
    folder = CACHE / f"megatron-core-{number}"
    if not folder.exists():
        wheels = CACHE / "wheels"
        platforms = [f"--platform=manylinux_2_{minor}_{platform.machine()}" for minor in (24, 28)]
        _pip("download", "--no-deps", "--only-binary=:all:", "--python-version=3.12", *platforms, f"--dest={wheels}", f"megatron-core=={number}")
        with zipfile.ZipFile(next(wheels.glob(f"megatron_core-{number}-*.whl"))) as wheel:
            wheel.extractall(unfinished := folder.with_suffix(".part"))
        unfinished.rename(folder)
    return folder


def fetch_packages(*packages: str) -> Path:
    """A folder with them in it, without what they depend on; named after the first, 'name==version'."""
    folder = CACHE / packages[0].replace("==", "-")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        _pip("install", "--no-deps", f"--target={folder}.part", *packages)
        shutil.rmtree(f"{folder}.part/tests", ignore_errors=True)  # verl brings a package of that name, which would hide ours
        Path(f"{folder}.part").rename(folder)
    return folder


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True, timeout=600)
