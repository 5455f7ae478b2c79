"""Check a release: build sdist and wheel, install the wheel with its extras in a clean environment, and use it from elsewhere.

    python scripts/check_release.py [--python PYTHON] [--work FOLDER] [--wheel FILE]

The wheel is built from the sdist. The commands are those of docs/start.md, at one epoch, and those whose files are meant for
others; then none of these files may hold a folder or the name of this machine. PyPI is needed; torch is the largest download.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "openvino,ncnn,tflite,executorch,tensorboard,wandb"
HOST = "the-host-that-trained-it"
"""What the commands are told is this machine's name; a short real one may stand by chance among the bytes of a picture."""
NAMED = f"""import os, platform, socket
names = list(os.uname())
names[1] = {HOST!r}
os.uname = lambda: os.uname_result(names)
platform.node = socket.gethostname = socket.getfqdn = lambda *name: {HOST!r}
"""
OF_THE_RUN_ITSELF = {"recipe.yaml", "environment.json", "train.log", "last.pt"}
"""Files of a run's folder that a resume and a bug report need with their paths; docs/runs.md says which."""

SMALL = "--epochs 1 --imgsz 96 --workers 0 --set teacher.min_ap=0 --set optim.lr_per_image=0.0001"
"""At the page's rate one epoch under a teacher that has had one epoch diverges."""
FOR_OTHERS = [
    "yoloxkd --version",
    "yoloxkd doctor",
    "yoloxkd val {work}/runs/student/best.pt {work}/runs/teacher/best.pt --data shapes --json two.json",
    "yoloxkd val {work}/runs/student/best.pt --data {work}/set/data.yaml --split val --out measured",
    "yoloxkd predict {work}/runs/student/best.pt photo.jpg --out drawn --coco coco.json --save-txt",
    "yoloxkd explain {work}/runs/student/best.pt --teacher {work}/runs/teacher/best.pt --data {work}/set/data.yaml --split val --count 1 "
    "--out seen",
    "yoloxkd data check {work}/set/data.yaml --json faults.json",
    "yoloxkd data stats {work}/set/data.yaml --out stats",
]
RIGHT = """
from yoloxkd import Detections, Detector, Trainer, __version__

def best(file: str) -> Detections:
    detector = Detector("best.pt")
    return detector(file, conf=0.5)[0]

version: str = __version__
fit = Trainer(student="yolox-nano", data="my.yaml", epochs=1).fit()
ap: float = fit.metrics["AP"]
"""
WRONG = 'from yoloxkd import Detector\n\nDetector("best.pt").predict("a.jpg", conf="high")\n'


