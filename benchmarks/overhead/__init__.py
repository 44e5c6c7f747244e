"""What the gateway costs: the stack around a simulated engine, beside its peers.

    make bench-overhead

One load generator drives each contender in turn on the same cores. The engine behind all of
them is the product's simulated one, so that what differs is what stands before it. Every
answer is checked to be complete.
"""
