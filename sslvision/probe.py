"""`python -m sslvision.probe run=... data=...`: measure frozen features of a backbone on labeled images."""

from sslvision.cli.main import main

if __name__ == "__main__":
    main("probe")
