"""`llavanext presets`: list, show, compare, copy and check presets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from llavanext_cli import console
from llavanext_cli.errors import ConfigError
from llavanext_cli.options import Force, Json, Set, complete_preset
from llavanext_cli.signals import raise_on_termination

presets = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Name = Annotated[
    str,
    typer.Argument(
        metavar="PRESET",
        help="Name of a preset, or a YAML file.",
        show_default=False,
        autocompletion=complete_preset,
    ),
]


@presets.callback()
def _presets() -> None:
    """Show, copy and check the settings that train and ask run with.

    Example:
      llavanext presets list

    Next: llavanext presets copy tiny-stage2 mine.yaml makes one that you can change.
    """


@presets.command("list")
def list_command(json: Json = False) -> None:
    """List the presets that come with llavanext.

    Example:
      llavanext presets list

    Next: llavanext presets show NAME
    """
    from llavanext_cli.config.presets import list_presets

    found = list_presets()
    if json:
        console.out_json({"presets": found})
        return
    npus = {p.name: f"{p.devices} NPU{'s' if p.devices > 1 else ''}, {p.memory}" for p in found}
    rows = [(p.name, npus[p.name] if p.target == "Ascend" else "CPU", p.tokens, p.description) for p in found]
    console.table(("name", "runs on", "tokens", "what for"), rows)


@presets.command("show")
def show_command(
    preset: Name,
    full: Annotated[
        bool, typer.Option("--full", help="Every key with its value and meaning, base and defaults included.")
    ] = False,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="The complete MindFormers configuration that the preset expands to.")
    ] = False,
    settings: Set = None,
    json: Json = False,
) -> None:
    """Print a preset: as it is written, with every key, or expanded to its MindFormers configuration.

    Example:
      llavanext presets show video-7b-stage2 --full --set train.epochs=2

    Next: llavanext presets copy NAME FILE, or --set KEY=VALUE with train and ask.
    """
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.config.writing import preset_to_dict, preset_to_yaml

    if full and resolved:
        raise typer.BadParameter("use either --full or --resolved, not both")
    loaded = load_preset(preset, settings or ())
    if resolved:
        import yaml

        from llavanext_cli.config.mindformers import expand

        expanded = expand(loaded)
        if json:
            console.out_json(expanded)
        else:
            console.write(yaml.safe_dump(expanded, sort_keys=False, allow_unicode=True))
    elif json:
        console.out_json(preset_to_dict(loaded))
    elif full or settings:
        console.write(preset_to_yaml(loaded))
    else:
        console.write(loaded.path.read_text(encoding="utf-8"))


@presets.command("diff")
def diff_command(
    one: Name,
    other: Annotated[
        str,
        typer.Argument(
            metavar="OTHER",
            help="Name or file of the preset to compare with.",
            show_default=False,
            autocompletion=complete_preset,
        ),
    ],
    json: Json = False,
) -> None:
    """Show the keys in which two presets differ, bases and defaults included.

    Example:
      llavanext presets diff video-7b-stage2 video-7b-stage3

    Next: llavanext presets show PRESET --full says what each key means.
    """
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.config.writing import diff_presets

    first, second = load_preset(one), load_preset(other)
    differences = diff_presets(first, second)
    if json:
        console.out_json({key: {"one": left, "other": right} for key, (left, right) in differences.items()})
    elif differences:
        console.table(("key", first.name, second.name), [(key, *values) for key, values in differences.items()])
    else:
        console.say("The presets are the same.")


@presets.command("copy")
def copy_command(
    preset: Name,
    file: Annotated[Path, typer.Argument(help="The new file, or a folder to put it in.", show_default=False)],
    force: Force = False,
) -> None:
    """Copy a preset to a file that you can change.

    Example:
      llavanext presets copy tiny-stage2 mine.yaml

    Next: llavanext presets check mine.yaml
    """
    from llavanext_cli.config.writing import copy_preset

    written = copy_preset(preset, file, force)
    console.say(f"Wrote {written}.")
    console.next_step(f"llavanext presets check {shlex.quote(str(written))}")


@presets.command("check")
def check_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET]...",
            help="Names or YAML files. Default: all that come with llavanext.",
            autocompletion=complete_preset,
        ),
    ] = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Also compile their graphs for NPUs; this needs no NPU."),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=1, help="With --compile: shorten the model to N layers; takes a minute."),
    ] = None,
    settings: Set = None,
    json: Json = False,
) -> None:
    """Check presets and report all problems, not only the first.

    With --compile, MindSpore's simulation mode compiles a preset for 8 NPUs on a Linux laptop: everything up to the
    kernels, sharding and communication included. Nothing is run.

    Example:
      llavanext presets check
      llavanext presets check video-7b-stage2 --compile --layers 2

    Next: llavanext train PRESET --data FILE --checkpoint DIR --out DIR
    """
    from llavanext_cli.config.presets import check_presets
    from llavanext_cli.simulation.simulate import CompileRequest, simulate

    if layers and not compile_:
        raise typer.BadParameter("--layers needs --compile")
    reports = check_presets(names or [], settings or ())
    wrong = [report for report in reports if not report.ok]
    compiled = {}
    for report in (r for r in reports if compile_ and r.ok):
        request = CompileRequest(str(report.path), tuple(settings or ()), layers=layers)
        with raise_on_termination(), console.progress(f"Compiling {report.name}"):
            compiled[report.name] = simulate(request)
    if json:
        summaries = {"compiled": [result.summary() for result in compiled.values()]} if compile_ else {}
        console.out_json({"presets": reports, **summaries})
    else:
        for report in reports:
            found = compiled[report.name].describe() if report.name in compiled else "ok" if report.ok else "invalid"
            console.out(f"{report.name}: {found}")
    if wrong:
        hints = {report.hint for report in wrong}
        raise ConfigError(
            f"{len(wrong)} of {len(reports)} presets {'is' if len(wrong) == 1 else 'are'} invalid",
            hints.pop() if len(hints) == 1 else "check them one by one for a hint about each",
            [line for report in wrong for line in report.problems],
        )
    for result in compiled.values():
        result.raise_fault()
