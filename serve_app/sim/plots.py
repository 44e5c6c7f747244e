"""Curves as PNG files. Needs the ``plots`` extra; nothing else imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.sim.compare import Result
from serve_app.sim.knee import Knee

SMOOTHED_S = 5


def draw(results: Sequence[Result], title: str, folder: Path) -> list[Path]:
    """Write goodput, TTFT, service, queue and rung plots into ``folder``; return the files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pictures: list[tuple[str, Callable[[Any, Sequence[Result]], None]]] = [
        ("goodput", _goodput),
        ("ttft", _ttft),
        ("service", _service),
        ("queue", _queue),
        ("rung", _rung),
    ]
    files = []
    for name, picture in pictures:
        figure, axes = _canvas(f"{title}: {name}")
        picture(axes, results)
        files.append(_save(figure, axes, folder / f"{name}.png"))
    return files


def draw_knee(knee: Knee, title: str, folder: Path) -> Path:
    """Write goodput against offered rate, with the knee marked; return the file."""
    figure, axes = _canvas(f"{title}: goodput against rate")
    offered = [point.offered_per_s for point in knee.points]
    axes.plot(offered, [point.goodput_per_s for point in knee.points], marker="o", label="goodput")
    axes.plot(offered, offered, linestyle=":", color="grey", label="offered")
    axes.axvline(knee.rate_per_s, color="red", linestyle="--", label="knee")
    axes.set_xlabel("offered, requests/s")
    axes.set_ylabel("good, requests/s")
    return _save(figure, axes, folder / "knee.png")


def _canvas(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, file: Path) -> Path:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)
    return file


def _smooth(counts: Sequence[float]) -> list[float]:
    return [
        sum(counts[max(0, place - SMOOTHED_S + 1) : place + 1])
        / len(counts[max(0, place - SMOOTHED_S + 1) : place + 1])
        for place in range(len(counts))
    ]


def _goodput(axes: Any, results: Sequence[Result]) -> None:
    offered = _smooth(results[0].curves.offered)
    axes.plot(offered, color="grey", linestyle=":", label="offered")
    for result in results:
        axes.plot(_smooth(result.curves.good), label=result.contender)
    axes.set_xlabel("time of arrival, s")
    axes.set_ylabel("good, requests/s")


def _ttft(axes: Any, results: Sequence[Result]) -> None:
    for result in results:
        for name, values in result.curves.ttft_s.items():
            shares = [place / 100 for place in range(len(values))]
            axes.plot(values, shares, label=f"{result.contender}, {name}")
    axes.set_xscale("log")
    axes.set_xlabel("TTFT, s")
    axes.set_ylabel("share of the class's answers")


def _service(axes: Any, results: Sequence[Result]) -> None:
    width = 0.8 / len(results)
    for place, result in enumerate(results):
        names = list(result.curves.service)
        positions = [number + place * width for number in range(len(names))]
        axes.bar(positions, list(result.curves.service.values()), width, label=result.contender)
    names = list(results[0].curves.service)
    axes.set_xticks([number + 0.4 for number in range(len(names))], names, rotation=60)
    axes.axhline(1.0, color="grey", linestyle=":")
    axes.set_ylabel("served / max-min fair share")


def _queue(axes: Any, results: Sequence[Result]) -> None:
    for result in results:
        samples = result.curves.samples
        times = [sample.at_s for sample in samples]
        line = axes.plot(times, [sample.queued for sample in samples], label=result.contender)[0]
        in_flight = [sample.in_flight for sample in samples]
        axes.plot(times, in_flight, linestyle=":", color=line.get_color())
    axes.set_yscale("symlog")
    axes.set_xlabel("s")
    axes.set_ylabel("requests queued (line), in engines (dots)")


def _rung(axes: Any, results: Sequence[Result]) -> None:
    for result in results:
        samples = result.curves.samples
        times = [sample.at_s for sample in samples]
        axes.step(times, [sample.rung for sample in samples], label=result.contender)
    axes.set_ylim(-0.2, 4.2)
    axes.set_xlabel("s")
    axes.set_ylabel("brownout rung")
