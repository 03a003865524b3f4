"""Temporary folders: gone with their command, and those of commands that were killed with the next one."""

import os
import tempfile

from llavanext_cli.inference.scratch import PREFIX, scratch_folder


def test_folders_that_nobody_holds_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("old", "young"):
        (tmp_path / f"{PREFIX}{name}" / "rank_0").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with scratch_folder() as held:
        for path in (held, tmp_path / f"{PREFIX}old", tmp_path / "other"):
            os.utime(path, (0, 0))
        with scratch_folder() as second:
            assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}young", "other", held.name, second.name}
    assert {path.name for path in tmp_path.iterdir()} == {f"{PREFIX}young", "other"}
