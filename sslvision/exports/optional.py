"""Packages that only an export needs."""

import importlib.util

from sslvision.errors import UsageError

NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "transformers": ("transformers",),
}  # by format, and extra of that name


def require_packages(format: str) -> None:
    """Raise UsageError if packages that a format needs are not installed."""
    missing = [name for name in NEEDED.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"format={format} needs {' and '.join(missing)}, which {'are' if missing[1:] else 'is'} not installed: "
            f"pip install 'sslvision[{format}]', or choose another format."
        )
