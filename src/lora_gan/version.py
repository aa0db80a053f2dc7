"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("lora-gan")
except PackageNotFoundError:  # imported from a source tree without installation
    __version__ = "0+unknown"
