"""pass@1 on programming problems: greedy answers of an exported adapter, run in a sandbox.

    prelort run benchmarks/studies/code-mbpp.toml --out runs/studies/code-mbpp
    python benchmarks/studies/pass_at_1.py runs/studies/code-mbpp [--problems 50]

The rows are the base, the adapter at each rank, and, to check the runner itself, the problems' own
solutions. A problem passes if the program runs to its end with all its tests (sandbox.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from sandbox import interpreter, run

from prelort.experiment.folder import RunFolder
from prelort.metrics.generate import continuations, fit_prompt
from prelort.models import base

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import report

BATCH = 10


def answers(model: Any, tokenizer: Any, prompts: list[str], most: int) -> list[str]:
    """A greedy answer to each prompt."""
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        ids = [
            fit_prompt(model, tokenizer(prompt)["input_ids"], most)
            for prompt in prompts[start : start + BATCH]
        ]
        with torch.inference_mode():
            found += continuations(model, tokenizer, ids, max_new_tokens=most, device="cpu")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    python = interpreter()
    torch.set_num_threads(1)  # a model this small gains nothing from more
    folder = RunFolder(arguments.run)
    config = folder.read_config()
    lines = Path(str(config.data.test)).read_text(encoding="utf-8").splitlines()
    problems = [json.loads(line) for line in lines][: arguments.problems]
    tokenizer = base.load_tokenizer(config.model)
    model: Any = base.load_model(config.model, "causal-lm", (), pad_id=tokenizer.pad_token_id)
    model.eval()
    prompts = [config.data.prompt_template.format_map(problem) for problem in problems]
    written = {"the problems' own solutions": [problem["code"] for problem in problems]}
    written["untuned base"] = answers(model, tokenizer, prompts, arguments.max_new_tokens)
    exported = sorted(folder.adapters.glob("rank-*"), key=lambda path: int(path.name[5:]))
    for path in exported:
        tuned = PeftModel.from_pretrained(model, str(path))
        written[path.name.replace("-", " ")] = answers(
            tuned, tokenizer, prompts, arguments.max_new_tokens
        )
        model = tuned.unload()
    rows = []
    for name, programs in written.items():
        outcomes = [
            run(f"{program}\n\n{problem['tests']}", python)
            for program, problem in zip(programs, problems, strict=True)
        ]
        compiled = sum(_compiles(program) for program in programs)
        rows.append(
            {
                "programs": name,
                "problems": len(problems),
                "compile": compiled,
                "passed": outcomes.count("passed"),
                "timed out": outcomes.count("timed out"),
                "pass@1, %": round(100 * outcomes.count("passed") / len(problems), 1),
            }
        )
    command = f"python benchmarks/studies/pass_at_1.py {arguments.run} --problems {len(problems)}"
    report("studies_pass_at_1", "MBPP, greedy answers", rows, {"command": command})
    print(f"an answer at {exported[-1].name}:\n{written['rank ' + exported[-1].name[5:]][0]}")


def _compiles(program: str) -> bool:
    try:
        compile(program, "answer", "exec")
    except (SyntaxError, ValueError):
        return False
    return bool(program.strip())


if __name__ == "__main__":
    main()
