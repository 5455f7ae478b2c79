"""Resolve what the user typed into one complete, checked recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import CheckpointFiles, architecture, model_names
from yoloxkd.assembly.quantized_recipe import recipe_of_student, with_short_schedule, written_shortly
from yoloxkd.assembly.recipe_rows import recipe_rows
from yoloxkd.assembly.run_callbacks import callback_keys, check_callbacks
from yoloxkd.assembly.teachers import names_from_files
from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import leaves, merge, parse_set, put, read_yaml, sections, shown, validate
from yoloxkd.config.recipe import Recipe
from yoloxkd.config.renamed import current_key, current_keys
from yoloxkd.errors import UserError, nearest, nearest_file
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.defaults import kd_defaults, set_defaults, split_name
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.weights.mmdet_files import AT_COCO, ZOO

KD_WHEN_TAUGHT = ("pgd",)  # the distillers of a run that names a teacher and no --kd
KD_WHEN_QUANTIZED = ("response", "pkd")  # the same, where teacher and student are one network in float32 and int8

# the command line's short options and where they live in the recipe
OPTIONS = {
    "data": "data",
    "quantize": "quantize.kind",
    "epochs": "train.epochs",
    "batch": "train.batch",
    "imgsz": "train.imgsz",
    "seed": "train.seed",
    "deterministic": "engine.deterministic",
    "device": "engine.device",
    "amp": "engine.amp",
    "workers": "engine.workers",
}


def recipe_file(name: str) -> Path:
    """A recipe by file name or by the name of one in `cfg/recipes/`."""
    if Path(name).is_file():
        return Path(name)
    shipped = cfg_folder() / "recipes" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(f"no recipe '{name}': neither a file nor a shipped recipe; {nearest(name, recipe_names())}")


def recipe_names() -> list[str]:
    """Every recipe that has a name: the files of `cfg/recipes/` and the rows of `cfg/kd-rows.yaml`."""
    return [*cfg_names("recipes"), *recipe_rows()]


def recipe_tree(name: str) -> dict[str, Any]:
    """What a recipe file holds, or a row of `cfg/kd-rows.yaml` stands for, unchecked."""
    row = None if Path(name).is_file() else recipe_rows().get(name)
    return read_yaml(recipe_file(name)) if row is None else row.tree()


def resolve(
    *,
    student: str | None = None,
    teacher: Sequence[str] = (),
    kd: Sequence[str] | None = None,
    recipe: str | None = None,
    sets: Sequence[str] | Mapping[str, Any] = (),
    files: CheckpointFiles | None = None,
    **options: Any,
) -> Recipe:
    """One checked recipe from defaults, a recipe file, options and dotted overrides, each winning over the one before.

    student  architecture name or checkpoint file; left out: the recipe's
    kd       method names, METHOD or METHOD@SET; None: PGD when there is a teacher; "none" alone: no distillation
    recipe   recipe name or file; left out: the student's own in `cfg/recipes/`, where there is one
    sets     "a.b=c" texts, or a mapping of dotted keys to values
    files    the command's checkpoints, which others read after this
    options  keys of `OPTIONS`; None means not given
    """
    tree: dict[str, Any] = {}
    files = files or CheckpointFiles()
    if student:
        tree = current_keys({"student": _student_keys(student, files)}, note=False)
    quantize = options.get("quantize") not in (None, "off")
    if quantize and not recipe and student and Path(student).is_file():
        tree = merge(recipe_of_student(Path(student), files), tree)
    base = recipe or tree.get("student", {}).get("name")
    if base and not recipe and base not in cfg_names("recipes"):
        base = str(base).partition("@")[0]  # a model of another source has the recipe of the model it is a kind of
    if recipe or (base and base in cfg_names("recipes")):
        of_file = current_keys(sections(written_shortly(recipe_tree(str(base))), Recipe, "recipe"))
        tree = merge(_for_student(of_file, tree.get("student", {})), tree)
    if "name" not in tree.get("student", {}):
        raise UserError("no student: give --student NAME|FILE, or a recipe that names one")
    _check_name(tree["student"]["name"])
    if quantize:
        tree = with_short_schedule(tree, note=recipe is not None)
    if teacher:
        put(tree, "teacher.models", [_whole_path(t) for t in teacher])
    for option, value in options.items():
        if value is not None:
            put(tree, OPTIONS[option], _whole_path(value) if option == "data" else value)
    family, defaults = architecture(tree["student"]["name"])
    _choose_methods(tree, kd, family, KD_WHEN_QUANTIZED if quantize else KD_WHEN_TAUGHT)
    tree["student"] = merge(defaults, tree["student"])
    if not isinstance(sets, Mapping) and not (isinstance(sets, list | tuple) and all(isinstance(t, str) for t in sets)):
        raise UserError(f"set should be a mapping of recipe keys to values, or a list of 'a.b=c' texts, got {sets!r}")
    for key, value in sets.items() if isinstance(sets, Mapping) else map(parse_set, sets):
        put(tree, current_key(_kd_key(str(key), tree["kd"])), value)
    if "names" in (tree.get("teacher") or {}):
        tree["teacher"]["names"] = names_from_files(tree["teacher"]["names"])
    return check(tree)


def _for_student(recipe: Mapping[str, Any], student: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe for another student than its own: of the keys for its own network those that the other's family has too.

    The backbone is what the student's name says, and a student with weights is the network that they are of.
    """
    own = recipe.get("student", {})
    if not student or student["name"] == own.get("name", student["name"]):
        return recipe
    _check_name(student["name"])
    _check_name(own["name"])
    known, of_own = (
        set(DETECTORS[architecture(name)[0]].Config.model_fields) for name in (student["name"], own["name"])
    )
    left_out = {"backbone"} | (of_own if "weights" in student else of_own - known)
    return {**recipe, "student": {key: value for key, value in own.items() if key not in left_out}}


