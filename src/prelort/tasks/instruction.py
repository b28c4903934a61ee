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

COMPLETION_COLUMNS = ("completion", "response", "output", "answer")


class Instruction(CausalTask):
    """A row is a prompt (``prompt_template`` with the row's columns) and a completion."""

    name = "instruction"
    metrics: tuple[str, ...] = ("perplexity", "rouge_l")
    allowed_metrics: tuple[str, ...] = ("perplexity", "rouge_l")

    def columns(self, config: DataConfig, available: Sequence[str]) -> tuple[str, ...]:
        """The completion column, then those of the template.

        Raises `ConfigError` if one does not exist or the template is malformed.
        """
        named = prompts.fields(config.prompt_template)
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
        completion_column, *named = self.columns(config, rows.column_names)
        values = {name: texts(rows, name) for name in named}
        references = texts(rows, completion_column)
        filled = [
            prompts.render(config.prompt_template, {name: values[name][i] for name in named})
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
