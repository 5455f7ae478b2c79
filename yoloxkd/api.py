"""What a Python user types: `Trainer(...).fit()` and `Detector(...)`. Keyword names are the command line's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from yoloxkd.assembly.arguments import device_name, fraction, reference, references, whole_number, whole_size
from yoloxkd.assembly.autobatch import with_measured_batch
from yoloxkd.assembly.models import CheckpointFiles, open_model
from yoloxkd.assembly.prediction import default_size, measure_split, one_input
from yoloxkd.assembly.recipes import resolve
from yoloxkd.assembly.run import (
    LastCheckpoint,
    check_out,
    check_size,
    fetch_weights,
    new_run_folder,
    newest_run,
    prepare,
    read_resume,
    unfinished_before_restart,
)
from yoloxkd.assembly.run_callbacks import check_objects
from yoloxkd.assembly.run_paths import check_run_paths, check_teachers
from yoloxkd.config.load import read_yaml, validate
from yoloxkd.config.quantization import Quantization
from yoloxkd.config.recipe import MOST_BATCH, MOST_WORKERS, Recipe, ValSection
from yoloxkd.data.augment.transforms import up_to_multiple
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.io.given_images import given_images
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.data.worker_death import refuse_while_starting
from yoloxkd.distributed import comm
from yoloxkd.engine.device import choose_device
from yoloxkd.engine.evaluate import EvalResult, TorchPredictor
from yoloxkd.engine.events import Callback
from yoloxkd.errors import UserError
from yoloxkd.exporters import EXPORTERS, check_format
from yoloxkd.exporters.calibration import calibration_images
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe
from yoloxkd.exporters.runtime import RUNTIMES, OnnxPredictor
from yoloxkd.exporters.target import export_target
from yoloxkd.file_kinds import is_onnx
from yoloxkd.nn.detector import Detector as Network
from yoloxkd.types import Detections, ImageSize, Predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What a finished run leaves: the metrics of its best student (keys of metrics.json), that student, the folder."""

    metrics: dict[str, Any]
    best: Path
    out: Path


