"""`python -m sslvision.probe run=...`: measure frozen features of a backbone on labeled images."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("probe")
else:  # imported: sslvision.probe(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
