"""Sphinx configuration. Build with: sphinx-build -n -W docs docs/_build"""

import shutil
from pathlib import Path

HERE = Path(__file__).parent
shutil.copy(HERE.parent / "notebooks" / "from_pixels_to_transfer.ipynb", HERE / "notebook.ipynb")  # as it is: not run

project = "sslvision"
author = "the sslvision authors"
extensions = ["myst_nb"]  # MyST Markdown, and notebooks
nb_execution_mode = "off"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sslvision"
myst_heading_anchors = 3  # links such as long-runs.md#exit-codes, as on GitHub
suppress_warnings = ["myst.header"]  # benchmarks/RESULTS.md and CHANGELOG.md are included below a heading of their own
