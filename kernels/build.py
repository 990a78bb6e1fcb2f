"""Native code of csrc/, compiled at first use into a cache folder.  Not at installation: build isolation has no torch, and most users have a GPU.

Any number of processes may ask at once, also for a folder that nodes share: each compiles into a file of its own and renames it, so nobody
sees half an object.  An object carries its own SHA-256, so a damaged one is found before the loader maps it (a truncated one would be a SIGBUS).
Its name says what it was made of and by which compiler; where no compiler answers, one made by any other of the same will do.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
TIMEOUT_S = 300


class BuildError(RuntimeError):
    """Why there is no native code, and what to do."""


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def folders() -> tuple[Path, Path]:
    """Where objects may lie, best first: $MEGATRON_PLUGIN_CACHE or the user's cache; a folder of ours among the temporary files."""
    chosen = os.environ.get("MEGATRON_PLUGIN_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(chosen).expanduser() if chosen else Path(home) / "megatron_plugin", Path(tempfile.gettempdir()) / f"megatron_plugin-{os.getuid()}"


def _refuse_foreign(folder: Path) -> None:
    """OSError if others can write there: anybody could have put a folder of that name into /tmp, with a library in it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()
    if folder.is_symlink() or stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to others or can be written by them")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"'{command[0]}' did not run ({error}); install a C++ compiler or name one in CXX") from error
    if done.returncode:
        raise BuildError(f"'{shlex.join(command)}' failed with exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def _intact(path: Path) -> bool:
    data = path.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _compile(command: list[str], source: Path, path: Path, header: str) -> None:
    """Compile `source`, with the text `header` before it, to `path` and append the digest of the object, which the loader ignores."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
    os.close(handle)
    generated = Path(f"{unfinished}.h")
    try:
        generated.write_text(header)
        _run([*command, "-include", str(generated), str(source), "-o", unfinished])
        with open(unfinished, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o755)  # mkstemp's is private; a cache that an image brings along is for other users too
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
        generated.unlink(missing_ok=True)


def load(source: str, flags: tuple[str, ...], *, compile_with: str | None = None, header: str = "") -> ctypes.CDLL:
    """The library made of csrc/`source` and the headers beside it; compiled if no cached object fits.  BuildError if it cannot be had.

    compile_with: another compiler than `compiler()` (nvcc).  header: generated text that goes before the source.
    """
    tool = [compile_with] if compile_with else compiler()
    files = [CSRC / source, *sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")])]
    made_of = _key(flags, platform.machine(), *platform.libc_ver(), header, [(f.name, f.read_bytes()) for f in files])
    try:
        made_by = _key(tool, _run([*tool, "--version"]))
    except BuildError:  # a machine without a compiler, with a cache from one that has it
        if (library := _any_compilers(made_of)) is None:
            raise
        return library
    reasons = []
    own, temporary = folders()
    for folder in (own, temporary):
        path = folder / f"{made_of}-{made_by}.so"
        try:
            if folder == temporary:
                _refuse_foreign(folder)
            if not (path.exists() and _intact(path)):
                _compile([*tool, *flags], CSRC / source, path, header)
            return ctypes.CDLL(str(path))
        except OSError as error:  # read-only, full, mounted noexec, or an object that does not load here: try the next folder
            reasons.append(f"{path}: {error}")
    raise BuildError(f"no folder to build in ({'; '.join(reasons)}); name a writable one in MEGATRON_PLUGIN_CACHE")


def _key(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _any_compilers(made_of: str) -> ctypes.CDLL | None:
    """A library of these sources, flags and this kind of machine, whichever compiler made it; None if there is none."""
    own, temporary = folders()
    for path in (path for folder in (own, temporary) for path in sorted(folder.glob(f"{made_of}-*.so"))):
        try:
            if path.parent == temporary:
                _refuse_foreign(temporary)
            if _intact(path):
                return ctypes.CDLL(str(path))
        except OSError:  # as in `load`; made for a newer C++ runtime than this machine's, say
            continue
    return None
