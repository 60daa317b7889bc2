"""What is in a model's folder, in a few digits, without reading gigabytes."""

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def fingerprint(folder: Path) -> str:
    """16 hexadecimal digits for a pipeline folder, the same wherever it lies.

    Of every file of every component the name, the size and samples of the contents count: weights
    that were trained further differ everywhere, so samples tell.
    """
    digest = hashlib.sha256()
    for path in [folder / "model_index.json", *sorted(folder.glob("*/**/*"))]:
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{inside.as_posix()} {size}\n".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            # A small file is read as a whole.
            for start in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
