"""What may differ in a what-if of `headrace plan replay`: ``gpu=H200,price=3.5`` and such."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING

from serve_app.commands._plan_model import KV_TYPES, QUANTIZATIONS, Served, estimate
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.core.engine_parts import EngineParams
    from serve_app.core.sizing import TrafficProfile
    from serve_app.sim.backtest import Spot

KEYS = (
    "gpu", "price", "quantization", "kv", "cache-hit", "step-time", "spot", "discount",
    "interruptions",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Base:
    """What a case stands on: the model as served, its engine, price and traffic."""

    model: Served
    engine: EngineParams
    gpus: int
    usd_per_gpu_hour: float | None
    profile: TrafficProfile
    cached_ratio: float | None = None
    spot: Spot | None = None


def what_if(text: str, base: Base) -> Base:
    """Return the base with what ``text`` changes; the engine moves as its estimate does.

    Raises:
        ConfigError: a key or a value is unusable; the message names it.
    """
    wishes = _parse(text)
    _check_together(text, wishes, base)
    changed = _hardware(text, wishes, base)
    usd = changed.usd_per_gpu_hour
    if "price" in wishes:
        usd = _number(text, wishes, "price", 0.0, 100_000.0)
    if "step-time" in wishes:
        changed = replace(
            changed, engine=_slower(changed.engine, _number(text, wishes, "step-time", 0.01, 100.0))
        )
    cached_ratio = None
    if "cache-hit" in wishes:
        cached_ratio = _number(text, wishes, "cache-hit", 0.0, 0.99)
        changed = replace(changed, profile=replace(changed.profile, cached_ratio=cached_ratio))
    return replace(
        changed, usd_per_gpu_hour=usd, cached_ratio=cached_ratio, spot=_spot(text, wishes)
    )


def _parse(text: str) -> dict[str, str]:
    wishes: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or not value:
            raise ConfigError(f"--what-if {text!r:.80}: {part!r:.40} is not KEY=VALUE")
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--what-if {text!r:.80}: {key!r:.40} is none of {', '.join(KEYS)}{guess}"
            )
        if key in wishes:
            raise ConfigError(f"--what-if {text!r:.80}: {key} is given twice")
        wishes[key] = value
    return wishes


def _check_together(text: str, wishes: dict[str, str], base: Base) -> None:
    for key in ("discount", "interruptions"):
        if key in wishes and "spot" not in wishes:
            raise ConfigError(f"--what-if {text!r:.80}: {key} is of spot replicas; give spot=SHARE")
    if base.usd_per_gpu_hour is None and "price" in wishes:
        raise ConfigError(
            f"--what-if {text!r:.80}: a price has nothing to be compared with; give "
            "--usd-per-gpu-hour"
        )
    if base.usd_per_gpu_hour is not None and "gpu" in wishes and "price" not in wishes:
        raise ConfigError(
            f"--what-if {text!r:.80}: another GPU has another price; add price=USD per hour"
        )


def _hardware(text: str, wishes: dict[str, str], base: Base) -> Base:
    """Return the base on another GPU or with other bits."""
    from serve_app.core.step_estimate import rescale
    from serve_app.gpus import find_gpu

    model = base.model
    wish = model.wish
    if "quantization" in wishes:
        name = wishes["quantization"]
        if name not in QUANTIZATIONS:
            raise ConfigError(
                f"--what-if {text!r:.80}: quantization is none of {', '.join(QUANTIZATIONS)}"
            )
        if model.shape.quantized:
            raise ConfigError(
                f"--what-if {text!r:.80}: {model.shape.name} is stored in "
                f"{model.shape.weights_type} already"
            )
        wish = replace(wish, weights_type=QUANTIZATIONS[name])
    if "kv" in wishes:
        if wishes["kv"] not in KV_TYPES:
            raise ConfigError(f"--what-if {text!r:.80}: kv is none of {', '.join(KV_TYPES)}")
        wish = replace(wish, kv_type=KV_TYPES[wishes["kv"]])
    gpu = model.gpu
    if "gpu" in wishes:
        try:
            gpu = find_gpu(wishes["gpu"])
        except ConfigError as error:
            raise ConfigError(f"--what-if {text!r:.80}: {error}") from error
    if (wish, gpu) == (model.wish, model.gpu):
        return base
    served = replace(model, wish=wish, gpu=gpu)
    before, _ = estimate(model)
    after, trial = estimate(served)
    engine = rescale(base.engine, before, after)
    return replace(base, model=served, engine=engine, gpus=trial.layout.gpus)


def _slower(engine: EngineParams, times: float) -> EngineParams:
    """Return an engine all of whose steps take ``times`` as long."""
    return replace(
        engine,
        overhead_s=engine.overhead_s * times,
        weights_s=engine.weights_s * times,
        prefill_s_per_token=engine.prefill_s_per_token * times,
        context_s_per_token=engine.context_s_per_token * times,
        batch_s_per_request=engine.batch_s_per_request * times,
    )


def _spot(text: str, wishes: dict[str, str]) -> Spot | None:
    from serve_app.sim.backtest import Spot

    if "spot" not in wishes:
        return None
    spot = Spot(_number(text, wishes, "spot", 0.0, 1.0))
    if "discount" in wishes:
        spot = replace(spot, discount_ratio=_number(text, wishes, "discount", 0.0, 1.0))
    if "interruptions" in wishes:
        rate = _number(text, wishes, "interruptions", 0.0, 3600.0)
        spot = replace(spot, interruptions_per_hour=rate)
    return spot


def _number(text: str, wishes: dict[str, str], key: str, least: float, most: float) -> float:
    try:
        value = float(wishes[key])
    except ValueError:
        value = float("nan")
    if not isfinite(value) or not least <= value <= most:
        raise ConfigError(
            f"--what-if {text!r:.80}: {key} must be a number from {least:g} to {most:g}, not "
            f"{wishes[key]!r:.40}"
        )
    return value
