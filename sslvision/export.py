"""`python -m sslvision.export run=... format=...`: a folder that other libraries load, compared with the original."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("export")
else:  # imported: sslvision.export(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
