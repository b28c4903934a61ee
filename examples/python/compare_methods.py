"""Compare methods on the same rows, clients and batches, over two seeds."""

from prelort import Federation

rows = [{"text": f"def add_{n}(x):\n    return x + {n}\n"} for n in range(48)]
federation = Federation(
    "embedded",
    datasets=rows,
    partition={f"client-{k}": range(k, len(rows), 4) for k in range(4)},
    ranks=[2, 2, 4, 8],
)
results = federation.compare(
    ["prelort", "zero-padding"], rounds=2, out="runs/compare", seeds=[0, 1]
)

columns = ["method", "at", "mean", "deviation", "difference"]
print(results.summary[columns].to_string(index=False))
