"""Files of Debian packages, downloaded and unpacked into a cache without being installed. Needs no rights of root."""

import shutil
import subprocess
import tempfile
from pathlib import Path


def unpacked(names: list[str], cache: Path) -> dict[str, Path]:
    """A folder for each package: one that is in the cache already (of several the last by name), else what apt has.

    Args:
        names: of packages.
        cache: folder of the unpacked packages, each in ``<name>_<version>``.

    Raises:
        ValueError: a package is not in the cache and cannot be downloaded.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _versions(cache, name)]
    if missing:
        _download(missing, cache)
    return {name: _versions(cache, name)[-1] for name in names}


def _versions(cache: Path, name: str) -> list[Path]:
    return sorted(cache.glob(f"{name}_*"))


def _download(names: list[str], cache: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise ValueError(_cannot(names, cache, "there is no apt-get here"))
    print(f"downloading {len(names)} Debian packages into {cache}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        done = subprocess.run(
            ["apt-get", "download", "-q", *names], cwd=scratch, capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr.strip())
            raise ValueError(_cannot(names, cache, reason))
        for archive in sorted(Path(scratch).glob("*.deb")):
            name, version = archive.name.split("_")[:2]
            folder = Path(scratch, f"{name}_{version}")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, capture_output=True)
            folder.rename(cache / folder.name)


def _cannot(names: list[str], cache: Path, reason: str) -> str:
    return (
        f"the corpus needs the Debian packages {', '.join(names)}, which cannot be downloaded: {reason}; unpack each "
        f"into {cache}/<package>_<version>/, or choose corpus=standard_library"
    )
