"""Optional libraries, which an extra installs. They are imported on use, with an error message that names the extra."""

import importlib
from typing import Any


def need(module: str, why: str, extra: str) -> Any:
    """Import a module of an optional library and return it.

    Args:
        module: the module's dotted name.
        why: the reason for the import. It begins the error message.
        extra: the extra of this package that installs the library.

    Raises:
        ImportError: the library is not installed. The message gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{why}: pip install "lora-gan[{extra}]"') from error
