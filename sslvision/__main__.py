"""`sslvision COMMAND [key=value ...]`, the same as `python -m sslvision.COMMAND [key=value ...]`."""

import sys

from sslvision.cli.help import ABOUT
from sslvision.cli.main import main


def run() -> None:
    """Run the command that the first word names."""
    known = "\n".join(f"  sslvision {name:<12}{text}" for name, text in ABOUT.items())
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "--help", "-h"):
        print(f"usage: sslvision COMMAND [key=value ...]\n\n{known}\n\nsslvision COMMAND --help lists its settings.")
        sys.exit(0 if name else 2)
    if name not in ABOUT:
        print(f"sslvision {name}: there is no such command. The commands are:\n\n{known}", file=sys.stderr)
        sys.exit(2)
    if "" not in sys.path:  # methods and sources of one's own are found in the current folder, as by `python -m`
        sys.path.insert(0, "")
    main(name, sys.argv[2:])


if __name__ == "__main__":
    run()
