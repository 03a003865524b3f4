"""Finding presets and reading them with `extends` and `--set`. `writing.py` writes them out again.

A preset's values come from three places, each laid over the one before: the base that it extends, the file, `--set`.
"""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.documents import Document, load_yaml
from llavanext_cli.config.overrides import keys_set, read_overrides
from llavanext_cli.config.reading import Builder, Problem, suggestion
from llavanext_cli.config.rules import check_preset, greatest_positions
from llavanext_cli.config.schema import SECTIONS, TASKS, Head, Preset, schema_keys
from llavanext_cli.errors import ConfigError
from llavanext_cli.files import describe

SUFFIXES = (".yaml", ".yml")
LIST_HINT = "`llavanext presets list` shows the presets."


@dataclass(frozen=True)
class PresetInfo:
    """A shipped preset, as `presets list` shows it.

    Attributes:
        target: Ascend or CPU.
        tokens: longest sequence; of an ask preset, prompt and answer together.
        memory: greatest memory of one NPU, such as "57GB"; None on a CPU.
    """

    name: str
    path: Path
    task: str
    target: str
    devices: int
    tokens: int
    memory: str | None
    description: str


@dataclass(frozen=True)
class CheckReport:
    """What `presets check` found: nothing, or one line for each problem, and what to do."""

    name: str
    path: Path | None
    problems: tuple[str, ...] = ()
    hint: str = ""

    @property
    def ok(self) -> bool:
        return not self.problems


def presets_folder() -> Path:
    """The shipped presets: inside the package when installed, beside it in a source tree.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "base").is_dir():
            return folder
    raise ConfigError(
        f"the presets are missing from {package}", "The installation is damaged: `pip install --force-reinstall` it."
    )


def preset_files() -> dict[str, Path]:
    """Name → file of every shipped preset; the bases, which are not whole, are left out."""
    folder = presets_folder()
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {name: path for name, path in names.items() if not name.startswith("base/")}


def base_names() -> list[str]:
    """What a preset's `extends` may name, of what is shipped."""
    return sorted(f"base/{file.stem}" for file in (presets_folder() / "base").iterdir() if file.suffix in SUFFIXES)


def list_presets() -> list[PresetInfo]:
    """All shipped presets in the order of their names.

    Raises:
        ConfigError: one of them is wrong.
    """
    result = []
    for name, path in preset_files().items():
        preset = load_preset(name)
        tokens = preset.ask.cache_tokens if preset.ask else preset.data.seq_length
        assert tokens is not None, "load_preset lets no train preset without seq_length through"
        result.append(
            PresetInfo(
                name=name,
                path=path,
                task=preset.task,
                target=preset.runtime.target,
                devices=preset.parallel.devices,
                tokens=tokens,
                memory=preset.runtime.memory,
                description=preset.description,
            )
        )
    return result


def find_preset(name_or_path: str | Path) -> tuple[str, Path]:
    """Name and file of a preset, given as the name of a shipped one or as the path of a YAML file.

    Raises:
        ConfigError: there is none; the nearest names are in the message.
    """
    text = str(name_or_path)
    path = Path(text)
    files = preset_files()
    if text in files:
        return text, files[text]
    if path.is_file():
        return path.stem if path.suffix in SUFFIXES else path.name, path
    if text and (kind := describe(path)) not in ("a file", "missing"):
        raise ConfigError(f"{text} is {kind}, and a preset is a YAML file or a name", LIST_HINT)
    if path.suffix in SUFFIXES:
        raise ConfigError(f"no preset file {text}", LIST_HINT)
    near = difflib.get_close_matches(text, list(files), n=3, cutoff=0.4)
    raise ConfigError(f"no preset named {text!r}", (f"Did you mean {' or '.join(near)}? " if near else "") + LIST_HINT)


