"""The subcommands of ``headrace``, one module each.

A module here has ``add_parser(subparsers)``, which sets ``run`` as the parser's default,
and ``run(args) -> int``, the exit status. Importing it must be cheap: whatever is heavy
is imported inside ``run``.
"""
