"""`python -m sslvision.outliers embeddings=...`: the images least like any others."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("outliers")
else:  # imported: sslvision.outliers(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
