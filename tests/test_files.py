import os

import pytest

from biomedlm_jax import files
from biomedlm_jax.errors import UserError


def test_a_folder_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ZeroDivisionError), files.complete_folder("sub/../out") as folder:
        (folder / "half").write_text("")
        assert not (tmp_path / "out").exists()
        1 / 0  # noqa: B018
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "sub"]
    with files.complete_folder("sub/../out") as folder:
        (folder / "whole").write_text("")
    assert os.listdir(tmp_path / "out") == ["whole"] and os.listdir(theirs) == ["thesis.txt"]


def test_a_file_is_replaced_or_left(tmp_path):
    path = tmp_path / "file"
    files.replace_file(path, b"old")
    files.replace_file(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_a_lock_is_held_by_one(tmp_path):
    def refuse():
        raise UserError("taken")

    with (
        files.lock(tmp_path / "lock", refuse),
        pytest.raises(UserError, match="taken"),
        files.lock(tmp_path / "lock", refuse),
    ):
        pass
    with files.lock(tmp_path / "lock", refuse):
        pass
