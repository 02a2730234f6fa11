"""`python -m sslvision.pretrain recipe=mae`: pretrain a backbone on unlabeled images."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("pretrain")
else:  # imported: sslvision.pretrain(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
