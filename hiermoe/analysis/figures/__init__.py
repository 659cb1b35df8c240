"""The report's figures, one module each; `FIGURES` is their order in the report."""

from hiermoe.analysis.figures.beyond import (
    arena_memory,
    arena_tokens,
    arena_winners,
    balance,
    heat_map,
    planner_cost,
    structure,
)
from hiermoe.analysis.figures.beyond import policies as placement
from hiermoe.analysis.figures.beyond import searched as search
from hiermoe.analysis.figures.beyond import world_sizes as scaling
from hiermoe.analysis.figures.measured import dispatchers, losses, training_steps
from hiermoe.analysis.figures.paper import fig9, fig10, fig11, fig12, fig13, swap_cost, swap_policy, table2, table4
from hiermoe.analysis.figures.spec import FigureSpec

FIGURES: tuple[FigureSpec, ...] = tuple(
    module.FIGURE
    for module in (
        *(dispatchers, training_steps),
        *(
            fig11,
            fig10,
            table2,
            fig9,
            fig12,
            fig13,
            table4,
            placement,
            structure,
            search,
            swap_policy,
            swap_cost,
            balance,
        ),
        *(scaling, heat_map, arena_winners, arena_memory, arena_tokens, planner_cost, losses),
    )
)
