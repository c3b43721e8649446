"""smolray: fine-tune small vision-language models on the GPUs that people already have."""

import logging

__version__ = "0.1.0"

# bitsandbytes, which PEFT imports, warns on every start that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
