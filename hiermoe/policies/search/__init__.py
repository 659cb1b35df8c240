"""Search for a placement: experts that fire together sit together, and no GPU gets much more than the others.

Start with :func:`.search.search_placement` (offline) and :mod:`.search_policy` (in
a run). A token's expert set is a hyperedge over the experts; what a level carries is its connectivity over that level's
groups. Partitions make good starts (:mod:`.seeds`), exact swaps lower what the cost model prices (:mod:`.descent`),
and what is found is judged step by step on other tokens of the sample (:mod:`.objective`).
"""
