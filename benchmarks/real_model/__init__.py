"""The local stack against bare ``vllm serve``: same model, same machine, same requests.

    make bench

Both serve the same model folder with the same engine settings. They run one after the
other, never together, and take turns at going first; each figure is the median over the
rounds. The client is the same, and runs on the same machine.
"""
