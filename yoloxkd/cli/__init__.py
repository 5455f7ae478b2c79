"""Command line: parses, calls the api, prints. torch is imported only by commands that need it."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TYPER_USE_RICH", "0")  # plain help: a third of the start-up time

import typer

from yoloxkd.cli import data as data_commands
from yoloxkd.cli import kd_checking, screen, verifying
from yoloxkd.cli.doctor_command import doctor
from yoloxkd.cli.explain_command import explain
from yoloxkd.cli.study_command import study
from yoloxkd.cli.versions import version_lines
from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError
from yoloxkd.exporters import EXPORTERS, RUNTIMES, check_format, listed
from yoloxkd.file_kinds import parts_of
from yoloxkd.kd import DISTILLERS
from yoloxkd.nms_defaults import IOU, PREDICT_CONF
from yoloxkd.nn import DETECTORS

# typer carries its own click or imports the other: the base class of its public exception is the right one in both
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a detector under the guidance of a better one, and export it as a file proven to be the same model.",
)

app.add_typer(data_commands.app, name="data")


def _models() -> list[str]:
    """Names of the architectures, a family's sizes in braces: `yolox-{l,m,nano}`."""
    sizes: dict[str, list[str]] = {}
    for name in cfg_names("models"):
        family = max((family for family in DETECTORS if name.startswith(f"{family}-")), key=len)
        sizes.setdefault(family, []).append(name.removeprefix(f"{family}-"))
    return [f"{family}-{{{','.join(each)}}}" for family, each in sizes.items()]


ModelArgument = Annotated[
    str | None, typer.Argument(help="Model name, checkpoint or exported file. Default: best of the newest run.")
]
DataOption = Annotated[str | None, typer.Option(help="Data YAML, name, or built-in 'shapes' or 'shapes-easy'.")]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help=f"cpu, cuda or a CUDA index; for an exported file {' or '.join(RUNTIMES)}. Default: CUDA when there is one."
    ),
]
SizeOption = Annotated[int | None, typer.Option(help="Input size in px, a multiple of the stride.")]
KDOption = Annotated[
    list[str] | None,
    typer.Option(
        help=f"none, {', '.join(DISTILLERS)}, or METHOD@SET; may be repeated. Default: pgd with a teacher. "
        "tadf, chen and mimic are readings of papers without code; docs/method-notes.md lists their unchecked weights."
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="int8",
        help="Train a trained --student for int8, best with the same file as --teacher: a short schedule over the recipe "
        "beside it.",
    ),
]
ResumeOption = Annotated[
    str | None,
    typer.Option(
        help="Continue an interrupted run: its folder or last.pt. Beside it only --data, where the data set has moved."
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write what the screen shows to this file.")]


@app.command()
def train(
    student: Annotated[
        str | None, typer.Option(help=f"Checkpoint to start from, or an architecture: {', '.join(_models())}.")
    ] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="NAME (its published weights) or checkpoint file.")] = None,
    kd: KDOption = None,
    data: DataOption = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="N|auto", help="Images a step, over all devices; auto: measure what fits.")
    ] = None,
    imgsz: SizeOption = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, a CUDA index, or one for each process: 0,1. Default: CUDA if any.")
    ] = None,
    amp: Annotated[
        str | None, typer.Option(help="off, bf16, fp16 or auto. Default: auto, which is half precision on CUDA.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes initial weights, sample order and augmentation.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same result every time on CUDA too; slower.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Loader processes.")] = None,
    quantize: QuantizeOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: a new one under runs/.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or file. Default: the student's own.")] = None,
    resume: ResumeOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any recipe key: a.b=value; may be repeated.")] = None,
) -> None:
    """Train a student, alone or under a teacher."""
    from yoloxkd.cli.launch import batch_size, is_lead

    images = batch_size(batch)
    from yoloxkd.api import Trainer

    fit = Trainer(
        student=student,
        teacher=teacher or None,
        kd=kd or None,
        data=data,
        epochs=epochs,
        batch=images,
        imgsz=imgsz,
        device=device,
        amp=amp,
        seed=seed,
        deterministic=deterministic or None,
        workers=workers,
        quantize=quantize,
        out=out,
        recipe=recipe,
        resume=resume,
        set=set_ or (),
    ).fit()
    if not is_lead():
        return
    from yoloxkd.cli.run_tables import metrics_table

    print(metrics_table(fit.metrics))
    print(f"best student: {fit.best}\nrun: {fit.out}")


