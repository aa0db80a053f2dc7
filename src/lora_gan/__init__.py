"""LoRA-GAN: a generator and a discriminator as two LoRA adapters on one frozen base, trained against any reward."""

from typing import TYPE_CHECKING, Any

from .config import Config

if TYPE_CHECKING:
    from .gan import LoraGAN

    __version__: str

__all__ = ["Config", "LoraGAN"]


def __getattr__(name: str) -> Any:
    """Import slow names on first use: LoraGAN imports torch, which takes seconds, and `lora-gan --help` stays fast."""
    if name == "LoraGAN":
        from .gan import LoraGAN

        return LoraGAN
    if name == "__version__":
        from .version import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
