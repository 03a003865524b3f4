"""Option types that several commands share, so that a command's signature is a list of words.

def mix(mix_file: ..., out: Out, seed: Seed = 0, force: Force = False, json: Json = False) -> None: ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


# Shell completion: completions/ starts one process for each TAB
def complete_preset(incomplete: str) -> list[str]:
    """Names of shipped presets; the shell offers files where no name fits."""
    from llavanext_cli.config.shipped import preset_files

    return [name for name in preset_files() if name.startswith(incomplete)]


def complete_ask_preset(incomplete: str) -> list[str]:
    """Presets for `ask`: those with `-ask` in their names."""
    return [name for name in complete_preset(incomplete) if "-ask" in name]


def complete_train_preset(incomplete: str) -> list[str]:
    """Presets for `train`: all others."""
    return [name for name in complete_preset(incomplete) if "-ask" not in name]


def complete_setting(incomplete: str) -> list[str]:
    """Keys of a preset, each with an equals sign."""
    from llavanext_cli.config.schema import schema_keys

    return [f"{key}=" for key in schema_keys() if key.startswith(incomplete)]


def complete_artifact(incomplete: str) -> list[str]:
    """Artifacts that `fetch --list` shows."""
    from llavanext_cli.fetching.registry import ARTIFACTS

    return [name for name in ARTIFACTS if name.startswith(incomplete)]


# Inputs and outputs
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write the result.", show_default=False)]
Checkpoint = Annotated[
    Path,
    typer.Option("--checkpoint", "-c", help="Folder of weights, as `llavanext convert` writes it.", show_default=False),
]
Data = Annotated[
    Path, typer.Option("--data", "-d", help="Samples, as `llavanext mix` writes them.", show_default=False)
]

# Settings
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one value of the preset, such as data.frames=8. May be repeated.",
        show_default=False,
        autocompletion=complete_setting,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Name or file of a preset: see `llavanext presets list`.",
        autocompletion=complete_preset,
    ),
]
AskPreset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help="Name or file of an ask preset: see `llavanext presets list`.",
        autocompletion=complete_ask_preset,
    ),
]
Devices = Annotated[
    int | None,
    typer.Option("--devices", "-n", min=1, help="Devices to use (NPUs, or CPU workers).", show_default="the preset's"),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", min=1, max=64, help="Downloads at the same time.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-w", min=1, max=1024, help="Processes to use.", show_default="all cores")
]

# Behaviour
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, for other programs.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing result.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]
