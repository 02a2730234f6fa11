"""`python -m sslvision.embed run=... data=...`: write the embeddings of images to files."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("embed")
else:  # imported: sslvision.embed(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
