"""Check a built wheel: what must be inside is inside, and it imports and finds its data away from the checkout.

Usage: `python scripts/check_wheel.py dist/lit_reason-0.1.0-py3-none-any.whl`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs with only the unpacked wheel in front of the installed dependencies, in a folder that is not the checkout.
PROBE = """
import importlib.resources, sys
import lit_reason, lit_kernels
from omegaconf import OmegaConf
for package in (lit_reason, lit_kernels):
    assert package.__file__.startswith(sys.argv[1]), f"{package.__name__} came from {package.__file__}"
conf = importlib.resources.files("lit_reason.conf")
assert conf.joinpath("lit_reason.yaml").is_file(), "lit_reason.conf has no lit_reason.yaml"
OmegaConf.create(conf.joinpath("lit_reason.yaml").read_text())
from lit_reason import zoo
assert zoo.list_models(), "the zoo is empty"
"""


def expected_files() -> set[str]:
    """Every Python file and YAML of the checkout under its name in the wheel, and the kernels' measured table."""
    python = [p.relative_to(ROOT) for p in (ROOT / "lit_reason").rglob("*.py") if "conf" not in p.parts]
    kernels = [p.relative_to(ROOT / "kernels") for ext in ("py", "json") for p in (ROOT / "kernels").rglob(f"*.{ext}")]
    conf = [Path("lit_reason") / p.relative_to(ROOT) for p in (ROOT / "conf").rglob("*.yaml")]
    return {p.as_posix() for p in (*python, *kernels, *conf)}


def main() -> int:
    wheel = Path(sys.argv[1]).resolve()
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        missing = sorted(expected_files() - names)
        if not any(name.endswith("/index.json") for name in names):
            missing.append("zoo/index.json (the shelf)")
        stray = sorted(name for name in names if name.startswith(("tests/", "kernels/", "scripts/")))
        if missing or stray:
            print(f"{wheel.name}: missing {missing}; should not be inside: {stray}", file=sys.stderr)
            return 1
        archive.extractall(folder)
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        done = subprocess.run([sys.executable, "-c", PROBE, folder], cwd=folder, env=env)
    if done.returncode == 0:
        print(f"{wheel.name}: {len(names)} files, imports and finds its data")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
