"""Run diffusers' own test suites on this package's classes: `python tests/outside/run.py CHECKOUT [pytest arguments]`.

CHECKOUT is a diffusers checkout with its tests. They are copied to a temporary folder, our subclasses beside them, and
nothing of them stays.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).parent


def main(checkout: Path, arguments: list[str]) -> int:
    if not (checkout / "tests" / "pipelines" / "testing_utils").is_dir():
        sys.exit(
            f"{checkout} has no tests/pipelines/testing_utils; give a diffusers checkout from August 2026 or later."
        )
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(checkout / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
        (tests / "cm_diffusers").mkdir()
        (tests / "cm_diffusers" / "__init__.py").touch()
        for file in HERE.glob("outside_*.py"):
            shutil.copyfile(file, tests / "cm_diffusers" / f"test_{file.name}")
        ours = os.pathsep.join(str(HERE.parents[1] / part) for part in ("src", "tests"))
        environment = os.environ | {"PYTHONPATH": ours, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cm_diffusers", *arguments]
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__.splitlines()[0])
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