def load_preset(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    model: Architecture | None = None,
) -> Preset:
    """Read a preset and check all of it.

    Args:
        name_or_path: name of a shipped preset, or path of a YAML file.
        overrides: `key.path=value` settings (`--set`), the value in YAML.
        devices: `--devices`; in training the number of data-parallel groups follows from it, tensor and pipeline
            stay; in asking all share each layer.
        model: of the checkpoint that is trained or asked with the preset; see `check_preset`.

    Raises:
        ConfigError: no such preset, not YAML, or wrong; all that is wrong is in `details`, each with file and key.
    """
    name, path = find_preset(name_or_path)
    builder = Builder(_read_document(path), str(path))
    known = schema_keys()
    builder.document = builder.document.updated(read_overrides(overrides, known, builder))
    if devices is not None:
        builder.document = builder.document.updated(_share_devices(builder.document, devices))
    preset = _build(builder, name, path, known, model)
    if builder.problems:
        count, example = len(builder.problems), _sound_example(builder, preset, str(name_or_path))
        raise ConfigError(
            f"preset {name} has {'a problem' if count == 1 else f'{count} problems'}",
            f"`llavanext presets show {example} --full` lists every key and what it means.",
            [str(problem) for problem in builder.problems],
        )
    return preset


def check_presets(names: Sequence[str] = (), overrides: Sequence[str] = ()) -> list[CheckReport]:
    """Load presets and expand them to their MindFormers configuration; go on after one that is wrong.

    Args:
        names: names or files; without any, all that are shipped.
        overrides: `key.path=value` settings for each of them.
    """
    from llavanext_cli.config.mindformers import expand

    reports = []
    for name in names or preset_files():
        path = None
        try:
            _, path = find_preset(name)
            expand(load_preset(name, overrides))
            reports.append(CheckReport(name, path))
        except ConfigError as fault:
            # The summary says nothing that the details do not; without details it is all there is.
            reports.append(CheckReport(name, path, fault.details or (fault.what,), fault.hint))
    return reports


def _sound_example(builder: Builder, preset: Preset, given: str) -> str:
    """A preset to look at: the given one where nothing in its file is wrong, else a shipped one of the same task."""
    is_shipped = preset.path in preset_files().values()
    if is_shipped or all(problem.where.startswith("--") for problem in builder.problems):
        return shlex.quote(given)
    return "video-7b-ask-image" if preset.task == "ask" else "video-7b-stage2"


def _read_document(path: Path) -> Document:
    """The file over the base that it extends; a base extends nothing."""
    document = load_yaml(path)
    base = document.values.pop("extends", None)
    if base is None:
        return document
    where = document.origins["extends"]
    if not isinstance(base, str):
        raise ConfigError(f"{where}: extends: expected the name of a base", "Such as base/video-7b.")
    candidates = [
        folder / f"{base}{suffix}" for folder in (path.parent, presets_folder()) for suffix in ("", *SUFFIXES)
    ]
    # A file named as what it extends means the shipped one, not itself.
    files = [file for file in candidates if file.is_file()]
    found = next((file for file in files if not file.samefile(path)), None)
    if found is None:
        near = difflib.get_close_matches(base, base_names(), n=1, cutoff=0.4)
        instead = " but this file itself" if files else f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{where}: extends: there is no {base}{instead}",
            f"The bases are {', '.join(base_names())}; a path is looked up beside {path.name}.",
        )
    below = load_yaml(found)
    if "extends" in below.values:
        source = base if base in preset_files() else shlex.quote(str(found))
        raise ConfigError(
            f"{where}: extends: {base} is no base: it extends {below.values['extends']} itself",
            f"A base extends nothing. Extend {' or '.join(base_names())}, or change a copy: "
            f"`llavanext presets copy {source} FILE`.",
        )
    return below.updated(document)


