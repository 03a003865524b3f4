"""Files that are whole or not there."""

import pytest

from llavanext_cli.files import replacing, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "a.json"
    for data in (b"first", b"second"):
        write_whole(file, data)
        assert file.read_bytes() == data
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"before")
    with pytest.raises(OSError, match="no room"), replacing(file) as partial:
        assert partial.suffix == ".png"
        partial.write_bytes(b"half")
        raise OSError("no room")
    assert file.read_bytes() == b"before" and list(tmp_path.iterdir()) == [file]
