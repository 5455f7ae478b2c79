"""Pascal VOC XML (Everingham et al. 2010): read into arrays, and written.

Corners are pixels counted from 1, both inside the box: xmin = 1 is the image's first column, so a box covers
x from xmin - 1 to xmax. `difficult` objects are to be ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import escape

import numpy as np

from yoloxkd.data.box_table import UNKNOWN, UNWANTED, BoxTable, ImageColumns
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.format import Format, SplitSource
from yoloxkd.data.formats.values import ClassNames, flags, number, numbers, size_px
from yoloxkd.data.io.find_images import IMAGE_SUFFIXES, Stems, beside, images_of, read_lines
from yoloxkd.data.io.images import check_images, measure_images
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.io.text_files import refuse_pointer
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.problems import Faults, Place, shown
from yoloxkd.errors import UserError

_ENCODING = re.compile(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([A-Za-z0-9._-]+)")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(slots=True)
class VocObject:
    """One object of a file: the line it starts on, how many boxes it has, and what its elements say, by name."""

    line: int
    boxes: int = 0
    elements: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class VocFile:
    """What is read of an annotation file: height and width px (0: not given), a size that is none, the image's name, objects."""

    height: int = 0
    width: int = 0
    odd_size: str = ""
    filename: str = ""
    objects: list[VocObject] = field(default_factory=list)


def read_voc(
    images: Sequence[Path],
    annotations: Sequence[Path],
    lists: Sequence[Path],
    names: list[str],
    split: str,
    faults: Faults | None = None,
) -> DetectionData:
    """One split from folders of images and of XML files.

    lists  files of `ImageSets`: a name without suffix a line, each for the folders of its place; with none, all images
           of the folders
    Sizes are those of the files, of the image where a file gives none. An image without a file has no object.
    UserError: a place is missing, an XML file cannot be read, none is there, an image is missing or broken.
    """
    faults = Faults() if faults is None else faults
    candidates, files = _pairs(images, annotations, lists, split, faults)
    voc_files = in_threads(lambda file: _parse_file(file, faults), files)
    if all(one is None for one in voc_files):
        raise UserError(f"none of the {len(files)} images of '{split}' has an annotation file; looked for {files[0]}")
    if missing := [Place(file) for file, one in zip(files, voc_files, strict=True) if one is None]:
        faults.add("images without an annotation file, taken as without objects", missing)
        faults.images_without_file += len(missing)
    content = [one or VocFile() for one in voc_files]
    paths, content = _match_images(candidates, files, content, faults)
    sizes, good = _sizes(paths, content, str(lists[0] if lists else annotations[0]), faults)
    keep = np.flatnonzero(good).tolist()
    paths, files, content = [paths[i] for i in keep], [files[i] for i in keep], [content[i] for i in keep]
    image_columns = ImageColumns(np.arange(1, len(paths) + 1), Strings(paths), sizes[good])
    if odd := [Place(file, note=one.odd_size) for file, one in zip(files, content, strict=True) if one.odd_size]:
        faults.add("sizes that are no positive whole number, taken from the image", odd)
    return _table(content, files, names, faults).finish(names, split, image_columns, faults, "voc")


def _pairs(
    images: Sequence[Path], annotations: Sequence[Path], lists: Sequence[Path], split: str, faults: Faults
) -> tuple[list[list[str]], list[str]]:
    """The files that an image may be, one unless several share a stem, and its annotation file."""
    if lists:
        return _listed_pairs(images, annotations, lists)
    if not images or len(images) != len(annotations):
        raise UserError(
            f"the split '{split}' should have a 'list' (an ImageSets file), or as many folders of 'images' as of "
            "'annotations'; correct the data YAML"
        )
    paths: list[str] = []
    places: list[tuple[str, str]] = []
    for folder, xml in zip(images, annotations, strict=True):
        here = images_of([folder], folder, faults)
        base = folder if folder.is_dir() else folder.parent
        inside = [Path(os.path.relpath(path, base)) for path in here]
        paths += here
        places += [(str(xml / file.parent), file.stem) for file in inside]
    return [[path] for path in paths], beside(places, ".xml")


def _listed_pairs(
    images: Sequence[Path], annotations: Sequence[Path], lists: Sequence[Path]
) -> tuple[list[list[str]], list[str]]:
    """As `_pairs`, of the names in lists."""
    candidates: list[list[str]] = []
    places: list[tuple[str, str]] = []
    stems = Stems(IMAGE_SUFFIXES)
    for place, (folder, xml) in zip(lists, _folders(images, annotations, lists), strict=True):
        lines = read_lines(place)
        if not lines:
            raise UserError(f"the list {place} names no image")
        for line in lines:
            stem, paths = _find_named(line, str(folder), stems)
            candidates.append(paths)
            places.append((str(xml), stem))
    return candidates, beside(places, ".xml")


