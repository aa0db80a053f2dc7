"""LoRA-GAN: two LoRA adapters on one frozen base, a generator and a discriminator, trained against any reward."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .config import Config

if TYPE_CHECKING:
    from .gan import LoraGAN

try:
    __version__ = version("lora-gan")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Config", "LoraGAN"]


def __getattr__(name: str) -> Any:
    """LoraGAN brings torch along, which takes seconds: `lora-gan --help` must not wait for it."""
    if name == "LoraGAN":
        from .gan import LoraGAN

        return LoraGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
