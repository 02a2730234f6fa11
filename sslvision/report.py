"""`python -m sslvision.report outputs/a`: write the report of a run; of several, compare them."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("report")
else:  # imported: sslvision.report(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
