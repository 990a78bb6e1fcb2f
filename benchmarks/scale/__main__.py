"""python -m benchmarks.scale: the tables of docs/scale.md, between its marks."""

from __future__ import annotations

from benchmarks.scale.tables import tables

if __name__ == "__main__":
    print("\n\n".join(f"<!-- {name} -->\n{table}\n<!-- end -->" for name, table in tables().items()))
