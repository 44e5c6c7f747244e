"""Where GPU faults are learned: DCGM's exporter, a file of the same text, or NVML itself."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

from serve_app.core.gpu_faults import xid_fault
from serve_app.core.gpu_readings import SIGNALS, XID_COUNT, Findings, ReadingHistory, Sample

logger = logging.getLogger("headrace.gpu")

TEXT_BYTES_MAX: Final = 4 * 2**20
TIMEOUT_S: Final = 5.0
# NVML's own default is to wait for ever.
NVML_WAIT_MS: Final = 10
NVML_EVENTS_MAX: Final = 256


class SourceFailed(Exception):
    """The source cannot be read now; the message says why."""


class FaultSource(Protocol):
    """Tells what has happened to the node's GPUs since it was asked before."""

    async def look(self) -> Findings:
        """Return what is new.

        Raises:
            SourceFailed: it cannot be read.
        """


class TextSource:
    """DCGM's metrics as its exporter writes them, wherever the text comes from."""

    def __init__(self, read: Callable[[], Any]) -> None:
        """``read`` is awaited and returns the text, or raises SourceFailed."""
        self._read = read
        self._history = ReadingHistory()

    async def look(self) -> Findings:
        """See FaultSource."""
        return self._history.look(samples(await self._read()))


def dcgm_source(url: str, client: httpx.AsyncClient) -> TextSource:
    """Return a source that scrapes DCGM's exporter, usually http://NODE:9400/metrics."""

    async def read() -> str:
        try:
            # httpx's own timeout is for each read: an answer in drops would never end.
            async with asyncio.timeout(TIMEOUT_S):
                return await _scrape(url, client)
        except TimeoutError as error:
            raise SourceFailed(f"{url}: no whole answer within {TIMEOUT_S:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceFailed(f"{url}: {error or type(error).__name__}") from error

    return TextSource(read)


async def _scrape(url: str, client: httpx.AsyncClient) -> str:
    text = bytearray()
    # A few compressed bytes may be any number of others.
    plain = {"accept-encoding": "identity"}
    async with client.stream("GET", url, headers=plain, timeout=TIMEOUT_S) as answer:
        answer.raise_for_status()
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise SourceFailed(f"{url}: answers compressed, unasked")
        async for part in answer.aiter_bytes():
            text += part
            if len(text) > TEXT_BYTES_MAX:
                raise SourceFailed(f"{url}: more than {TEXT_BYTES_MAX} bytes of metrics")
    return text.decode(errors="replace")


def file_source(path: Path) -> TextSource:
    """Return a source that reads the exporter's text from a file: a GPU that is imagined."""

    async def read() -> str:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.to_thread(_read_file, path)
        except TimeoutError as error:
            raise SourceFailed(f"{path}: not read within {TIMEOUT_S:g} s") from error
        except (OSError, ValueError) as error:
            raise SourceFailed(f"{path}: {error}") from error

    return TextSource(read)


def _read_file(path: Path) -> str:
    # A pipe without a writer would hold this thread for ever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise SourceFailed(f"{path}: no regular file")
    with path.open("rb") as file:
        text = file.read(TEXT_BYTES_MAX + 1)
    if len(text) > TEXT_BYTES_MAX:
        raise SourceFailed(f"{path}: more than {TEXT_BYTES_MAX} bytes of metrics")
    return text.decode()


def samples(text: str) -> list[Sample]:
    """Return the numbers that matter.

    Raises:
        SourceFailed: the text is no Prometheus text, or has none of DCGM's numbers.
    """
    found = []
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name in SIGNALS:
                    found.append(_sample(sample.name, sample.labels, float(sample.value)))
    except (ValueError, KeyError, IndexError) as error:
        raise SourceFailed(f"not Prometheus text: {error!s:.200}") from error
    if not found:
        names = ", ".join(sorted(SIGNALS))
        raise SourceFailed(f"the exporter has none of {names}: enable them in its counters file")
    return found


def _sample(name: str, labels: dict[str, str], value: float) -> Sample:
    gpu = labels.get("UUID") or labels.get("gpu") or "?"
    xid = labels.get("xid", "")
    is_count = name == XID_COUNT and xid.isascii() and xid.isdigit() and len(xid) < 6
    return Sample(gpu, name, value, int(xid) if is_count else None)


class NvmlSource:
    """NVML's own events: every XID as it happens, without an exporter."""

    def __init__(self, nvml: ModuleType) -> None:
        """``nvml`` is the module pynvml.

        Raises:
            SourceFailed: there is no driver, or a GPU reports no XIDs.
        """
        self._nvml: Any = nvml
        # By their handles: a GPU that fell off the bus does not tell its name any more.
        self._names: dict[Any, str] = {}
        self._problem: str | None = None
        try:
            self._nvml.nvmlInit()
            self._events = self._nvml.nvmlEventSetCreate()
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            raise SourceFailed(f"NVML: {error}") from error
        problems = [each for each in map(self._register, range(count)) if each]
        if len(problems) == count:
            raise SourceFailed(
                f"NVML: no GPU reports XIDs: {'; '.join(problems) or 'there is none'}"
            )
        for problem in problems:
            logger.error("gpu not watched", extra={"reason": problem})

    def _register(self, index: int) -> str | None:
        """Have a GPU's XIDs reported; return what is in the way."""
        nvml = self._nvml
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetUUID(device)
            nvml.nvmlDeviceRegisterEvents(device, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError as error:
            return f"GPU {index}: {error}"
        self._names[_handle(device)] = name.decode() if isinstance(name, bytes) else str(name)
        return None

    async def look(self) -> Findings:
        """See FaultSource. What was found before an error is returned; the error comes next."""
        return await asyncio.to_thread(self._drain)

    def _drain(self) -> Findings:
        found = Findings()
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise SourceFailed(problem)
        for _ in range(NVML_EVENTS_MAX):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, NVML_WAIT_MS)
            except self._nvml.NVMLError_Timeout:
                break
            except self._nvml.NVMLError as error:
                if not found.faults:
                    raise SourceFailed(f"NVML: {error}") from error
                self._problem = f"NVML: {error}"
                break
            name = self._names.get(_handle(event.device), "?")
            found.faults.append(xid_fault(name, int(event.eventData)))
        return found


def _handle(device: Any) -> Any:
    """Return what two handles of one GPU have in common: pointers are equal only by address."""
    if isinstance(device, ctypes._Pointer):
        return ctypes.addressof(device.contents)
    return device


def nvml_source() -> NvmlSource:
    """Return a source on this machine's driver.

    Raises:
        SourceFailed: pynvml (nvidia-ml-py) is not installed, or there is no driver.
    """
    return NvmlSource(load_nvml())


def load_nvml() -> ModuleType:
    """Return pynvml.

    Raises:
        SourceFailed: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise SourceFailed("pynvml is not installed: pip install nvidia-ml-py") from error
