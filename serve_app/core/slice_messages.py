"""What routers and the granter of shared limits say to each other; see ``core/slices.py``."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.core.exchange import RouterId
from serve_app.core.limits import Moved, SliceKey


@dataclass(frozen=True, slots=True)
class Want:
    """A router lacks ``need`` free parts of a limit, of which it holds ``held`` parts."""

    key: SliceKey
    need: int
    held: int


@dataclass(frozen=True, slots=True)
class Recall:
    """A router shall give back ``parts`` with their fill, ``need`` free ones at least."""

    key: SliceKey
    parts: int
    need: int


@dataclass(frozen=True, slots=True)
class Message:
    """What a router says. ``sequence`` grows by one with each message of its life.

    ``returned`` holds every recall's answer, of no parts if nothing was free; of ``spent``
    ones nothing free is left, all grants so far counted. ``claims``
    makes it a registration: all that the router holds. ``leaving`` ends its membership.
    """

    router: RouterId
    epoch: int
    sequence: int
    returned: tuple[Moved, ...] = ()
    wants: tuple[Want, ...] = ()
    claims: tuple[Moved, ...] | None = None
    leaving: bool = False
    spent: frozenset[SliceKey] = frozenset()


@dataclass(frozen=True, slots=True)
class Bell:
    """A hint: give these back, ask for those again; ``unknown``: register."""

    epoch: int
    recalls: tuple[Recall, ...] = ()
    ready: tuple[SliceKey, ...] = ()
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the message with the same ``sequence``.

    ``unknown`` says that nothing was done: the router has to register first. Of each want
    that is not satisfied: ``pending`` ones may be after a recall, ``denied`` ones are not
    now, and ``unsure`` ones are not because a router that holds parts does not answer.
    ``cuts`` are claims that went elsewhere, with the parts that are left of them.
    """

    epoch: int
    sequence: int
    granted: tuple[Moved, ...] = ()
    pending: tuple[SliceKey, ...] = ()
    denied: tuple[SliceKey, ...] = ()
    unsure: tuple[SliceKey, ...] = ()
    cuts: tuple[Moved, ...] = ()
    bell: Bell | None = None
    unknown: bool = False
