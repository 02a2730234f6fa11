"""`python -m sslvision.finetune run=...`: fine-tune a backbone on a small labeled set."""

import sys

if __name__ == "__main__":
    from sslvision.cli.main import main

    main("finetune")
else:  # imported: sslvision.finetune(...) is a call all the same
    from sslvision.cli.functions import CallableModule

    sys.modules[__name__].__class__ = CallableModule
