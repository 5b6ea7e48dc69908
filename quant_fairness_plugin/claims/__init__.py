"""What the research scripts ("the seeds") promised and claimed, line by line, and what this library finds instead.

`claims.toml` holds a record for every line: its figure there and how it came about, the one-line rule that makes the
scripts' figure again, the command that answers the question here with intervals, and the place of the answer in its
JSON; or the reason why there is none.

- `ledger`: the records (no torch)
- `figures`: answers found in JSON, and written in a cell (no torch)
- `legacy`: figures by the seeds' rules
- `reproduction`: a record run: its rule and its command, each once
- `page`: the table of stored rows, `docs/claims.md` (no torch)
"""
