"""Drills: faults injected on purpose into a running stack, and what has to come of each.

    headrace drill NAME -> stack.py (the simulated one) or a URL
                        -> NAME.py: inject, watch until, check     on a Stage (frame.py)
                        -> Verdict: passed or not, with figures

One module per drill: its docstring's first line says what it shows, ``run(stage)`` does it.
"""
