"""sslvision: self-supervised pretraining for vision."""

__version__ = "0.1.0"
