"""smolray: fine-tune small vision-language models on the GPUs that people already have."""

import gc
import logging

__version__ = "0.1.0"

# bitsandbytes, which PEFT imports, warns on every start that an optional CPU kernel is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Torch and transformers make a million objects that stay. By default the garbage collector runs after every 700 new
# objects, which is a sixth of the CPU time of a start, in every process of a run. It may run rarely: steps and answers
# leave no tensor to it (tests/recipes/test_garbage.py).
gc.set_threshold(50_000)
