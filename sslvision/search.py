"""`python -m sslvision.search embeddings=... image=...`: the images nearest to an image."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("search")
else:  # imported: sslvision.search(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
