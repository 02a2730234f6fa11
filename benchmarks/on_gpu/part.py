"""Run one part in a process of its own: python -m benchmarks.on_gpu.part PART [word ...], started by run.py."""

import importlib
import inspect
import sys
import warnings

from benchmarks.on_gpu import findings

PARTS = {  # name: module and function
    "env": "environment:environment",
    "checks": "checks:checks",
    "tests": "suite:suite",
    "recipe": "recipe:recipe",
    "trainer": "recipe:trainer",
    "bench": "bench:bench",
    "profile": "kernels:kernels",
    "micro": "micro:micro",
    "loader": "loading:loader",
}


def function_of(part):
    """Return the function of a part; importing its module takes as long as importing torch."""
    module, name = PARTS[part].split(":")
    return getattr(importlib.import_module(f"benchmarks.on_gpu.{module}"), name)


def arguments_of(function, words):
    """Return positional and keyword arguments made of words. A function with *words takes them as they are.

    Raises:
        TypeError: a word is not key=value, or the function has no such argument.
    """
    if any(one.kind is one.VAR_POSITIONAL for one in inspect.signature(function).parameters.values()):
        positional, keywords = words, {}
    else:
        if wrong := [word for word in words if "=" not in word]:
            raise TypeError(f"{wrong[0]} is not key=value")
        positional, keywords = [], dict(word.split("=", 1) for word in words)
        keywords.pop("tag", None)  # of the file of findings
    inspect.signature(function).bind(*positional, **keywords)
    return positional, keywords


def main(part, *words):
    """Run a part."""
    warnings.filterwarnings("ignore")
    for folder in (findings.FOUND, findings.FILES):
        folder.mkdir(parents=True, exist_ok=True)
    findings.current["file"] = findings.FOUND / f"{findings.stem(part, words)}.json"
    function = function_of(part)
    positional, keywords = arguments_of(function, words)
    function(*positional, **keywords)


if __name__ == "__main__":
    main(*sys.argv[1:])
