"""HierMoE: hierarchical token deduplication and expert swap for mixture-of-experts communication.

A routing trace flows through a system (how tokens move x where experts sit) on a cluster, and comes out as records,
which become figures and verdicts.

Letters, used as suffixes of tensor names (``expert_ids_NK`` is a tensor of shape [N, K]):

    T   tokens that one rank holds              N   tokens of all ranks together, in rank order
    K   experts per token                       E   experts per layer
    G   ranks (GPUs) of the expert-parallel group
    D   levels of the hierarchy                 U   groups that a level splits all GPUs into (U[0] = 1, U[D] = G)
    M   hidden size of a token                  R   rows that one rank sends or receives in a stage

``level`` is topology (1 is outermost), ``dimension`` is the paper's d (how many stages an AlltoAll has), ``axis`` is a
tensor's. Units are part of every name: ``_ms``, ``_bytes``, ``_gb_per_s`` (10^9 bytes per second).
"""

__version__ = "0.1.0"
