"""The mathematics: tensors in, tensors out, no state. One file per idea, each with its paper.

    returns.py        the one recursion over time behind GAE, V-trace and discounted returns
    gae.py            generalised advantage estimation (Schulman et al. 2015)
    vtrace.py         V-trace (Espeholt et al. 2018)
    distributions.py  what a policy's head describes: log-probability, entropy, mode, and sampling from given noise
    recurrence.py     LSTM and GRU over the rows of many environments, with resets inside
    moments.py        running mean and variance in float64

Legend of shape suffixes: T time, B or N environments, A actions (or mask entries), K components, D dimensions, F features.
"""
