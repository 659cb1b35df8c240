"""What every column of a record means: for readers of tables that records were exported to."""

from collections.abc import Mapping

MEANINGS: Mapping[str, str] = {
    "run_id": "Name of the run, its folder in results/runs/: system, model, digest of its options and of the code.",
    "source": (
        "How the numbers came to be: simulated, or measured on this machine's ranks (local), on an "
        "emulated network (emulated) or on a cluster (cluster). Never put two sources into one average."
    ),
    "system": "Name in conf/system/; none where no system enters.",
    "model": "Name in conf/model/; none where no model enters.",
    "cluster": (
        "Name in conf/cluster/ or results/clusters/, with @ and its number of GPUs where the run has a part of it."
    ),
    "routing": "Name in conf/routing/; trained: the router of the model in training.",
    "seed": "Of synthetic routing; of weights and documents in training.",
    "num_experts": "E, of a layer.",
    "topk": "K, experts of a token.",
    "num_ranks": "G, GPUs of the expert-parallel group; in training, all ranks.",
    "tokens_per_rank": "T, tokens that each rank has in a step.",
    "row_bytes": (
        "Bytes of the row that carries one token in dispatch: M times bytes of an element, after narrowing, unless "
        "wire.* says otherwise; 0 where no rows move."
    ),
    "iteration": "Of the run, from 0; -1 in phases run and start. Phase calibration: the repeat.",
    "routing_iteration": "Step of the routing source that the iteration has; -1 likewise.",
    "counted": "Whether the iteration counts for results: at most the last half, tokens that no decision has seen.",
    "layer": "Of the model.",
    "rank": "That measured; -1: all ranks together, or the busiest.",
    "phase": (
        "What the row is of. dispatch, combine, combine_backward, dispatch_backward: one of the four "
        "AlltoAlls of a step, by stages and as a whole; simulated, those alone whose rows have not as many bytes as "
        "dispatch's. copies, gradients: what a rank sent for copies of experts. routing: what the routing asks for at "
        "a level, "
        "whatever the system. step: the four together, and what the placement policy did after. start: "
        "what moved before the first iteration. planning: what a rank's policy does. train: a training "
        "step of a rank. calibration: one AlltoAll of one size, or HD2's two stages in chunks. run: a run without rows."
    ),
    "stage": (
        "Of the AlltoAll, e.g. 1:inter1; phase routing: the level's name; phase planning: measure, decide or "
        "rebalance; phase copies: weights, weights again or sums (of gradients); phase gradients: home; of both "
        "none where nothing was sent; else all."
    ),
    "dimension": "d, stages of the dispatch used; phase routing: number of the level.",
    "chunks": "C, parts that rows are cut into: while one passes a stage, that before it passes the next.",
    "predicted_ms": (
        "ms, by the cost model: in phase dispatch one stage of one AlltoAll, in phase step the four AlltoAlls."
    ),
    "link_ms": "ms, least time of the stage on the busiest link whose rate is shaped.",
    "rows": "Rows at the busiest GPU; phase routing: distinct (token, group) pairs, all GPUs together.",
    "group_rows": "Rows of the busiest group, per GPU of it: what the paper's Q counts. Deduplicated stages only.",
    "bytes": (
        "Bytes, rows times bytes of a row in that AlltoAll; phase planning: what ranks sum; phase calibration: "
        "n, at a rank, own share included, of two stages in the first."
    ),
    "crossing_rows": "Rows that leave their GPU, all GPUs together.",
    "pairs": "Token-expert pairs of the step, N times K.",
    "dropped_pairs": "Of them, those that a lossy scheme drops.",
    "expert_rows_max": "Token-expert pairs at the busiest GPU: balance of computation.",
    "expert_rows_mean": "The same, mean of all GPUs.",
    "moved_experts": "Experts that move after this iteration.",
    "moves": "These moves, '17>40 40>17': expert and its new slot; in training by layer.",
    "migration_bytes": (
        "Bytes of these moves: weights, fp32 masters and both moments of Adam; measured: what the rank sent."
    ),
    "migration_link_ms": "ms of these moves at the rate of the link, predicted.",
    "migration_alltoall_ms": "ms of these moves at the rate that an AlltoAll reaches, predicted.",
    "copies_bytes": (
        "Bytes of weights that went to copies of experts in this iteration, or of summed gradients to copies that keep "
        "training state, all GPUs together, predicted; measured: what the rank sent."
    ),
    "copies_link_ms": "ms of these at the rate of the link, predicted.",
    "copies_alltoall_ms": "ms of these at the rate that an AlltoAll reaches, predicted.",
    "gradient_bytes": (
        "Bytes of gradients that copies of experts sent home in this iteration, predicted; measured: what the rank "
        "sent."
    ),
    "gradient_link_ms": "ms of these at the rate of the link, predicted.",
    "gradient_alltoall_ms": "ms of these at the rate that an AlltoAll reaches, predicted.",
    "slots_gb": (
        "GB at a GPU, of weights, gradients and what training state copies keep in slots beyond its own experts, all "
        "layers; where layers share them, once."
    ),
    "net_ms": (
        "predicted_ms of the four AlltoAlls, copies_link_ms and gradient_link_ms; measured: dispatch_ms of the four, "
        "copies_ms and gradient_ms. Migration and planning are not in it."
    ),
    "modelled_gain_ms": "ms a step that the policy expected the moves to save.",
    "recounted_gain_ms": "ms a step that a recount of the same tokens finds; several swaps at once only.",
    "realised_gain_ms": "ms that the next step saved: its exact traffic at the old placement less that at the new.",
    "dispatch_ms": (
        "ms of the whole call, measured, without what a placement policy measured meanwhile; phase step: of the four "
        "calls."
    ),
    "wire_ms": "Of it, ms in collectives, exchange of counts and metadata included, measured.",
    "alone_ms": "ms of the stage's rows sent once more, all ranks ready before, measured.",
    "local_ms": "Of dispatch_ms, everything but collectives, measured.",
    "metadata_bytes": "Bytes beside the rows, which experts and which weights, counted where they are sent.",
    "num_wrong": "Elements of the result that differ from the known answer.",
    "peak_memory_bytes": "Largest memory of the process (CPU) or its allocations (CUDA) during the iteration.",
    "loss": "Of the training step, on the rank's tokens.",
    "train_step_ms": "ms of forward, backward and optimizer, measured; without what policies measured meanwhile.",
    "alltoall_forward_ms": "Of it, ms in dispatch and combine, forward.",
    "alltoall_backward_ms": "Of it, ms in dispatch and combine, backward.",
    "planning_ms": (
        "ms in which the placement policy measured, summed and decided, waiting for other ranks included; phase "
        "planning: a part of it."
    ),
    "migration_ms": "ms in which experts moved after the step, or began to, measured.",
    "copies_ms": "ms in which weights, or summed gradients, went to copies of experts, measured.",
    "gradient_ms": "ms in which copies of experts sent gradients home, where they were summed, measured.",
    "landing_ms": "Of train_step_ms, ms in which experts that had travelled beside it came to their places, measured.",
    "hidden_ms": "ms that they travelled before that, beside forward and backward passes, measured.",
    "status": "ok, failed or not_applicable.",
    "reason": "Of the latter two, in one line.",
}
