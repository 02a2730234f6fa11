"""`python -m sslvision.duplicates embeddings=...`: images that are copies of one another."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("duplicates")
else:  # imported: sslvision.duplicates(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
