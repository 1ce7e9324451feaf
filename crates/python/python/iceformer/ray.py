"""Classes for Ray Data's `map_batches`: one engine, or one encoder, for each actor.

```python
documents = ray.data.read_text("documents/")
answers = documents.map_batches(
    iceformer.ray.Generate,
    fn_constructor_kwargs={"model": "MODEL", "prompt": "{text}\\n\\nSummary:", "threads": 8},
    concurrency=4, num_cpus=8, batch_size=4,
)
```

`concurrency` actors of `num_cpus` cores each, on as many machines as the cluster has; give `threads` the same number.
Ray itself is not imported here: the classes take and return batches as dictionaries of columns, so they can be tried
without a cluster, and any tool that maps batches can use them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iceformer.engine import Engine

Batch = dict[str, Any]


def _column(batch: Mapping[str, Any], name: str) -> Sequence[Any]:
    if name not in batch:
        raise ValueError(f"the batch has the columns {sorted(batch)}; expected one called {name!r}")
    return batch[name]


class Generate:
    """Continues a prompt made from each row; adds the columns `answer` and `finish`.

    Args:
        model: A model folder or GGUF file that every node can read.
        prompt: Text with the columns of the row in braces, `"{text}\\n\\nSummary:"`.
        chat: Whether to give the prompt to the model's chat template as the message of a user.
        output: Name of the column for the answers.
        generate: Settings of `Engine.generate` (`max_tokens`, `temperature`, …).
        **engine: Settings of `Engine` (`threads`, `context`, `method`, `budget`, …).
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        prompt: str,
        *,
        chat: bool = False,
        output: str = "answer",
        generate: Mapping[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        self._engine = Engine(model, **engine)
        self._prompt, self._chat, self._output = prompt, chat, output
        self._generate = dict(generate or {})

    def __call__(self, batch: Batch) -> Batch:
        rows = len(next(iter(batch.values()), ()))
        answers = []
        for row in range(rows):
            try:
                text = self._prompt.format(**{name: column[row] for name, column in batch.items()})
            except KeyError as error:
                raise ValueError(f"the prompt names {error}; the batch has the columns {sorted(batch)}") from None
            prompt: Any = [{"role": "user", "content": text}] if self._chat else text
            answers.append(self._engine.generate(prompt, **self._generate))
        texts = np.array([answer.text for answer in answers], dtype=object)
        ends = np.array([answer.finish for answer in answers], dtype=object)
        return {**batch, self._output: texts, "finish": ends}


class Embed:
    """Embeds a column of texts with a sentence-transformers model whose attention IceFormer computes; adds a column of
    vectors `[rows, width]`.

    Args:
        model: Name or folder of the model.
        column: Column of texts.
        output: Name of the column for the vectors.
        threads: Threads of torch and of IceFormer; torch's own choice unless given.
        settings: Settings of `iceformer.transformers` (`method`, `budget`, `kv_type`).
        encode: Settings of `SentenceTransformer.encode` (`normalize_embeddings`, `prompt_name`, …).
        **model_settings: Settings of `SentenceTransformer` (`truncate_dim`, `trust_remote_code`, …).
    """

    def __init__(
        self,
        model: str,
        column: str = "text",
        *,
        output: str = "embedding",
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        encode: Mapping[str, Any] | None = None,
        **model_settings: Any,
    ) -> None:
        import torch

        from iceformer import sentence_transformers
        from iceformer import transformers as hook

        if threads is not None:
            torch.set_num_threads(threads)
        self._hook, self._settings = hook, dict(settings or {})
        self._model = sentence_transformers.load(model, **model_settings)
        self._column, self._output, self._encode = column, output, dict(encode or {})

    def __call__(self, batch: Batch) -> Batch:
        texts = [str(text) for text in _column(batch, self._column)]
        with self._hook.settings(**self._settings):
            vectors = self._model.encode(texts, show_progress_bar=False, **self._encode)
        return {**batch, self._output: np.asarray(vectors)}


__all__ = ["Embed", "Generate"]
