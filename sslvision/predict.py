"""`python -m sslvision.predict run=... images=...`: label new images with a fine-tuned run."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("predict")
else:  # imported: sslvision.predict(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
