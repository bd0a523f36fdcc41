"""What clinfast does to a real model on this machine: `python -m clinfast.demo`.

Runs all-MiniLM-L6-v2 over synthetic clinical notes, stock and optimized in alternating rounds of one
process, and shows speed, cost and parity before and after. Writes `demo.json` and
`demo.png`. Needs no network.
"""
