"""`python -m sslvision.predict run=... images=...`: label new images with a fine-tuned run."""

from sslvision.cli.main import main

if __name__ == "__main__":
    main("predict")
