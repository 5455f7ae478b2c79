"""Train the demo's teacher again and write it as `teacher.pt`, in half precision: some ten minutes of one CPU core.

    python examples/demo_teacher.py [--out FOLDER] [--file FILE]

What is trained is printed as a command. The file is what its `best.pt` holds, with float16 in place of float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo import EXAMPLES, RECIPE, command

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path("runs/demo-teacher"))
parser.add_argument("--file", type=Path, default=EXAMPLES / "teacher.pt")
parser.add_argument("--epochs", type=int, default=20)
arguments = parser.parse_args()

options = ["--epochs", arguments.epochs, "--batch", 16, "--set", "student.width=0.1875", "--out", arguments.out]
command("train", "--recipe", RECIPE, "--seed", 0, *options)

content = torch.load(arguments.out / "best.pt", weights_only=True)
content["model"] = {k: v.half() if v.ndim == 4 else v for k, v in content["model"].items()}
torch.save(content, arguments.file)
print(f"written: {arguments.file} ({arguments.file.stat().st_size / 1e6:.2f} MB)")
