"""`python -m sslvision.pretrain recipe=mae`: pretrain a backbone on unlabeled images."""

from sslvision.cli.main import main

if __name__ == "__main__":
    main("pretrain")
