"""`python -m sslvision.segment run=... masks=...`: measure the features of patches on images with masks."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("segment")
else:  # imported: sslvision.segment(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
