"""Load a tuned adapter without prelort, as any other PEFT adapter, and generate text."""

from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

from prelort import Federation

rows = [{"text": f"import module_{n}\nmodule_{n}.run()\n"} for n in range(60)]
federation = Federation("embedded", datasets={"a": rows[:30], "b": rows[30:]}, ranks=[2, 4])
folder = federation.run(rounds=2, out="runs/use-adapter").adapter(rank=3)

# From here on it is PEFT and transformers alone.
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(write("import ", max_new_tokens=10)[0]["generated_text"])