def _share_devices(document: Document, devices: int) -> Document:
    """`--devices N`: data-parallel groups are what is left when tensor and pipeline have taken theirs.

    One answer has no samples to be shared, so all devices of an ask preset share each layer.
    """
    where = f"--devices {devices}"
    if "ask" in document.values and "train" not in document.values:
        shared = {"devices": devices, "data": 1, "tensor": devices}
        return Document({"parallel": shared}, {f"parallel.{name}": where for name in shared})
    parallel = document.values.get("parallel")
    parallel = parallel if isinstance(parallel, dict) else {}
    sizes = [parallel.get(name, 1) for name in ("tensor", "pipeline")]
    taken = 1
    for size in sizes:
        taken *= size if isinstance(size, int) and size > 0 else 1
    if devices % taken:
        raise ConfigError(
            f"--devices {devices} cannot be shared by tensor {sizes[0]} x pipeline {sizes[1]}",
            f"Use a multiple of {taken}, or change parallel.tensor and parallel.pipeline with --set.",
        )
    return Document(
        {"parallel": {"devices": devices, "data": devices // taken}},
        {"parallel.devices": where, "parallel.data": where},
    )


def _build(
    builder: Builder, name: str, path: Path, known: Mapping[str, Any], model: Architecture | None = None
) -> Preset:
    """The dataclasses; what is wrong is in `builder.problems`."""
    values = builder.document.values
    tops = ["task", "description", *SECTIONS]
    for key in values:
        if key not in tops:
            builder.add(key, "unknown key" + suggestion(key, tops, "", known))
    head = builder.build(Head, {key: values[key] for key in ("task", "description") if key in values}, "", known)
    task: Literal["train", "ask"] = head.task or ("ask" if "ask" in values and "train" not in values else "train")

    sections: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        if section in TASKS and section != task:
            if values.get(section) is not None:
                builder.add(section, f"is not read by the task {task}: leave it out")
            continue
        sections[section] = builder.build(cls, values.get(section), section, known)
        _refuse_unread(builder, cls, section, task)
    wrong = {problem.key for problem in builder.problems}
    if task == "train" and sections["data"].seq_length is None and wrong.isdisjoint({"data", "data.seq_length"}):
        builder.add("data.seq_length", "missing: tokens a sample, media included")

    preset = Preset(name=name, path=path, task=task, description=head.description, **sections)
    _apply_rules(builder, preset, model)
    return preset


def _refuse_unread(builder: Builder, cls: type, section: str, task: str) -> None:
    given = builder.document.values.get(section)
    if not isinstance(given, dict):
        return
    for f in dataclasses.fields(cls):
        if f.name in given and f.metadata.get("task") not in (None, task):
            builder.add(f"{section}.{f.name}", f"is not read by the task {task}: leave it out")


def _apply_rules(builder: Builder, preset: Preset, model: Architecture | None) -> None:
    """Rules between fields; one that read a field with a problem of its own says nothing new."""
    bad = {problem.key for problem in builder.problems}

    def is_bad(key: str) -> bool:
        return any(key == other or key.startswith(f"{other}.") for other in bad)

    for keys, text in check_preset(preset, model):
        if not any(is_bad(key) for key in keys):
            # It stands where the user last wrote: at a --set or --devices, else at the first key that is in a file.
            places = [
                place
                for key in keys
                for other, place in builder.document.origins.items()
                if other == key or other.startswith(f"{key}.")
            ]
            changed = [place for place in places if place.startswith("--")]
            place = (changed or places or [builder.name])[0]
            builder.problems.append(Problem(place, keys[0], text))


def check_model_settings(preset: Preset, overrides: Sequence[str], architecture: Architecture) -> None:
    """The model is what the checkpoint says it is: a `--set model.…` that says otherwise must not go unheard, and
    samples must end within its positions.

    Raises:
        ConfigError: with both values.
    """
    for override, key in keys_set(overrides):
        if not key.startswith("model."):
            continue
        wanted: Any = preset.model
        found: Any = architecture
        for name in key.split(".")[1:]:
            if not hasattr(wanted, name):  # below rope_scaling: a mapping, compared as a whole
                break
            wanted, found = getattr(wanted, name), getattr(found, name)
        if wanted != found:
            raise ConfigError(
                f"--set {override}: the checkpoint's {key} is {found}",
                "The model's shape is the checkpoint's: leave the setting out, or convert another model.",
            )
    length, positions = preset.data.seq_length, greatest_positions(architecture.text)
    if length is not None and length > positions:
        raise ConfigError(
            f"data.seq_length is {length}, but the positions of the checkpoint's model reach {positions}",
            f"give --set data.seq_length={positions}, or a checkpoint whose config.json has rope_scaling",
        )
