"""Checkpoints and command lines made wrong at random, and what may come of them: `scripts/fuzz_inputs.py` runs it.

`checkpoints` makes what is mutated, `values`, `jsons`, `weights`, `texts` and `commands` mutate it, `case` puts an
input together from its number, `worker` runs it beside the plain model, and `verdict` judges.
"""
