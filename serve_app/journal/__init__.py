"""A journal: what must not be lost before it has reached the ledger, on this node's disk.

Journal            appends records durably, in groups; one process owns it
Shipper, Sweeper   send a journal's records on, and those of journals that were left behind
"""

from serve_app.journal.abandoned import Abandoned, abandoned
from serve_app.journal.journal import Journal, JournalSize
from serve_app.journal.shipping import Shipper, Sink, Sweeper

__all__ = [
    "Abandoned",
    "Journal",
    "JournalSize",
    "Shipper",
    "Sink",
    "Sweeper",
    "abandoned",
]
