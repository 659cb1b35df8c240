"""The seam to Megatron-Core. Begin with `attach`: it gives a model's MoE layers a system, and back again.

`expert_placement` and `checkpoint` are for training loops, `rank_trace` records what routers choose, `adapter` is the
dispatcher; `standins` let all of it run on CPU. `checkpoint_folder` is cheap to import; most others import megatron.
"""
