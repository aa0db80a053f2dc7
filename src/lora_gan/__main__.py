"""`python -m lora_gan` runs the command `lora-gan`."""

import sys

from .cli.main import main

sys.exit(main())
