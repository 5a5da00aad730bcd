"""Random networks against the batch-of-one loop: `python -m tests.fuzzing --seed 0 --minutes 10`.

A program is a list of named steps; `network` runs it, the `ops_*`, `regions` and `traps` files hold the steps, `judge` compares,
`search` draws and shrinks.
"""
