"""The small files of a run folder."""

import json

import pytest

from sslvision.runs.run_files import write_json


def test_a_file_name_that_is_not_utf_8_does_not_keep_results_from_being_written(tmp_path):
    content = {"findings": ["1 file is left out: stray\udce9.png", "größer"]}
    write_json(tmp_path / "results.json", content)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == content


def test_results_that_cannot_be_written_leave_those_that_were_there(tmp_path):
    write_json(tmp_path / "results.json", {"top1": 50})
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"top1": object()})
    assert json.loads((tmp_path / "results.json").read_text()) == {"top1": 50}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