def _find_named(line: str, folder: str, stems: Stems) -> tuple[str, list[str]]:
    """The stem that a line of a list names, and its images; where there is none, the JPEG that should be there.

    A last column of -1, 0 or 1 says whether the class of the list is in the image. It is part of the name only where
    an image has that name; so are spaces at its ends, and a suffix.
    """
    text = line.strip()
    start, _, column = text.replace("\t", " ").rpartition(" ")
    plain = text[: len(start)].rstrip() if start.strip() and column in ("-1", "0", "1") else text
    for name in dict.fromkeys((line, text, plain)):
        if paths := stems.of(folder, name):
            return name, paths
        start, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES and os.path.exists(os.path.join(folder, name)):
            return start, [os.path.join(folder, name)]
    return plain, [os.path.join(folder, f"{plain}.jpg")]


def _match_images(
    candidates: Sequence[Sequence[str]], files: Sequence[str], content: Sequence[VocFile], faults: Faults
) -> tuple[list[str], list[VocFile]]:
    """The image of each annotation file, and what the file says of it; where several have its stem, by `<filename>`."""
    of_file: dict[str, list[str]] = {}
    for file, paths in zip(files, candidates, strict=True):
        of_file.setdefault(file, []).extend(path for path in paths if path not in of_file.get(file, ()))
    matched_paths, matched_files = [], []
    for file, paths, one in zip(files, candidates, content, strict=True):
        rivals = of_file[file]
        named = [path for path in rivals if os.path.basename(path) == one.filename]
        if len(rivals) > 1 and os.path.exists(file) and len(named) != 1:
            pair = f"{rivals[0]} and {rivals[1]}"
            sentence = f"{pair} have one annotation file, {file}, whose <filename> names neither; rename one of them"
            faults.refuse(
                "images that share their annotation file", Place(rivals[1], note=f"with {rivals[0]}"), sentence
            )
        if len(paths) > 1:
            matched_paths.append(named[0] if len(named) == 1 else paths[0])
            matched_files.append(one)
        else:
            matched_paths.append(paths[0])
            matched_files.append(one if len(rivals) == 1 or len(named) != 1 or paths[0] == named[0] else VocFile())
    return matched_paths, matched_files