def run(command: list[str], folder: Path, path: str = "") -> str:
    """Run a command in a folder; what it prints. It ends the check when it fails."""
    print(f"$ {shlex.join(command)}", flush=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PATH": f"{path}{os.pathsep}{environment['PATH']}"} if path else {}
    environment |= {"YOLOXKD_HOME": str(folder / "home"), "PYTHONPATH": str(folder / "host")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nexit status {done.returncode}")
    return done.stdout


def build(work: Path) -> Path:
    """Sdist and wheel, with what must be in them; the wheel."""
    python = str(environment(Path(sys.executable), work / "build") / "python")
    run([python, "-m", "pip", "install", "--quiet", "build"], work)
    run([python, "-m", "build", "--outdir", str(work / "dist"), str(ROOT)], work)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    (wheel,) = (work / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "Makefile",
        "constraints.txt",
        "docs/start.md",
        "examples/demo.py",
        "examples/demo.yaml",
        "examples/teacher.pt",
        "tests/conftest.py",
        "LICENSE",
        "CHANGELOG.md",
    ):
        assert name in inside, f"{sdist.name} has no {name}"
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    for name in ("yoloxkd/py.typed", "yoloxkd/cfg/models/yolox-nano.yaml", "yoloxkd/cfg/kd/fgd.yaml"):
        assert name in packed, f"{wheel.name} has no {name}"
    assert all(name.startswith("yoloxkd") for name in packed), f"{wheel.name} has more than the package"
    return wheel


def environment(python: Path, folder: Path) -> Path:
    """A new virtual environment; its folder of programs."""
    if not (folder / "bin").is_dir():
        subprocess.run([str(python), "-m", "venv", str(folder)], check=True)
    return folder / "bin"


def start_commands() -> list[str]:
    """The commands of docs/start.md, at toy size."""
    text = (ROOT / "docs" / "start.md").read_text("utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    yoloxkd ")]
    commands = [" ".join(shlex.split(line, comments=True)) for line in lines]
    assert len(commands) >= 5, "docs/start.md has lost its commands"
    size = re.compile(r"--(epochs|imgsz) \d+")
    return [f"{size.sub('', line)} {SMALL}" if line.startswith("yoloxkd train") else line for line in commands]


def use(programs: Path, elsewhere: Path) -> None:
    """Every command, from a folder that is not the repository, on a machine that is called `HOST`."""
    (elsewhere / "host").mkdir(exist_ok=True)
    (elsewhere / "host" / "sitecustomize.py").write_text(NAMED, "utf-8")
    python, path = str(programs / "python"), str(programs)
    code = "import cv2, numpy; cv2.imwrite('photo.jpg', numpy.full((90, 120, 3), 90, numpy.uint8))"
    run([python, "-c", code], elsewhere)
    for line in start_commands():
        run(shlex.split(line), elsewhere, path)
    run(shlex.split("yoloxkd data convert shapes --to coco --output set"), elsewhere, path)
    for line in FOR_OTHERS:
        run(shlex.split(line.format(work=elsewhere)), elsewhere, path)
    assert run(["yoloxkd", "--version"], elsewhere, path).startswith(f"yoloxkd {version()}\n")


def version() -> str:
    """The one place that holds it."""
    text = (ROOT / "yoloxkd" / "version.py").read_text("utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.M)
    return str(found)


def types(programs: Path, elsewhere: Path) -> None:
    """mypy, outside the repository, knows the package's types: right use passes, wrong use does not."""
    for name, text, status in (("right.py", RIGHT, 0), ("wrong.py", WRONG, 1)):
        (elsewhere / name).write_text(text, "utf-8")
        command = [str(programs / "mypy"), "--strict", "--ignore-missing-imports", name]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
        print(f"$ {shlex.join(command)}\n{done.stdout}", flush=True)
        assert done.returncode == status, done.stdout + done.stderr
    assert "arg-type" in done.stdout, done.stdout


def traces(elsewhere: Path) -> list[str]:
    """Files meant for others that hold a folder or the name of this machine."""
    words = {HOST, str(elsewhere), str(elsewhere.resolve()), str(ROOT), str(Path.home())} - {"/"}
    records = list(elsewhere.rglob("environment.json"))
    assert records, "no run left its environment.json"
    assert all(HOST in file.read_text("utf-8") for file in records), "the commands did not see the host's name"
    found = []
    for file in sorted(f for f in elsewhere.rglob("*") if f.is_file() and f.name not in OF_THE_RUN_ITSELF):
        if elsewhere / "home" in file.parents or file.suffix in (".py", ".pyc", ".jpg") or ".mypy_cache" in file.parts:
            continue
        content = file.read_bytes()
        found += [f"{file.relative_to(elsewhere)} holds {word}" for word in words if word.encode() in content]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python of the clean environment.")
    parser.add_argument("--work", type=Path, help="Folder to work in, kept. Default: a temporary one.")
    parser.add_argument("--wheel", type=Path, help="A wheel to check instead of building one.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="yoloxkd-release-") as temporary:
        work = (arguments.work or Path(temporary)).absolute()
        elsewhere = work / "elsewhere"
        elsewhere.mkdir(parents=True, exist_ok=True)
        wheel = (arguments.wheel or build(work)).absolute()
        programs = environment(arguments.python, work / "clean")
        asked = f"yoloxkd[{EXTRAS}] @ {wheel.as_uri()}"
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        run([str(programs / "python"), "-m", "pip", "install", "--quiet", *constraints, asked, "mypy"], work)
        use(programs, elsewhere)
        types(programs, elsewhere)
        found = traces(elsewhere)
        if found:
            sys.exit("\n".join(found))
        print(f"{wheel.name} holds: built, installed with {EXTRAS}, used, typed; no trace of this machine")


if __name__ == "__main__":
    main()
