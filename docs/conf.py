"""Sphinx configuration. Build with: sphinx-build -n -W docs docs/_build"""

project = "sslvision"
author = "the sslvision authors"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sslvision"
myst_heading_anchors = 3  # links such as long-runs.md#exit-codes, as on GitHub
suppress_warnings = ["myst.header"]  # benchmarks/RESULTS.md and CHANGELOG.md are included below a heading of their own
