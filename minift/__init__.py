"""minift: fine-tuning of large language models from first principles."""

__version__ = "0.1.0"