@app.command()
def val(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Names, checkpoints, exported files. Default: best of the newest run."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="Data YAML, a name, or 'shapes'.")] = "coco",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    imgsz: SizeOption = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json and the detections (COCO results; .odgt for CrowdHuman)."),
    ] = None,
    json_file: JsonOption = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 2,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="val.conf, val.iou, val.max_det, val.rect, val.backend.")
    ] = None,
    errors: Annotated[
        bool,
        typer.Option("--errors", help="Error types (TIDE): what false positives and misses are, and cost in AP50."),
    ] = False,
) -> None:
    """Measure models on a data set: the COCO metrics, or CrowdHuman's on data of that format."""
    from yoloxkd.cli.evaluating import evaluate_models

    evaluate_models(
        models or [],
        data=data,
        split=split,
        batch=batch,
        imgsz=imgsz,
        device=device,
        workers=workers,
        sets=set_ or (),
        errors=errors,
        out=out,
        json_file=json_file,
    )


@app.command()
def predict(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] SOURCE...", help="Model, then images, folders, globs, videos, or a camera's number."
        ),
    ],
    conf: Annotated[float, typer.Option(min=0, max=1, help="Least score.")] = PREDICT_CONF,
    iou: Annotated[float, typer.Option(min=0, max=1, help="NMS IoU threshold.")] = IOU,
    imgsz: SizeOption = None,
    device: DeviceOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the drawn images and videos.")] = Path("runs/predict"),
    json_file: JsonOption = None,
    coco_file: Annotated[Path | None, typer.Option("--coco", help="Write COCO's result format to this file.")] = None,
    save_txt: Annotated[
        bool,
        typer.Option(
            "--save-txt", help="YOLO labels in OUT/labels/: 'class x y w h' a detection, of a mask its outline."
        ),
    ] = False,
    save_conf: Annotated[bool, typer.Option("--save-conf", help="With --save-txt: the score as last column.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="End at the first source that cannot be read, exit status 2, no results.")
    ] = False,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video or camera. Default: all.")] = None,
) -> None:
    """Detect objects on images, videos or a camera, and draw them.

    A source that cannot be read is named and left out: the others are done and all results are written, and the exit
    status is 1. No file is replaced that predict has not written.
    """
    if save_conf and not save_txt:
        raise UserError("--save-conf adds a column to what --save-txt writes; give --save-txt too")
    from yoloxkd.cli.predicting import PredictionOutputs, predict_files

    outputs = PredictionOutputs(out, json_file, coco_file, save_txt, save_conf, strict, max_frames)
    predict_files(arguments, conf=conf, iou=iou, imgsz=imgsz, device=device or "auto", outputs=outputs)


