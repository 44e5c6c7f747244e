"""The policies' scenario benchmarks; ``python -m benchmarks.scenarios`` runs them."""
