"""The source distribution of the installed PEFT, which contains PEFT's tests."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class SdistUnavailable(Exception):
    """No package index could be reached, or it does not hold the wanted version."""


def fetch_sdist(version: str, cache: Path) -> Path:
    """Return the folder of the unpacked sdist of `version`, downloading it with pip unless `cache` holds it."""
    target = cache / f"peft-{version}"
    if target.is_dir():
        return target

    cache.mkdir(parents=True, exist_ok=True)
    # The target appears in one rename, so an interrupted or concurrent run never leaves half of it.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command += ["--retries=1", "--no-deps", "--no-binary=peft", f"--dest={scratch}", f"peft=={version}"]
        download = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if download.returncode != 0 or len(archives) != 1:
            raise SdistUnavailable(f"pip could not download the sdist of peft=={version}: {download.stderr[-500:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")

        unpacked = Path(scratch) / f"peft-{version}"
        # The tests import each other relatively, so they are a package; the sdist leaves its (empty) marker out.
        (unpacked / "tests" / "__init__.py").touch()
        try:
            os.rename(unpacked, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first
                raise
    return target
