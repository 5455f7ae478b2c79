"""`Detector`: predict, evaluate, train on, export."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from yoloxkd.api.given_image import with_origin
from yoloxkd.api.keywords import known_keywords
from yoloxkd.api.trainer import FitResult, Trainer
from yoloxkd.assembly.arguments import device_name, fraction, reference, whole_number, whole_size
from yoloxkd.assembly.backends import open_backend
from yoloxkd.assembly.prediction import measure_split, one_input
from yoloxkd.assembly.run import (
    newest_run,
)
from yoloxkd.config.load import read_yaml, validate
from yoloxkd.config.quantization import Quantization
from yoloxkd.config.recipe import MOST_BATCH, MOST_WORKERS, ValSection
from yoloxkd.data.augment.transforms import up_to_multiple
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.engine.evaluate import EvalResult
from yoloxkd.errors import UserError, nearest
from yoloxkd.exporters import EXPORTERS
from yoloxkd.exporters.calibration import calibration_images
from yoloxkd.exporters.matching import Suppression
from yoloxkd.exporters.onnx import requested_options
from yoloxkd.exporters.parity import Int8Recipe
from yoloxkd.exporters.parity_report import TOLERANCES
from yoloxkd.exporters.runner import check_runner, refuse_difference
from yoloxkd.exporters.target import export_target
from yoloxkd.nms_defaults import IOU, MAX_DET, PREDICT_CONF
from yoloxkd.nn.detector import Detector as Network
from yoloxkd.nn.fake_quantization import quantized_layers
from yoloxkd.types import Detections, ImageSize

logger = logging.getLogger(__name__)


class Detector:
    """A trained detector, in PyTorch or as an exported file.

    Args:
        model: a run's `best.pt` or `last.pt`, an official checkpoint, a model name (its published weights), or an exported
            `.onnx`, `.param` (ncnn), `.tflite` or `.pte` (ExecuTorch). None: the best student of the newest run under `runs/`.
        device: `cpu`, `cuda`, a CUDA index or a `torch.device`. None: CUDA if there is one. An exported file runs on the
            CPU, by the runtime of its format; an `.onnx` by ONNX Runtime or, with `openvino`, by OpenVINO.

    Attributes:
        source: the model as it was given.
        names: class names, by label.
        stride: px; sides of an input are multiples of it.
        imgsz: px, the input size it was trained or exported for.
        device: where it computes.
        onnx: whether it is an exported file.

    Raises:
        UserError: there is no such model or device, or the file is of another kind.

    Example:
        >>> detector = Detector("best.pt")
        >>> for detection in detector("photo.jpg")[0]:
        ...     print(detection.name, round(detection.score, 2), detection.box)
        >>> ap = detector.val(data="my.yaml")["AP"]
        >>> file = detector.export("best.onnx")
    """

    @known_keywords
    def __init__(self, model: str | Path | None = None, device: str | int | torch.device | None = None) -> None:
        self.source = reference("the model", model) if model is not None else str(newest_run())
        name = "auto" if device is None else device_name(device)
        if "," in name:
            raise UserError(f"--device {name}: a model runs on one device here; several are for training")
        self._backend = open_backend(self.source, name)
        self.onnx, self.device = self._backend.exported, self._backend.device
        self.names, self.stride, self.imgsz = self._backend.names, self._backend.stride, self._backend.imgsz

    @known_keywords
    def predict(
        self, images: Any, conf: float = PREDICT_CONF, iou: float = IOU, imgsz: ImageSize | None = None
    ) -> list[Detections]:
        """Detect objects in images.

        Args:
            images: files, PIL images, arrays (h, w, 3) uint8 RGB, tensors (3, h, w) uint8 RGB; one or several. All that is
                taken is listed in `yoloxkd.data.io.given_images`.
            conf: least score of a detection, 0 to 1.
            iou: IoU threshold of NMS, 0 to 1.
            imgsz: input size in px. None: the model's own.

        Returns:
            Detections of each image, boxes in px of that image; they know where it is, for `plot()` and `save(path)`. No
            image gives an empty list.

        Raises:
            UserError: an image cannot be read, or the model cannot take inputs of this size.

        Example:
            >>> detections, others = Detector("best.pt").predict(["photo.jpg", "other.jpg"], conf=0.5)
            >>> labels = [detection.name for detection in detections]
        """
        predictor = self._backend.predictor(fraction("conf", conf), fraction("iou", iou), MAX_DET)
        size = self.size(imgsz)
        detections = []
        for pixels, origin in with_origin(images):
            tensor, meta = one_input(pixels, size, predictor)
            detections.append(predictor(tensor)[0].to_image(meta))
            detections[-1].image = origin
        return detections

    @known_keywords
    def __call__(
        self, images: Any, conf: float = PREDICT_CONF, iou: float = IOU, imgsz: ImageSize | None = None
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
            >>> fit = Detector("best.pt").train(data="my.yaml", teacher="teacher.pt", kd="pgd", epochs=2)
            >>> detector = Detector(fit.best)
        """
        self._backend.opened(", which cannot be trained; give its checkpoint")
        if clash := [name for name in ("student", "resume") if options.get(name) is not None]:
            raise UserError(f"Detector.train trains this model: leave out {', '.join(clash)}, or use Trainer(...)")
        is_model_name = "@" not in self.source and not Path(self.source).is_file()
        return Trainer(student=f"{self.source}@coco" if is_model_name else self.source, **options).fit()

    def val(
        self,
        data: str,
        split: str = "val",
        batch: int = 16,
        imgsz: ImageSize | None = None,
        workers: int = 2,
        **options: Any,
    ) -> dict[str, Any]:
        """Metrics on a split of a data set, under the keys of `metrics.json`; otherwise as `evaluate`."""
        return self.evaluate(data, split, batch, imgsz, workers, **options).metrics

    def evaluate(
        self,
        data: str,
        split: str = "val",
        batch: int = 16,
        imgsz: ImageSize | None = None,
        workers: int = 2,
        errors: bool = False,
        **options: Any,
    ) -> EvalResult:
        """Evaluate on a split of a data set.

        Args:
            data: data YAML, the name of a shipped one, or `shapes`.
            split: which split.
            batch: images a step.
            imgsz: input size in px. None: the model's own.
            workers: loader processes.
            errors: whether the metrics have the error types, under `errors` (`yoloxkd.metrics.coco.error_types`).
            **options: keys of the recipe's `val` section: conf, iou, max_det, backend, rect, ...

        Returns:
            Metrics, detections and time.

        Raises:
            UserError: the data set or an option cannot be used.

        Example:
            >>> result = Detector("best.pt").evaluate("my.yaml", split="test", backend="pycocotools")
            >>> ap50 = result.metrics["AP50"]
        """
        data = reference("data", data)
        settings = validate(ValSection, {"split": split} | options, "settings of an evaluation", prefix="val.")
        batch, workers = whole_number("batch", batch, 1, MOST_BATCH), whole_number("workers", workers, 0, MOST_WORKERS)
        split_data = load_split(find_data(data), split, masks=self._backend.masks)
        if self._backend.masks and split_data.masks is None:
            logger.warning("the split '%s' of %s has no instance masks: boxes alone are measured", split, data)
        refuse_shortage(shortages(split_data, imgsz=None), logger.warning)
        predictor = self._backend.predictor(settings.conf, settings.iou, settings.max_det)
        size = self.size(imgsz, settings.rect)
        return measure_split(predictor, split_data, size, batch, workers, settings, errors)

    def export(
        self,
        path: str | Path | None = None,
        nms: bool | None = None,
        dynamic: bool = False,
        imgsz: ImageSize | None = None,
        half: bool = False,
        int8: bool = False,
        calib: str | None = None,
        verify: str | None = None,
        format: str = "onnx",
        say: Callable[[str], None] | None = print,
        outputs: str | None = None,
        opset: int | None = None,
        **options: Any,
    ) -> Path:
        """Write a file that is proven to detect what this model detects.

        Args:
            path: the file. None: beside the checkpoint.
            nms: whether NMS is in the graph. None: in an ONNX file, if `outputs` does not say otherwise.
            dynamic: whether the file takes any batch and input size.
            imgsz: input size in px. None: the model's own.
            half: fp16 convolutions.
            int8: int8 convolutions.
            calib: for int8: a folder of images, or a data set whose train split is calibrated on; not for a model trained
                with `quantize`, which has its ranges.
            verify: data set whose validation images the two are compared on. None: the run's own, else `shapes`.
            format: a name in `yoloxkd.exporters.EXPORTERS`.
            say: takes each line of the comparison; None: nobody does.
            outputs: what the file gives: `detections` (after NMS), `locations` (boxes and scores before it) or `raw` (the
                head's own tensors, level by level). None: as `nms` says; of other formats than ONNX, `raw`.
            opset: version of ONNX' operators, 17 to 23, of an ONNX file. None: 18.
            **options: of int8, as in `config.quantization.Quantization`: method, float_layers, sensitivity, ...

        Returns:
            The file.

        Raises:
            GateError: the file differs from the model; it is not kept under its name.
            UserError: this is an exported file already, or an option cannot be used.

        Example:
            >>> file = Detector("best.pt").export("dynamic.onnx", dynamic=True, verify="my.yaml")
        """
        opened = self._backend.opened(" already; export needs the checkpoint it came from")
        path = None if path is None else reference("the file to export to", path)
        exporter = EXPORTERS.find(format)
        target = export_target(path, self.source, opened.weights.path, format)
        size = self._square(imgsz)
        recipe = self._int8_recipe(int8, calib, size, options)
        return exporter(
            opened.detector.cpu(),
            target,
            requested_options(format, size, nms, outputs, opset, dynamic=dynamic, half=half, int8=int8),
            data=self._verification(verify),
            int8=recipe,
            source_digest=opened.weights.digest,
            say=say,
        )

    @known_keywords
    def verify(
        self,
        runner: str,
        data: str | None = None,
        imgsz: ImageSize | None = None,
        precision: str = "fp32",
        conf: float = PREDICT_CONF,
        iou: float = IOU,
        max_det: int = MAX_DET,
        say: Callable[[str], None] | None = print,
    ) -> None:
        """Compare a program around an engine built elsewhere with this model, by the gate of exported files.

        Args:
            runner: command that takes image files and prints the JSON of `export/predict.py`.
            data: data set whose validation images both are run on. None: the run's own, else `shapes`.
            imgsz: px, the engine's input size. None: the model's own.
            precision: whose tolerance holds: fp32, fp16 or int8.
            conf: the runner's least score.
            iou: the runner's IoU threshold of NMS.
            max_det: the runner's largest number of detections of an image.
            say: takes the table of the comparison; None: nobody does.

        Raises:
            GateError: they differ.
            UserError: this is an exported file, or the command fails or prints something else.

        Example:
            >>> Detector("best.pt").verify("python export/predict.py best.onnx", data="my.yaml")
        """
        opened = self._backend.opened("; verify compares with the checkpoint it came from")
        if precision not in TOLERANCES:
            raise UserError(f"unknown precision '{precision}'; known: {', '.join(TOLERANCES)}")
        pairs = opened.detector.spec.pairs_per_level
        settings = Suppression(fraction("conf", conf), fraction("iou", iou), max_det, pairs)
        images, size = self._verification(data), self._square(imgsz)
        network = opened.detector.cpu()
        report = check_runner(network, runner, images, imgsz=size, precision=precision, settings=settings)
        refuse_difference(report, runner)
        if say is not None:
            say(report.table())

    def _square(self, imgsz: ImageSize | None) -> int:
        size = self.size(imgsz)
        if isinstance(size, tuple):
            raise UserError(
                f"{self.source} was trained at a short side of {size[0]} and a long side of {size[1]} px, and an exported "
                f"file is meant for one square size: give --imgsz N, such as {up_to_multiple(size[0], self.stride)}"
            )
        return size

    def size(self, imgsz: ImageSize | None = None, rect: bool = False) -> ImageSize:
        """Input size of a prediction.

        Args:
            imgsz: px. None: the model's own.
            rect: whether each image is to keep its own shape.

        Returns:
            The size in px.

        Raises:
            UserError: the model cannot take it.
        """
        size = self.imgsz if imgsz is None else whole_size(imgsz)
        self._backend.check_size(size, rect)
        return size

    @property
    def network(self) -> Network[Any, Any]:
        """The PyTorch model. UserError: an exported file has none."""
        return self._backend.opened("; the PyTorch model is in its checkpoint").detector

    @property
    def weights_file(self) -> Path:
        """The file the model came from."""
        return self._backend.file

    @property
    def precision(self) -> str:
        """`fp32`, or what an exported file says: `fp16`, `int8`; a checkpoint trained for int8 is that, too."""
        return self._backend.precision

    def _int8_recipe(self, int8: bool, calib: str | None, size: int, options: dict[str, Any]) -> Int8Recipe | None:
        if not int8:
            fields = Quantization.model_fields
            if unknown := next((name for name in options if name not in fields), None):
                names = {*inspect.signature(self.export).parameters, *fields} - {"options"}
                raise UserError(f"Detector.export takes no '{unknown}'; {nearest(unknown, names)}")
            int8_arguments = [name for name, value in {"calib": calib, **options}.items() if value is not None]
            if int8_arguments:
                raise UserError(f"{', '.join(int8_arguments)}: these belong to int8; add --int8 or leave them out")
            return None
        if quantized_layers(self.network):
            calibration_options = [name for name, value in {"calib": calib, **options}.items() if value is not None]
            if calibration_options:
                raise UserError(
                    f"{', '.join(calibration_options)}: {self.source} is trained for int8 and has its own ranges, nothing is calibrated; "
                    "leave them out"
                )
            return None
        settings = validate(Quantization, options, "options of int8", prefix="export.")
        if calib is None:
            raise UserError("--int8 needs --calib DATA: a data set or a folder of images like those it will see")
        return Int8Recipe(calibration_images(calib, size, self._backend.pad_value, settings.images), settings)

    def _verification(self, verify: str | None) -> DetectionData:
        """Validation images of the given data set, else of the run this checkpoint lies in, else of `shapes`."""
        if verify is not None:
            return load_split(find_data(verify), "val")
        data = self._data_of_run()
        if data is not None:
            try:
                return load_split(find_data(data), "val")
            except UserError:
                pass  # the run's data are not here any more
        return load_split(find_data("shapes"), "val")

    def _data_of_run(self) -> str | None:
        """The data set of the run that this checkpoint lies in."""
        recipe = Path(self.source).parent / "recipe.yaml"
        data = read_yaml(recipe).get("data") if recipe.is_file() else None
        return data if isinstance(data, str) and data else None
