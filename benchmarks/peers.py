"""What we measure ourselves against: published packages, installed into a folder of their own beside the benchmarks.

They come without their dependencies, so that both sides of a comparison run on the same torch, numpy and OpenCV. The
folder is last on the path: a peer sees our packages, and nothing of ours changes for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.metadata import distributions
from pathlib import Path

FOLDER = Path(os.environ.get("YOLOXKD_PEERS", Path(__file__).parent / ".peers"))
PEERS = {
    "pixeltable-yolox": "0.4.3",  # the maintained copy of the official YOLOX
    "ultralytics": "8.4.190",  # measured only
    "faster-coco-eval": "1.8.0",
    "pycocotools": "",  # one of our own dependencies: ours is the one measured
}
NEEDED_BY_PEERS = {"loguru": "0.7.3", "psutil": "7.2.2", "tabulate": "0.10.0"}


def use_peers() -> dict[str, str]:
    """Install what is missing, make it importable, and say which versions there are: {package: version}."""
    os.environ.setdefault("YOLO_CONFIG_DIR", str(FOLDER / "settings"))  # else ultralytics writes to the home folder
    wanted = {name: version for name, version in (PEERS | NEEDED_BY_PEERS).items() if version}
    missing = [f"{name}=={version}" for name, version in wanted.items() if installed().get(name) != version]
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--upgrade", "--target", str(FOLDER), *missing], check=True)
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"yolox\.")
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return {name: version for name, version in installed().items() if name in PEERS}


def installed() -> dict[str, str]:
    """{package: version} in the peers' folder."""
    return {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions(path=[str(FOLDER)])}
