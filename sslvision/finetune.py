"""`python -m sslvision.finetune run=... data=...`: fine-tune a backbone on a small labeled set."""

from sslvision.cli.main import main

if __name__ == "__main__":
    main("finetune")
