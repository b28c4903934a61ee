"""Tune a loaded model on tables of your own, one for each participant, and use the result."""

from importlib.resources import files

import pandas as pd
from transformers import AutoModelForCausalLM, AutoTokenizer

from prelort import EarlyStopping, Federation

# The tiny model of the package; any causal model will do, such as "Qwen/Qwen3-0.6B".
name = str(files("prelort") / "embedded" / "base")
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)

north = pd.DataFrame({"text": [f"Bed {n}: stable, discharge on day {n % 5}." for n in range(40)]})
south = pd.DataFrame({"text": [f"Ward {n}: observe, review in {n % 7} h." for n in range(60)]})

federation = Federation(
    model,
    tokenizer,
    datasets={"north": north, "south": south},
    ranks={"north": 2, "south": 8},  # what each one's hardware affords
    evaluation={"every": 1},
)
result = federation.run(rounds=3, out="runs/own-data", callbacks=[EarlyStopping(patience=2)])

print(result)
print(result.to_pandas().tail())
print("PEFT folder:", result.adapter(rank=4))
# result.push_to_hub("you/ward-notes", rank=4)
