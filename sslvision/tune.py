"""`python -m sslvision.tune recipe=mae search=random 'ranges.base_lr=log(1e-4,1e-2)'`: search for good settings."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("tune")
else:  # imported: sslvision.tune(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
