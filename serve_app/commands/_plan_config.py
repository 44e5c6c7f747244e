"""``--config FILE --pool P`` of `headrace plan`: a pool that is served, in place of options."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.config import PoolArgs, SimSettings, VllmSettings
    from serve_app.config_costs import CostSettings
    from serve_app.config_file import ServeFile
    from serve_app.core.engine_parts import EngineParams

_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
NANO: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Configured:
    """A pool of a configuration; ``engine`` is what a simulated one runs, else None."""

    name: str
    engine: EngineParams | None


class _Stated(argparse.Action):
    """Stores an option's value, and that it was given: it then counts before a configuration."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.stated = (*getattr(namespace, "stated", ()), self.dest)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the file and the pool; call it before other options are added."""
    parser.register("action", None, _Stated)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a configuration: model, engine, bounds, price and knee of a pool of it, where no "
        "other option says otherwise",
    )
    parser.add_argument("--pool", metavar="NAME", help="which one (default: the only one)")


def configured(args: argparse.Namespace) -> Configured | None:
    """Fill in what a configuration says and no option; return the pool, None without a file.

    Raises:
        ConfigError: the file or the pool is unusable; the message says how.
    """
    if args.config is None:
        if args.pool is not None:
            raise ConfigError("--pool names a pool of a configuration; give --config with it")
        return None
    from serve_app import config_file
    from serve_app.config import SimSettings

    file = config_file.load(args.config)
    pool = _pool(file, args.config, args.pool)
    found = _told_by_routers(file, pool) | _told_by_pool(pool, file.control.costs)
    engine = None
    if isinstance(pool.engine, SimSettings):
        engine = _simulated(pool.engine)
        found |= {"max_num_seqs": engine.max_num_seqs, "token_budget": engine.token_budget}
    else:
        found |= _told_by_engine(pool.engine)
    stated = getattr(args, "stated", ())
    for name, value in found.items():
        if name not in stated:
            setattr(args, name, value)
    return Configured(pool.name, engine)


def _pool(file: ServeFile, path: str, name: str | None) -> PoolArgs:
    pools = file.pools
    if name is None and len(pools) == 1:
        return next(iter(pools.values()))
    if name not in pools:
        known = ", ".join(sorted(pools))
        problem = "which pool?" if name is None else f"there is no pool {name!r}"
        raise ConfigError(f"{path}: {problem} --pool is one of {known}")
    return pools[name]


def _told_by_routers(file: ServeFile, pool: PoolArgs) -> dict[str, Any]:
    scaling = file.router.pools[pool.name].scaling
    found: dict[str, Any] = {
        "safety_ratio": scaling.safety_ratio,
        "cold_start_s": scaling.cold_start_s,
    }
    if scaling.knee_concurrency is not None:
        found["knee_concurrency"] = max(1, round(scaling.knee_concurrency))
    return found


def _told_by_pool(pool: PoolArgs, costs: CostSettings) -> dict[str, Any]:
    # A pool that runs holds what it is given; whether it should hold more is `fit`'s question.
    found: dict[str, Any] = {"concurrency": 1}
    if pool.replicas.bounds is not None:
        found["min_replicas"], found["max_replicas"] = pool.replicas.bounds
    price = costs.prices().get(pool.instance or pool.name)
    if price is not None:
        now_ns = time.time_ns()
        usable = [rate for rate in price.rates if rate.from_ns <= now_ns] or price.rates[:1]
        gpus = 1.0 if price.per_gpu else max(1.0, pool.replicas.num_gpus)
        found["usd_per_gpu_hour"] = usable[-1].hourly_nanousd / NANO / gpus
    return found


def _told_by_engine(engine: VllmSettings) -> Mapping[str, Any]:
    kv_type = "fp8" if engine.kv_cache_dtype.startswith("fp8") else "auto"
    dtype = "auto" if engine.quantization else _DTYPES.get(engine.dtype, "auto")
    found: dict[str, Any] = {
        "model": engine.model,
        "dtype": dtype,
        "quantization": engine.quantization,
        "kv_dtype": kv_type,
        "max_num_seqs": engine.max_num_seqs,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "tensor_parallel": engine.tensor_parallel_size,
    }
    if engine.max_model_len is not None:
        found["context_tokens"] = engine.max_model_len
    if engine.max_num_batched_tokens is not None:
        found["token_budget"] = engine.max_num_batched_tokens
    return found


def _simulated(engine: SimSettings) -> EngineParams:
    """Return what a simulated pool's engines run; the same as engine/sim.py makes of it."""
    from dataclasses import fields

    from serve_app.core.engine_parts import EngineParams

    given = dict(engine)
    return EngineParams(**{f.name: given[f.name] for f in fields(EngineParams) if f.name in given})
