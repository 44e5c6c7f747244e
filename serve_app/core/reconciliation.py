"""An hour of a node: what it was billed, and what we say it was used for.

Amounts are whole nano-dollars. A node's charges are its replicas' time at the node's rate,
idle time apart; its bill comes from outside. The gap is the bill less both, and is given
as such: nothing is scaled to make it vanish.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Final

from serve_app.core.calendar import HOUR_NS

GAP_RATIO_ALERT: Final = Fraction(1, 100)


class Finding(StrEnum):
    """What the comparison of one node came to."""

    AGREES = "agrees"
    GAP = "gap"
    NO_BILL = "no_bill"  # the bill lacks the node, or its amount is not a number
    FREE = "free"  # billed at zero and yet used
    NO_GPU = "no_gpu"  # the bill knows no GPU where we used one
    NO_PRICE = "no_price"  # used, and nothing says at what price
    UNKNOWN_NODE = "unknown_node"  # billed, and nothing of ours ran there

    @property
    def alarms(self) -> bool:
        """Whether it is something that somebody should look into."""
        return self not in (Finding.AGREES, Finding.UNKNOWN_NODE)


# Of several hours' findings the first of these is the node's.
_WORST_FIRST: Final = (
    *(Finding.NO_GPU, Finding.FREE, Finding.NO_PRICE, Finding.GAP, Finding.NO_BILL),
    *(Finding.AGREES, Finding.UNKNOWN_NODE),
)


@dataclass(frozen=True, slots=True)
class Rate:
    """What a node costs from ``from_ns`` on, in nano-dollars an hour."""

    from_ns: int
    hourly_nanousd: int


@dataclass(frozen=True, slots=True)
class NodeCharge:
    """What we say a node was used for in the hour; ``gpus`` of it are ours.

    ``unpriced`` says that a part of its use has no price and is in no amount.
    """

    node: str
    attributed_nanousd: int
    idle_nanousd: int
    gpus: float = 0
    unpriced: bool = False


@dataclass(frozen=True, slots=True)
class NodeBill:
    """What a node was billed for the hour; None where the bill does not say."""

    node: str
    total_nanousd: int | None
    gpu_hours: Fraction | None = None


@dataclass(frozen=True, slots=True)
class NodeGap:
    """One node compared. ``gap_ratio`` is of the bill; None without one."""

    node: str
    finding: Finding
    attributed_nanousd: int = 0
    idle_nanousd: int = 0
    billed_nanousd: int | None = None
    gap_nanousd: int | None = None
    gap_ratio: Fraction | None = None


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """All nodes of an hour, by name. The ratio is over those with a charge and a bill."""

    nodes: tuple[NodeGap, ...]
    gap_nanousd: int
    gap_ratio: Fraction | None
    alert: bool


def cost_nanousd(rates: Sequence[Rate], from_ns: int, until_ns: int) -> int:
    """Return what a node costs in a stretch of time, its rate changing within it or not.

    ``rates`` are in the order of time; before the first the node costs nothing. Stretches
    that follow one another come to what the whole one does, to the nano-dollar.
    """
    return _cost_upto(rates, until_ns) - _cost_upto(rates, from_ns)


def reconcile(
    charges: Iterable[NodeCharge],
    bills: Iterable[NodeBill],
    *,
    alert_ratio: Fraction = GAP_RATIO_ALERT,
) -> Reconciliation:
    """Compare an hour's charges with its bills.

    Several charges of one node add up, and so do its bills: one without an amount leaves
    the node without a bill. An alert is raised by every finding that alarms, a gap above
    ``alert_ratio`` among them.
    """
    charged = _charges_by_node(charges)
    billed = bills_by_node(bills)
    nodes = [
        _compare(node, charged.get(node), billed.get(node), alert_ratio)
        for node in sorted(charged.keys() | billed.keys())
    ]
    return _together(nodes)


def over_hours(
    hours: Iterable[Reconciliation], *, alert_ratio: Fraction = GAP_RATIO_ALERT
) -> Reconciliation:
    """Return several hours as one: each node's amounts of the hours that could be compared.

    A node has the worst finding of its hours, whichever came last. Gaps that cancel out over the
    hours are none here; each hour has its own alert.
    """
    last: dict[str, NodeGap] = {}
    compared: dict[str, NodeGap] = {}
    found: dict[str, set[Finding]] = {}
    for hour in hours:
        for each in hour.nodes:
            last[each.node] = each
            # Whether there is a gap is a matter of the sum.
            finding = Finding.AGREES if each.finding is Finding.GAP else each.finding
            found.setdefault(each.node, set()).add(finding)
            if each.gap_nanousd is None or each.billed_nanousd is None:
                continue
            before = compared.get(each.node, NodeGap(each.node, Finding.AGREES, 0, 0, 0, 0))
            compared[each.node] = NodeGap(
                each.node,
                Finding.AGREES,
                before.attributed_nanousd + each.attributed_nanousd,
                before.idle_nanousd + each.idle_nanousd,
                (before.billed_nanousd or 0) + each.billed_nanousd,
                (before.gap_nanousd or 0) + each.gap_nanousd,
            )
    nodes = [
        _judged(compared.get(node, last[node]), found[node], alert_ratio) for node in sorted(last)
    ]
    return _together(nodes)


def _judged(node: NodeGap, found: set[Finding], alert_ratio: Fraction) -> NodeGap:
    if node.gap_nanousd is not None and node.billed_nanousd:
        ratio = Fraction(node.gap_nanousd, node.billed_nanousd)
        node = replace(node, gap_ratio=ratio)
        if abs(ratio) > alert_ratio:
            found = found | {Finding.GAP}
    return replace(node, finding=min(found, key=_WORST_FIRST.index))


def _together(nodes: Sequence[NodeGap]) -> Reconciliation:
    both = [each for each in nodes if each.gap_nanousd is not None]
    gap = sum(each.gap_nanousd or 0 for each in both)
    total = sum(each.billed_nanousd or 0 for each in both)
    return Reconciliation(
        tuple(nodes),
        gap,
        Fraction(gap, total) if total else None,
        any(each.finding.alarms for each in nodes),
    )


def _compare(
    node: str, charge: NodeCharge | None, bill: NodeBill | None, alert_ratio: Fraction
) -> NodeGap:
    billed = None if bill is None else bill.total_nanousd
    if charge is None:
        return NodeGap(node, Finding.UNKNOWN_NODE, billed_nanousd=billed)
    used = charge.attributed_nanousd + charge.idle_nanousd
    amounts = (charge.attributed_nanousd, charge.idle_nanousd)
    if bill is None or billed is None:
        return NodeGap(node, Finding.NO_BILL, *amounts)
    if charge.unpriced:
        return NodeGap(node, Finding.NO_PRICE, *amounts, billed)
    gap = billed - used
    ratio = Fraction(gap, billed) if billed else None
    finding = Finding.AGREES
    if charge.gpus and not bill.gpu_hours:
        finding = Finding.NO_GPU
    elif ratio is None:
        finding = Finding.FREE if used else Finding.AGREES
    elif abs(ratio) > alert_ratio:
        finding = Finding.GAP
    return NodeGap(node, finding, *amounts, billed, gap, ratio)


def _charges_by_node(charges: Iterable[NodeCharge]) -> dict[str, NodeCharge]:
    found: dict[str, NodeCharge] = {}
    for charge in charges:
        before = found.get(charge.node, NodeCharge(charge.node, 0, 0))
        found[charge.node] = NodeCharge(
            charge.node,
            before.attributed_nanousd + charge.attributed_nanousd,
            before.idle_nanousd + charge.idle_nanousd,
            before.gpus + charge.gpus,
            before.unpriced or charge.unpriced,
        )
    return found


def bills_by_node(bills: Iterable[NodeBill]) -> dict[str, NodeBill]:
    """Return one bill for each node, the sum of its bills; without an amount if one lacks it."""
    found: dict[str, NodeBill] = {}
    for bill in bills:
        before = found.get(bill.node)
        if before is None:
            found[bill.node] = bill
            continue
        total = None
        if before.total_nanousd is not None and bill.total_nanousd is not None:
            total = before.total_nanousd + bill.total_nanousd
        hours = [each for each in (before.gpu_hours, bill.gpu_hours) if each is not None]
        found[bill.node] = NodeBill(bill.node, total, sum(hours, Fraction()) if hours else None)
    return found


def _cost_upto(rates: Sequence[Rate], until_ns: int) -> int:
    total = 0
    for index, rate in enumerate(rates):
        end_ns = until_ns
        if index + 1 < len(rates):
            end_ns = min(until_ns, rates[index + 1].from_ns)
        total += max(0, end_ns - rate.from_ns) * rate.hourly_nanousd
    return total // HOUR_NS