class Trainer:
    """One training run, checked when constructed and trained by `fit()`.

    student, teacher, kd, data, epochs, batch, imgsz, device, amp, seed, deterministic, workers, out, recipe, resume: as on
    the command line (batch takes "auto" too); teacher and kd take one name or a list. `set` maps dotted recipe keys to values ({"kd.alpha": 0.1}), and
    `callbacks` are objects with the methods of `yoloxkd.engine.events.Callback`. In a script that torchrun has started,
    construct it in every process.
    """

    def __init__(
        self,
        student: str | None = None,
        teacher: str | Sequence[str] | None = None,
        kd: str | Sequence[str] | None = None,
        data: str | None = None,
        epochs: int | None = None,
        batch: int | str | None = None,
        imgsz: ImageSize | None = None,
        device: str | int | torch.device | None = None,
        amp: str | None = None,
        seed: int | None = None,
        deterministic: bool | None = None,
        workers: int | None = None,
        out: str | Path | None = None,
        recipe: str | None = None,
        resume: str | Path | None = None,
        set: Mapping[str, Any] | Sequence[str] = (),
        callbacks: Sequence[Callback] = (),
        console: Console | None = None,
    ) -> None:
        options = {
            "data": data,
            "epochs": epochs,
            "batch": batch,
            "imgsz": imgsz,
            "device": None if device is None else device_name(device),
            "amp": amp,
            "seed": seed,
            "deterministic": deterministic,
            "workers": workers,
        }
        refuse_while_starting()
        self.callbacks, self.console = check_objects(callbacks), console
        references(student=student, teacher=teacher, kd=kd, data=data, out=out, recipe=recipe, resume=resume)
        comm.init_process_group()
        self._checkpoint: LastCheckpoint | None = None
        self._files = CheckpointFiles()
        self._notes: list[str] = []
        with comm.peer_errors(), comm.all_or_none():
            if resume is not None:
                alone = options | {"data": None, "student": student, "teacher": teacher, "kd": kd}
                _alone_with_resume(**alone, recipe=recipe, out=out, set=set or None)
                self.recipe, self.out, self._checkpoint = read_resume(str(resume), data)
            elif (own := unfinished_before_restart(out)) is not None:
                self.recipe, self.out, self._checkpoint = read_resume(str(own))
                self._notes.append(f"restarted by torchrun: the run in {own} goes on from its last checkpoint")
            else:
                teachers, methods = _list(teacher) or (), _list(kd)
                self.recipe = resolve(
                    student=student,
                    teacher=teachers,
                    kd=methods,
                    recipe=recipe,
                    sets=set,
                    files=self._files,
                    **options,
                )
                self.out = Path(out) if out is not None else new_run_folder(self.recipe)
                check_out(self.out)
                check_run_paths(self.recipe, self.out, [recipe])
                self._notes += check_teachers(self.recipe)
            choose_device(self.recipe.engine.device)
        self.out = Path(comm.broadcast(str(self.out)))
        run = self._checkpoint.saved.run if self._checkpoint else None
        comm.check_alike(
            (run and run.epoch, run and run.step_in_epoch, repr(self.recipe)),
            f"the processes do not find the same run in {self.out}: that folder must be on storage that all machines share",
        )

    def fit(self) -> FitResult:
        """Train; returns when the last epoch is done and metrics.json is written."""
        with comm.peer_errors():
            with comm.all_or_none(), comm.local_main_first():
                fetch_weights(self.recipe)
            if self.recipe.train.measure_batch:
                self.recipe, reason = with_measured_batch(self.recipe, self._files)
                self._notes.append(reason)
            with comm.all_or_none():
                fit = prepare(
                    self.recipe,
                    self.out,
                    resume=self._checkpoint,
                    callbacks=self.callbacks,
                    console=self.console,
                    notes=self._notes,
                    files=self._files,
                )
            state = fit.run()
            metrics = comm.broadcast(dict(state.extra.get("best_metrics", state.metrics)))
        return FitResult(metrics, self.out / "best.pt", self.out)


