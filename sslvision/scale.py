"""`python -m sslvision.scale recipe=mae budget=30m`: train a ladder of sizes, and fit scaling laws."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("scale")
else:  # imported: sslvision.scale(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
