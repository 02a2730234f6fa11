"""`python -m sslvision.select embeddings=... n=100`: a diverse subset of the images, to label first."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("select")
else:  # imported: sslvision.select(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