def check(tree: Mapping[str, Any]) -> Recipe:
    """Parse a recipe tree: the keys of the detector, the distillers and the callbacks become their Config objects.

    UserError: an unknown key, or a value that does not fit.
    """
    tree = sections(written_shortly(tree), Recipe, "recipe")
    student, kd, callbacks = (dict(tree.get(name, {})) for name in ("student", "kd", "callbacks"))
    if "name" not in student:
        raise UserError("the recipe lacks the key 'student.name'")
    name, weights = student.pop("name"), student.pop("weights", None)
    family, _ = architecture(name)
    detector_config = DETECTORS[family].Config
    for method, keys in kd.items():
        DISTILLERS.find(method)
        if not isinstance(keys, Mapping):
            raise UserError(
                f"key 'kd.{method}' in the recipe should be a section (key: value lines), got {shown(keys)}"
            )
        _check_owner(method, keys)
    allowed = [*leaves(Recipe), *(f"student.{key}" for key in leaves(detector_config)), *callback_keys()]
    allowed += [f"kd.{key}" for method in kd for key in leaves(DISTILLERS[method].Config)]
    config = validate(detector_config, student, f"recipe ({name})", allowed, "student.")
    methods = {m: validate(DISTILLERS[m].Config, keys, f"recipe ({m})", allowed, "kd.") for m, keys in kd.items()}
    typed = {
        "student": {"name": name, "weights": weights, "config": config},
        "kd": methods,
        "callbacks": check_callbacks(callbacks, allowed),
    }
    recipe = validate(Recipe, tree | typed, "recipe", allowed)
    teachers, factors = len(recipe.teacher.models), len(recipe.teacher.weight)
    if factors not in (0, teachers):
        raise UserError(
            f"teacher.weight has {factors} number(s) for {teachers} teacher(s); give one for each, in their order"
        )
    for method, keys in methods.items():
        keys.check_length(recipe.train.epochs, method)
    if recipe.quantize.kind != "off" and weights is None:
        raise UserError(
            f"--quantize {recipe.quantize.kind} rounds a student that is trained already: give its checkpoint, "
            "--student runs/x/best.pt"
        )
    if recipe.kd and not recipe.teacher.models:
        raise UserError(f"--kd {next(iter(recipe.kd))} needs a teacher: give --teacher NAME|FILE")
    return recipe


