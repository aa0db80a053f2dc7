"""`python -m lora_gan` is the command `lora-gan`."""

import sys

from .cli.main import main

sys.exit(main())
