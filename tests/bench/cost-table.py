# SPDX-License-Identifier: GPL-2.0
"""Prints the results of the cost benchmark as a table, with ratios to dm-linear: cost-table.py FILE"""

import json
import sys

from stacks import STACKS as stacks

with open(sys.argv[1]) as file:
    result = json.load(file)
jobs = list(dict.fromkeys(job for stack in stacks for job in result.get(stack, {})))
print("instructions per I/O (ratio to dm-linear)")
print(f"{'job':<26}" + "".join(f"{stack:>20}" for stack in stacks))
for job in jobs:
    base = result.get("linear", {}).get(job)
    row = f"{job:<26}"
    for stack in stacks:
        value = result.get(stack, {}).get(job)
        if value is None:
            row += f"{'-':>20}"
        elif base:
            row += f"{value:>12,} ({value / base:5.2f})"
        else:
            row += f"{value:>20,}"
    print(row)

print("\nwhat tracking costs: instructions above dm-linear's")
print(f"{'job':<26}" + "".join(f"{stack:>15}" for stack in stacks[2:]))
for job in jobs:
    base = result.get("linear", {}).get(job)
    if base is None:
        continue
    row = f"{job:<26}"
    for stack in stacks[2:]:
        value = result.get(stack, {}).get(job)
        row += f"{'-':>15}" if value is None else f"{value - base:>15,}"
    print(row)