class Detector:
    """A trained detector: a run's best.pt or last.pt, an official checkpoint, a model name, or an exported .onnx.

    model   left out: the best student of the newest run under runs/
    device  cpu, cuda, a CUDA index or a torch.device, left out: CUDA if there is one; an .onnx runs on the CPU, by ONNX Runtime or, with `openvino`, by OpenVINO
    """

    imgsz: ImageSize

    def __init__(self, model: str | Path | None = None, device: str | int | torch.device | None = None) -> None:
        self.source = reference("the model", model) if model is not None else str(newest_run())
        device = "auto" if device is None else device_name(device)
        if "," in device:
            raise UserError(f"--device {device}: a model runs on one device here; several are for training")
        self.onnx = self.source.lower().endswith(".onnx") or is_onnx(self.source)
        by_runtime = self.onnx and device in RUNTIMES
        self.device = choose_device("cpu" if by_runtime else device)
        if self.onnx:
            self._runtime = runtime = OnnxPredictor(self.source, runtime=device if by_runtime else "onnxruntime")
            self.names, self.stride, self.imgsz = runtime.names, runtime.stride, runtime.imgsz
            self.pad_value = runtime.pad_value
        else:
            self._opened = open_model(self.source)
            if not self._opened.report.complete:
                logger.warning("%s: %s", self.source, self._opened.report.describe())
            detector = self._opened.detector.to(self.device)
            self.names, self.stride = list(detector.names), detector.size_multiple
            self.imgsz = self._opened.weights.imgsz or default_size(self._opened.name)
            self.pad_value = detector.spec.input.pad_value

    def predict(
        self, images: Any, conf: float = 0.25, iou: float = 0.65, imgsz: ImageSize | None = None
    ) -> list[Detections]:
        """Detections of each image, boxes in px of that image; an empty list of images gives an empty list.

        images  files, PIL images, arrays (h, w, 3) uint8 RGB, tensors (3, h, w) uint8 RGB, one or several: all that is
                taken is listed at `data.given_images`
        conf, iou   least score and NMS IoU threshold, 0 to 1
        """
        predictor = self._predictor(fraction("conf", conf), fraction("iou", iou), ValSection().max_det)
        size = self.size(imgsz)
        out = []
        for pixels in given_images(images):
            tensor, meta = one_input(pixels, size, predictor)
            out.append(predictor(tensor)[0].to_image(meta))
        return out

    def __call__(
        self, images: Any, conf: float = 0.25, iou: float = 0.65, imgsz: ImageSize | None = None
    ) -> list[Detections]:
        """As `predict`."""
        return self.predict(images, conf, iou, imgsz)

    def train(self, **options: Any) -> FitResult:
        """Go on training this model on a data set, alone or under a teacher; this object itself stays as it is.

        Args:
            **options: those of `Trainer` except `student` and `resume`: data, teacher, kd, epochs, out, ...

        Returns:
            What `Trainer(...).fit()` does: the metrics, the file of the best student, the run's folder.

        Raises:
            UserError: this is an exported file, or as `Trainer`.

        Example:
            fit = Detector("yolox-nano").train(data="my.yaml", teacher="teacher.pt", kd="pgd", epochs=30)
            detector = Detector(fit.best)
        """
        if self.onnx:
            raise UserError(f"{self.source} is an exported file, which cannot be trained; give its checkpoint")
        if clash := [name for name in ("student", "resume") if options.get(name) is not None]:
            raise UserError(f"Detector.train trains this model: leave out {', '.join(clash)}, or use Trainer(...)")
        named = "@" not in self.source and not Path(self.source).is_file()
        return Trainer(student=f"{self.source}@coco" if named else self.source, **options).fit()

    def val(
        self,
        data: str,
        split: str = "val",
        batch: int = 16,
        imgsz: ImageSize | None = None,
        workers: int = 2,
        **options: Any,
    ) -> dict[str, Any]:
        """The keys of metrics.json on a split of a data set; `options` are the recipe's val keys (conf, iou, backend, ...)."""
        return self.evaluate(data, split, batch, imgsz, workers, **options).metrics

    def evaluate(
        self,
        data: str,
        split: str = "val",
        batch: int = 16,
        imgsz: ImageSize | None = None,
        workers: int = 2,
        **options: Any,
    ) -> EvalResult:
        """As `val`, with the detections and the time as well."""
        data = reference("data", data)
        settings = validate(ValSection, {"split": split} | options, "settings of an evaluation", prefix="val.")
        batch, workers = whole_number("batch", batch, 1, MOST_BATCH), whole_number("workers", workers, 0, MOST_WORKERS)
        split_data = load_split(find_data(data), split)
        refuse_shortage(shortages(split_data, imgsz=None), logger.warning)
        predictor = self._predictor(settings.conf, settings.iou, settings.max_det)
        size = self.size(imgsz, settings.rect)
        return measure_split(predictor, split_data, size, batch, workers, settings)

    def export(
        self,
        path: str | Path | None = None,
        nms: bool = True,
        dynamic: bool = False,
        imgsz: ImageSize | None = None,
        half: bool = False,
        int8: bool = False,
        calib: str | None = None,
        verify: str | None = None,
        format: str = "onnx",
        say: Any = print,
        **options: Any,
    ) -> Path:
        """Write an ONNX file that is proven to detect what this model detects; GateError and no file otherwise.

        calib    for int8: a folder of images, or a data set whose train split is calibrated on
        verify   data set whose validation images the two are compared on; None: the run's own, else `shapes`
        options  of int8, as in `config.quantization.Quantization`: method, float_layers, sensitivity, ...
        """
        if self.onnx:
            raise UserError(f"{self.source} is an exported file already; export needs the checkpoint it came from")
        path = None if path is None else reference("the file to export to", path)
        target = export_target(path, self.source, self._opened.weights.path)
        size = self.size(imgsz)
        if isinstance(size, tuple):
            raise UserError(
                f"{self.source} was trained at a short side of {size[0]} and a long side of {size[1]} px, and an exported "
                f"file is meant for one square size: give --imgsz N, such as {up_to_multiple(size[0], self.stride)}"
            )
        recipe = self._int8_recipe(int8, calib, size, options)
        return EXPORTERS[check_format(format)](
            self._opened.detector.cpu(),
            target,
            ExportOptions(imgsz=size, nms=nms, dynamic=dynamic, half=half, int8=int8),
            data=self._verification(verify),
            int8=recipe,
            source_digest=self._opened.weights.digest,
            say=say,
        )

    def _int8_recipe(self, int8: bool, calib: str | None, size: int, options: dict[str, Any]) -> Int8Recipe | None:
        if not int8:
            given = [name for name, value in {"calib": calib, **options}.items() if value is not None]
            if given:
                raise UserError(f"{', '.join(given)}: these belong to int8; add --int8 or leave them out")
            return None
        settings = validate(Quantization, options, "options of int8", prefix="export.")
        if calib is None:
            raise UserError("--int8 needs --calib DATA: a data set or a folder of images like those it will see")
        return Int8Recipe(calibration_images(calib, size, self.pad_value, settings.images), settings)

    def _verification(self, verify: str | None) -> DetectionData:
        """Validation images of the given data set, else of the run this checkpoint lies in, else of `shapes`."""
        if verify is not None:
            return load_split(find_data(verify), "val")
        own = self._own_data()
        if own is not None:
            try:
                return load_split(find_data(own), "val")
            except UserError:
                pass  # the run's data are not here any more
        return load_split(find_data("shapes"), "val")

    def _own_data(self) -> str | None:
        """The data set of the run that this checkpoint lies in."""
        recipe = Path(self.source).parent / "recipe.yaml"
        data = read_yaml(recipe).get("data") if recipe.is_file() else None
        return data if isinstance(data, str) and data else None

    def size(self, imgsz: ImageSize | None = None, rect: bool = False) -> ImageSize:
        """The input size (px) of a prediction: the one asked for, else the model's own. UserError: it cannot be."""
        size = self.imgsz if imgsz is None else whole_size(imgsz)
        check_size(size, self.stride)
        if self.onnx and not self._runtime.dynamic_size:
            if rect or isinstance(size, tuple):
                raise UserError(
                    f"{self.source} takes inputs of {self.imgsz}x{self.imgsz} px alone; for inputs of other shapes "
                    "export it again with --dynamic"
                )
            if size != self.imgsz:
                raise UserError(f"{self.source} was exported for {self.imgsz} px; export it again with --imgsz {size}")
        return size

    @property
    def network(self) -> Network[Any, Any]:
        """The PyTorch model. UserError: an exported file has none."""
        if self.onnx:
            raise UserError(f"{self.source} is an exported file; the PyTorch model is in its checkpoint")
        return self._opened.detector

    @property
    def weights_file(self) -> Path:
        """The file the model came from."""
        return Path(self.source) if self.onnx else self._opened.weights.path

    @property
    def precision(self) -> str:
        """fp32, or what an exported file says."""
        return self._runtime.metadata.get("precision", "fp32") if self.onnx else "fp32"

    def _predictor(self, conf: float, iou: float, max_det: int) -> Predictor:
        if self.onnx:
            return self._runtime.tuned(conf, iou, max_det)
        return TorchPredictor(self._opened.detector, conf=conf, iou=iou, max_det=max_det, device=self.device)


def _alone_with_resume(**arguments: object) -> None:
    """UserError: something else is given beside `resume`."""
    if clash := [name for name, value in arguments.items() if value is not None]:
        raise UserError(f"--resume continues a run as it was started; leave out --{', --'.join(clash)}")


def _list(value: str | Sequence[str] | None) -> list[str] | None:
    return None if value is None else [value] if isinstance(value, str) else list(value)


__all__ = ["Detector", "FitResult", "Recipe", "Trainer"]
