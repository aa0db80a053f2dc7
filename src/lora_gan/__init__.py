"""LoRA-GAN: two LoRA adapters on one frozen base, a generator and a discriminator, trained against any reward."""

from typing import TYPE_CHECKING, Any

from .config import Config
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .gan import LoraGAN

__all__ = ["Config", "LoraGAN"]


def __getattr__(name: str) -> Any:
    """LoraGAN brings torch along, which takes seconds: `lora-gan --help` must not wait for it."""
    if name == "LoraGAN":
        from .gan import LoraGAN

        return LoraGAN
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