def _check_owner(method: str, keys: Mapping[str, Any]) -> None:
    """UserError: a key is not of this method but of others."""
    keys_of_method = set(leaves(DISTILLERS[method].Config))
    for key in keys:
        owners = [name for name, kind in DISTILLERS.items() if key in leaves(kind.Config)]
        if owners and key not in keys_of_method:
            raise UserError(
                f"key 'kd.{key}' is of {', '.join(owners)}, and --kd {method} has no such key; choose another --kd, or leave "
                f"{key} out"
            )


def _student_keys(student: str, files: CheckpointFiles) -> dict[str, Any]:
    """The keys of `student` that its name or its checkpoint gives."""
    if Path(student).is_file():
        return files.section(student) | {"weights": _whole_path(student)}
    name, _, published = student.partition("@")
    if published and student in model_names():
        return {"name": student, "weights": student}
    if not published:
        return {"name": name}
    keys = ZOO[AT_COCO[name]].keys if name in AT_COCO else {}
    return {"name": name, "weights": student} | keys


def _whole_path(reference: str) -> str:
    """A file's absolute path, so that a run can be resumed from any folder; names as they are."""
    return str(Path(reference).resolve()) if Path(reference).is_file() else reference


def _check_name(name: str) -> None:
    if name not in model_names():
        tail = nearest(str(name), model_names())
        if isinstance(name, str) and not tail.startswith("did you mean"):  # a YAML may hold a number
            tail = nearest_file(name).removeprefix("; ") or tail
        raise UserError(f"unknown model '{name}' (neither an architecture nor a file); {tail}")


def _choose_methods(tree: dict[str, Any], kd: Sequence[str] | None, family: str, when_taught: Sequence[str]) -> None:
    """Fill `tree["kd"]` with the defaults of each chosen method under what the recipe file says of it.

    A method may be named with a set of defaults, `pgd@small-data`; the tree has the method's name alone.
    """
    written = tree.get("kd") or {}
    taught = bool(tree.get("teacher", {}).get("models"))
    if kd is None:
        methods = list(map(str, written)) or (list(when_taught) if taught else [])
    else:
        methods = list(dict.fromkeys(kd))
        if "none" in methods:
            if len(methods) > 1:
                raise UserError("--kd none cannot be combined with another --kd")
            methods = []
    for name, keys in written.items():
        if not isinstance(keys or {}, Mapping):
            raise UserError(f"key 'kd.{name}' in the recipe should be a section (key: value lines), got {shown(keys)}")
    keys_of = {split_name(str(name))[0]: keys or {} for name, keys in written.items()}
    tree["kd"] = {}
    for name in methods:
        method, set_name = split_name(name)
        if method in tree["kd"]:
            raise UserError(f"--kd {method} is given with two sets of defaults; choose one")
        recipe_keys = keys_of.get(method, {})
        if kd is not None and set_name:  # an option, so it wins over the recipe
            tree["kd"][method] = merge(
                merge(kd_defaults(method, family), recipe_keys), set_defaults(method, set_name, family)
            )
        else:
            from_outside = not set_name and not DISTILLERS[method].__module__.startswith("yoloxkd.")
            # a method that a user has put into the table has its defaults in its Config, and no file
            tree["kd"][method] = merge({} if from_outside else kd_defaults(name, family), recipe_keys)


def _kd_key(key: str, methods: Mapping[str, Any]) -> str:
    """`kd.alpha` -> `kd.<the only method>.alpha`; other keys as they are."""
    section, _, rest = key.partition(".")
    if section != "kd" or not rest or rest.partition(".")[0] in methods:
        return key
    if len(methods) == 1:
        return f"kd.{next(iter(methods))}.{rest}"
    if not methods:
        raise UserError(
            f"key '{key}' is set but no distiller is chosen: give --kd {'|'.join(DISTILLERS)} and a --teacher"
        )
    raise UserError(
        f"key '{key}' could belong to several distillers: write kd.METHOD.{rest} with one of {', '.join(methods)}"
    )
