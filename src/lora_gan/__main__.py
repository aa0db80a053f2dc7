"""`python -m lora_gan` is the command `lora-gan`."""

import sys

from .cli import main

sys.exit(main())
