"""`python -m sslvision.cluster embeddings=... k=10`: groups of images that are alike."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("cluster")
else:  # imported: sslvision.cluster(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
