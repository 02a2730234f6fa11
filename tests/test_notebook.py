"""The notebook, run as it stands in a process of its own, without Jupyter and with everything shortened."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "from_pixels_to_transfer.ipynb"

# As where Jupyter is not installed, wherever the tests run.
BEFORE = "import sys\nsys.modules['IPython'] = None"
AFTER = "import json; print(json.dumps({'folder': str(folder), 'probes': probes, 'right': right, 'answer': answer}))"


@pytest.fixture(scope="module")
def cells():
    """Return the notebook's cells."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def executed(cells, tmp_path_factory):
    """Execute all code cells in one namespace: what they printed, and what they left in their variables."""
    where = tmp_path_factory.mktemp("notebook")
    program = where / "notebook.py"
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    program.write_text("\n\n".join([BEFORE, *sources, AFTER]), encoding="utf-8")
    told = {"SSLVISION_QUICK": "1", "MPLBACKEND": "Agg", "TMPDIR": str(where), "PYTHONUTF8": "1"}
    process = subprocess.run(
        [sys.executable, str(program)],
        cwd=where,
        env=os.environ | told,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    *printed, left = process.stdout.splitlines()
    return printed, json.loads(left)


def test_the_notebook_is_valid_and_holds_no_outputs(cells):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
            assert not "".join(cell["source"]).lstrip().startswith(("%", "!")), cell["id"]


def test_its_links_into_the_project_lead_somewhere(cells):
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:] if not part.startswith("http")]
    assert len(links) >= 3
    for link in links:
        file, _, heading = link.partition("#")
        target = (NOTEBOOK.parent / file).resolve()
        assert target.is_file(), link
        lines = target.read_text(encoding="utf-8").splitlines() if heading else []
        headings = {
            "".join(c for c in line.lstrip("# ").lower().replace(" ", "-") if c.isalnum() or c == "-")
            for line in lines
            if line.startswith("#")
        }
        assert not heading or heading in headings, link


@pytest.mark.e2e
def test_what_it_learns_is_far_above_chance_and_not_what_the_untrained_network_knows(executed):
    _, left = executed
    assert set(left["probes"]) == {
        f"{data}, {weights}" for data in ("embedded", "digits") for weights in ("pretrained", "untrained")
    }
    for name in ("embedded", "digits"):
        pretrained, untrained = (left["probes"][f"{name}, {weights}"] for weights in ("pretrained", "untrained"))
        assert 30 < pretrained["knn"] <= 100  # chance is 10
        assert 30 < pretrained["linear"] <= 100
        assert pretrained != untrained  # an epoch of a shortened run need not be better


@pytest.mark.e2e
def test_every_written_image_gets_a_row_and_most_digits_their_right_label(executed):
    _, left = executed
    with open(Path(left["folder"]) / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    photos = Path(left["folder"]) / "photos"
    assert [row["image"] for row in rows] == sorted(photo.name for photo in photos.iterdir())
    assert [row["image"] for row in rows if row["problem"]] == ["broken.png"]
    assert len(left["right"]) == 30
    assert sum(left["right"]) > 12  # by chance 3
    assert left["answer"] in set("0123456789")  # of the export in plain timm


@pytest.mark.e2e
def test_every_picture_it_shows_is_there_and_not_blank(executed):
    printed, _ = executed
    pictures = [Path(line.removeprefix("picture: ")) for line in printed if line.startswith("picture: ")]
    assert {picture.stem for picture in pictures} >= {
        *("clothes", "digits", "reconstructions", "patch_features", "learning_curve"),
        *("confusion", "comparison", "predictions"),
    }
    for picture in pictures:
        image = imread(picture)[..., :3]
        assert min(image.shape[:2]) > 100, picture
        assert image.std() > 0.05, picture
