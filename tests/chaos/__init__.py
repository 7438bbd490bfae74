"""Faults under load: whatever happens to nodes, wires, clocks and Redis, the promises I1–I6 of ``checker.py`` hold.

Every scenario has a least level, ``@pytest.mark.chaos("core" | "short" | "full")``: ``make test`` runs level core,
``.ci/run`` level short, ``make chaos`` level full. Lengths come from the fixture ``by_level``. A run prints its seed,
and ``--chaos-seed`` repeats it; each scenario draws from the seed and its own name, so it can be repeated alone.
"""