@app.command()
def export(
    model: ModelArgument = None,
    format_: Annotated[
        str, typer.Option("--format", help=f"File format: {', '.join(EXPORTERS)}; list: what is installed.")
    ] = "onnx",
    output: Annotated[Path | None, typer.Option(help="File to write. Default: beside the checkpoint.")] = None,
    imgsz: SizeOption = None,
    nms: Annotated[
        bool | None,
        typer.Option("--nms/--no-nms", help="Decoding and NMS in the graph (onnx alone), or decoding only."),
    ] = None,
    outputs: Annotated[str | None, typer.Option(help="detections, locations (--no-nms), or raw: head tensors.")] = None,
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="Any batch size, height and width (multiples of the stride).")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX' operators, 17 to 23. Default: 18.")] = None,
    half: Annotated[bool, typer.Option("--half", help="fp16 weights and arithmetic.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="int8 convolutions, calibrated on --calib or trained by --quantize.")
    ] = False,
    calib: Annotated[
        str | None, typer.Option(help="For int8: data set (its train split) or folder of images to calibrate on.")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(help="Data set to compare on. Default: the run's own, else shapes.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="For int8: export.sensitivity=true, export.float_layers, export.method, ..."),
    ] = None,
) -> None:
    """Export a model and prove that the file detects the same."""
    if format_ == "list":
        print(f"formats:  {listed(EXPORTERS)}\nruntimes: {listed(RUNTIMES)}".replace("), ", ")\n          "))
        return
    check_format(format_)
    from yoloxkd.api import Detector
    from yoloxkd.cli.run_tables import export_options

    options = export_options(set_ or ())
    path = Detector(model, "cpu").export(
        output,
        nms=nms,
        outputs=outputs,
        dynamic=dynamic,
        imgsz=imgsz,
        half=half,
        int8=int8,
        calib=calib,
        verify=verify,
        format=format_,
        opset=opset,
        **options,
    )
    print(f"written: {path} ({sum(part.stat().st_size for part in parts_of(path)) / 1e6:.2f} MB)")


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoints and exported files.")],
    data: Annotated[str, typer.Option(help="Data set that AP is measured on.")] = "shapes",
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    calib: Annotated[
        str | None, typer.Option(help="Data set or folder to calibrate int8 on; left out: no int8 row.")
    ] = None,
    imgsz: SizeOption = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed predictions of each variant.")] = 50,
    threads: Annotated[int | None, typer.Option(min=1, help="Measured besides 1. Default: all cores.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled/--no-compiled", help="A row by torch.compile.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Compare the variants of a model: PyTorch, compiled, ONNX in fp32, fp16 and int8: size, latency, AP."""
    from yoloxkd.cli.benching import bench as run_bench

    run_bench(
        models,
        data=data,
        split=split,
        calib=calib,
        imgsz=imgsz,
        runs=runs,
        threads=threads,
        compiled=compiled,
        json_file=json_file,
    )


@app.command()
def show(what: Annotated[str, typer.Argument(metavar="MODEL|RECIPE|FILE", help="What to look at.")]) -> None:
    """Print a model's size, strides and taps, and the resolved recipe."""
    from yoloxkd.cli.run_tables import describe

    print(describe(what))


@app.command()
def models() -> None:
    """List the models, their weights, and what is already on disk."""
    from yoloxkd.cli.run_tables import models_table

    print(models_table())


app.command()(verifying.verify)
app.command("kd-check")(kd_checking.kd_check)
app.command()(explain)
app.command()(study)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the versions that a bug report needs.")] = False,
) -> None:
    if version:
        print("\n".join(version_lines()))
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake becomes one sentence on stderr and its exit status."""
    screen.make_forgiving()
    status = run(arguments)
    if fault := screen.fault():
        print(f"yoloxkd: what the command says could not be written to stdout: {fault}", file=sys.stderr)
        status = status or 1
    sys.exit(status)


def run(arguments: list[str] | None = None) -> int:
    """As `main`, returning the exit status."""
    try:
        status: Any = app(arguments, prog_name="yoloxkd", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except UserError as error:
        from yoloxkd.cli.launch import devices_of, is_lead, launch, leave_together

        if devices := devices_of(error):
            return launch(devices, sys.argv[1:] if arguments is None else arguments)
        if is_lead() or not error.agreed:
            print(f"yoloxkd: {error}", file=sys.stderr, flush=True)
        if error.agreed:
            leave_together()
        return error.exit_code
    except UsageError as error:
        print(f"yoloxkd: {_sentence(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM or error.filename is None:
            raise
        print(f"yoloxkd: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("yoloxkd: interrupted", file=sys.stderr)
        return 130


_OF_THE_SYSTEM = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP)
"""What the system refuses for reasons outside the program; its own words and the path say all there is to say."""


def _sentence(error: Any) -> str:
    text = " ".join(error.format_message().split())
    return text[0].lower() + text[1:] + ("" if "--help" in text else " ('--help' lists what there is)")
