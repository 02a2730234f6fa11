"""`sslvision COMMAND [key=value ...]`, the same as `python -m sslvision.COMMAND [key=value ...]`."""

import sys

from sslvision.cli.help import ABOUT
from sslvision.cli.main import main


def run() -> None:
    """Run the command that the first word names."""
    known = "\n".join(f"  sslvision {name:<10}{text}" for name, text in ABOUT.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h"):
        print(f"usage: sslvision COMMAND [key=value ...]\n\n{known}\n\nsslvision COMMAND --help lists its settings.")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv.pop(1)
    if name not in ABOUT:
        print(f"sslvision {name}: there is no such command. These are:\n\n{known}", file=sys.stderr)
        sys.exit(2)
    main(name)


if __name__ == "__main__":
    run()
