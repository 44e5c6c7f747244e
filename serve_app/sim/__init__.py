"""The discrete-event simulator: the real core over the engine model in virtual time."""
