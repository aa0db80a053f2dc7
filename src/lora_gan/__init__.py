"""LoRA-GAN: two LoRA adapters on one frozen base, a generator and a discriminator, trained against any reward."""

from typing import TYPE_CHECKING, Any

from .config import Config

if TYPE_CHECKING:
    from .gan import LoraGAN

    __version__: str

__all__ = ["Config", "LoraGAN"]


def __getattr__(name: str) -> Any:
    """What is slow to import: LoraGAN needs torch, which takes seconds, and `lora-gan --help` must not wait for it."""
    if name == "LoraGAN":
        from .gan import LoraGAN

        return LoraGAN
    if name == "__version__":
        from .version import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
