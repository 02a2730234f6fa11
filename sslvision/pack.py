"""`python -m sslvision.pack data=... output_dir=shards`: write images as tar shards, as WebDataset has them."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("pack")
else:  # imported: sslvision.pack(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
