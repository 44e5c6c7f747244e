"""What a GPU is capable of, by name: the one table the planner reads.

Memory is what CUDA reports of it to a process, in GiB, which is less than the number on the
box (80 GB, of which 79.1 GiB are there). Bandwidth and dense throughput, without sparsity, are
those of NVIDIA's data sheets of the SXM form where there is one: A100 (2021-06), H100
(2023-04), H200 (2024-11), B200 (2024-11), L4 (2023-03), L40S (2023-10), and the Ada
architecture's white paper for the RTX 4090. NVLink is the sum of both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import MappingProxyType

from serve_app.core.fit import Gpu
from serve_app.errors import ConfigError

_TB, _GB, _TERA = 1e12, 1e9, 1e12


def _table() -> Mapping[str, Gpu]:
    bf16_only = {"bf16": 312 * _TERA}
    known = [
        Gpu("A100-40GB", 39.4, 1.555 * _TB, bf16_only, 600 * _GB),
        Gpu("A100-80GB", 79.1, 2.039 * _TB, bf16_only, 600 * _GB),
        Gpu("H100", 79.1, 3.35 * _TB, {"bf16": 989 * _TERA, "fp8": 1979 * _TERA}, 900 * _GB),
        Gpu("H200", 139.7, 4.8 * _TB, {"bf16": 989 * _TERA, "fp8": 1979 * _TERA}, 900 * _GB),
        Gpu("B200", 178.3, 8.0 * _TB, {"bf16": 2250 * _TERA, "fp8": 4500 * _TERA}, 1800 * _GB),
        Gpu("L4", 22.0, 300 * _GB, {"bf16": 121 * _TERA, "fp8": 242 * _TERA}),
        Gpu("L40S", 44.3, 864 * _GB, {"bf16": 362 * _TERA, "fp8": 733 * _TERA}),
        Gpu("RTX-4090", 23.5, 1008 * _GB, {"bf16": 165 * _TERA, "fp8": 330 * _TERA}),
    ]
    return MappingProxyType({gpu.name: gpu for gpu in known})


GPUS = _table()


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """Return a GPU by its name, in any case; ``memory_gib`` replaces its memory.

    An unknown one has the memory given and, for all that is not known of it, an H100's speed
    without NVLink.

    Raises:
        ConfigError: it is unknown and its memory is not given; the message names the known ones.
    """
    if memory_gib is not None and not 1 <= memory_gib <= 10_000:
        raise ConfigError(f"--gpu-memory-gib must be from 1 to 10000, not {memory_gib:g}")
    for known in GPUS.values():
        if name.upper() == known.name.upper():
            return known if memory_gib is None else replace(known, memory_gib=memory_gib)
    if memory_gib is not None:
        return replace(GPUS["H100"], name=name, memory_gib=memory_gib, nvlink_bytes_per_s=0.0)
    near = get_close_matches(name.upper(), GPUS, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]}?" if near else "."
    raise ConfigError(
        f"--gpu {name!r:.60} is none of: {', '.join(GPUS)}{guess} "
        "For another one give its memory as CUDA reports it: --gpu-memory-gib"
    )
