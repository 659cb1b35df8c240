"""How tokens move: ranks, their communicators, the plan of a dispatch and its execution, and the byte counter."""
