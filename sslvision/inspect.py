"""`python -m sslvision.inspect backbone.name=...`: measure what networks cost, and what they see."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("inspect")
else:  # imported: sslvision.inspect(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
