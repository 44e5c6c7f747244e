"""The subcommands of ``headrace``, one module each.

A module here begins with a docstring "``headrace NAME``: what it does", which is its line
in ``headrace --help``. It has ``add_parser(subparsers)``, which sets ``run`` as the
parser's default, and ``run(args) -> int``, the exit status. It is imported only when its
command is used.
"""
