"""Instruction tuning: a prompt from a template, loss on the completion only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from prelort.config import DataConfig
from prelort.tasks import prompts
from prelort.tasks._batches import tokenise
from prelort.tasks._causal import CausalTask, answer_example, end_of_text, opening
from prelort.tasks.columns import find, require, texts
from prelort.tasks.interface import IGNORED, Example

PROMPT_COLUMNS = ("instruction", "prompt", "question", "query")
CONTEXT_COLUMNS = ("context", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")


class Instruction(CausalTask):
    """A row is a prompt, made by `template` of some columns, and a completion."""

    name = "instruction"
    metrics: tuple[str, ...] = ("perplexity", "rouge_l")

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The completion column, then those of the template.

        Raises `ConfigError` if one does not exist or the template is malformed.
        """
        named = prompts.fields(template(config, available))
        for name in named:
            require("data.prompt_template: column", name, available)
        usual = [name for name in COMPLETION_COLUMNS if name not in named]
        completion = find("data.completion_column", config.completion_column, usual, available)
        return completion, *named

    def encode(
        self, rows: Dataset, tokenizer: Any, config: DataConfig, labels: Sequence[str]
    ) -> list[Example]:
        """One example a row, of the tokenizer's bos if it puts one, prompt, completion and eos.

        Completion and eos are learnt. Too long a row loses the left of its prompt first. The
        prompt and the completion are tokenised apart, as they are when a completion is generated.
        """
        if len(rows) == 0:
            return []
        pattern = template(config, rows.column_names)
        completion_column, *named = self.columns(config, rows.column_names)
        values = {name: texts(rows, name) for name in named}
        references = texts(rows, completion_column)
        filled = [
            prompts.render(pattern, {name: values[name][i] for name in named})
            for i in range(len(rows))
        ]
        before, after = opening(tokenizer), end_of_text(tokenizer)
        examples = []
        for prompt, completion, reference in zip(
            tokenise(tokenizer, filled), tokenise(tokenizer, references), references, strict=True
        ):
            ids = [*before, *prompt]
            answer = [*completion, after]
            ignored = [IGNORED] * len(ids)
            examples.append(
                answer_example(ids, ignored, answer, reference, config.max_length, len(before))
            )
        return examples


def template(config: DataConfig, available: Sequence[str]) -> str:
    """``prompt_template``, or that of the columns which data sets of instructions usually have.

    A column ``prompt`` is taken as it is; an instruction and its context, which may be missing, are
    paragraphs. Raises `ConfigError` if there is no such column.
    """
    if config.prompt_template is not None:
        return config.prompt_template
    prompt = find("data.prompt_template", None, PROMPT_COLUMNS, available)
    if prompt.lower() == "prompt":
        return f"{{{prompt}}}"
    context = [name for name in available if name.lower() in CONTEXT_COLUMNS]
    return "".join(f"{{{name}}}\n\n" for name in [prompt, *context[:1]])
