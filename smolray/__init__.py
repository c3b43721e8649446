"""smolray: fine-tune small vision-language models on the GPUs that people already have."""

__version__ = "0.1.0"