def _folders(images: Sequence[Path], annotations: Sequence[Path], lists: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Image and annotation folder of each list; left out, those of the VOC tree that the list lies in."""
    roots = [place.parents[2] if len(place.parents) > 2 else place.parent for place in lists]
    image_folders = list(images) or [root / "JPEGImages" for root in roots]
    xml_folders = list(annotations) or [root / "Annotations" for root in roots]
    image_folders, xml_folders = (
        folders * len(lists) if len(folders) == 1 else folders for folders in (image_folders, xml_folders)
    )
    if not len(image_folders) == len(xml_folders) == len(lists):
        raise UserError(f"{len(lists)} lists need as many image and annotation folders, or one for all, or none")
    return list(zip(image_folders, xml_folders, strict=True))


def _parse_file(file: str, faults: Faults) -> VocFile | None:
    """None: there is no such file."""
    try:
        content = Path(file).read_bytes()
        refuse_pointer(content, f"the annotation file {file}")
        return parse_voc(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
    except (ValueError, LookupError) as error:
        sentence = f"the annotation file {file} is in an encoding that cannot be read: {error}; save it as UTF-8"
        faults.refuse("annotation files in an unknown encoding", Place(file), sentence)
        return VocFile()
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        sentence = f"the annotation file {file} is not valid XML: {what}, line {error.lineno}"
        faults.refuse(f"annotation files that are not XML: {what}", Place(file, error.lineno), sentence)
        return VocFile()


def parse_voc(content: bytes) -> VocFile:
    """Read an annotation file with the line of each object.

    expat.ExpatError: it is not XML. ValueError, LookupError: it is in an encoding that Python does not know either.
    """
    try:
        return _parse(content, None)
    except (ValueError, LookupError):  # expat knows few encodings
        declaration = _ENCODING.match(content)
        if declaration is None:
            raise
        return _parse(content.decode(declaration[1].decode("ascii")).encode(), "utf-8")


def _parse(content: bytes, encoding: str | None) -> VocFile:
    out = VocFile()
    path: list[str] = []
    text: list[str] = []
    parser = expat.ParserCreate(encoding)

    def start(tag: str, _: dict[str, str]) -> None:
        path.append(tag)
        text.clear()
        if path[1:] == ["object"]:
            out.objects.append(VocObject(parser.CurrentLineNumber))
        elif path[1:] == ["object", "bndbox"]:
            out.objects[-1].boxes += 1

    def end(tag: str) -> None:
        value = "".join(text).strip()
        if path[1:2] == ["object"] and (len(path) == 3 or path[2:3] == ["bndbox"]) and value:
            out.objects[-1].elements[tag] = value
        elif path[1:] in (["size", "height"], ["size", "width"]) and value:
            side = size_px(value)
            setattr(out, tag, side or 0)
            if side is None and number(value) != 0:
                out.odd_size = f"{tag} {shown(value)}"
        elif path[1:] == ["filename"]:
            out.filename = value
        path.pop()
        text.clear()

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.Parse(content, True)
    return out


def _sizes(
    paths: Sequence[str], content: Sequence[VocFile], source: str, faults: Faults
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N, 2) as the files say, else as the images say; and which images are usable (N,)."""
    sizes = np.array([(one.height, one.width) for one in content], np.int32)
    without_size = np.flatnonzero((sizes <= 0).any(1))
    good = np.ones(len(paths), bool)
    if len(without_size):
        sizes[without_size], good[without_size] = measure_images(
            [paths[i] for i in without_size.tolist()], source, faults
        )
    if not faults.gather:
        with_size = np.setdiff1d(np.arange(len(paths)), without_size)
        check_images([paths[i] for i in with_size.tolist()], source, sizes[with_size])
    return sizes, good


def _table(content: Sequence[VocFile], files: Sequence[str], names: list[str], faults: Faults) -> BoxTable:
    objects = [(i, one) for i, file in enumerate(content) for one in file.objects]
    table = ClassNames(names)
    class_names = [one.elements.get("name") for _, one in objects]
    corners = numbers([[one.elements.get(corner) for corner in CORNERS] for _, one in objects], (4,))
    difficult, unclear = flags(one.elements.get("difficult") for _, one in objects)
    image = np.array([i for i, _ in objects], np.int64)
    boxes = BoxTable(
        image=image,
        label=np.array([_label(name, table) for name in class_names], np.int64),
        boxes=corners - (1.0, 1.0, 0.0, 0.0),
        ignore=difficult,
        difficult=difficult,
        line=np.array([one.line for _, one in objects], np.int64),
        files=files,
        file=image,
        written=corners,
    )
    loose = np.array([name not in table.exact and table.label(name or "") is not None for name in class_names], bool)
    boxes.count(loose, "class names that differ from names in spaces or Unicode form", faults)
    several = np.array([one.boxes > 1 for _, one in objects], bool)
    boxes.count(several, "of more than one <bndbox>, of which the last was taken", faults)
    boxes.count(unclear, "whose difficult is neither 0 nor 1, taken as 0", faults)
    return boxes


def _label(name: str | None, table: ClassNames) -> int:
    if name is None:
        return UNKNOWN
    label = table.label(name)
    return UNWANTED if label is None else label


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    return read_voc(source.images, source.annotations, source.lists, names, split, faults)


def write_voc(data: DetectionData, files: Sequence[str], folder: Path) -> dict[str, str]:
    """Annotations/<name>.xml for images JPEGImages/<file>, and ImageSets/Main/<split>.txt. What is to be ignored is
    written as difficult. Corners that are no whole pixels keep their decimals."""
    xml, listed = folder / "Annotations", folder / "ImageSets" / "Main" / f"{data.split}.txt"
    for place in (xml, listed.parent):
        place.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(files):
        height, width = data.sizes[i].tolist()
        boxes, labels, crowd = data.annotations(i)
        rows = zip((boxes + (1.0, 1.0, 0.0, 0.0)).round(9).tolist(), labels.tolist(), crowd.tolist(), strict=True)
        objects = [_object(data.names[label], box, ignore) for box, label, ignore in rows]
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        head = f"<filename>{escape(file)}</filename>\n\t{size}"
        text = f"<annotation>\n\t{head}\n{''.join(objects)}</annotation>\n"
        (xml / file).with_suffix(".xml").write_text(text, encoding="utf-8")
    listed.write_text("".join(f"{Path(file).stem}\n" for file in files), encoding="utf-8")
    return {"list": f"ImageSets/Main/{data.split}.txt"}


def _object(name: str, corners: Sequence[float], difficult: bool) -> str:
    values = [str(int(v)) if v == int(v) else repr(v) for v in corners]
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(CORNERS, values, strict=True))
    fields = f"<name>{escape(name)}</name><difficult>{int(difficult)}</difficult>"
    return f"\t<object>{fields}<bndbox>{box}</bndbox></object>\n"


VOC = Format(
    _read,
    write_voc,
    required=(),
    optional=("images", "annotations", "list"),
    several=("images", "annotations", "list"),
    image_folder="JPEGImages",
    one_folder=True,
    keeps=frozenset({"difficult", "names"}),
)
