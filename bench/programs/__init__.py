"""What is measured: for each side a worker and a producer, started as processes by `bench.processes`.

``meter`` is the worker's half of what they say to each other, ``orders`` the producer's; ``protocol.mjs`` is both for
Node. A peer's program runs in the peer's own environment: it imports nothing of pgworker's.
"""
