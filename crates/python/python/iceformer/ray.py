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

Settings are tried when an actor starts: one that is mistyped or out of range is an error then. A row without a text, or
whose prompt is empty or does not fit the context, is an error that names it and ends the job, unless
`on_error="report"`: then it says so in the column `error`, and the other rows go on.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from iceformer.engine import Engine, GenerateSettings

Batch = dict[str, Any]


def _column(batch: Mapping[str, Any], name: str) -> Sequence[Any]:
    if name not in batch:
        raise ValueError(f"the batch has the columns {sorted(batch)}; expected one called {name!r}")
    return batch[name]


def _check_names(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{argument} has {unknown}; expected some of {sorted(known)}")


def _check_on_error(on_error: str) -> bool:
    """Whether errors are reported."""
    if on_error not in ("raise", "report"):
        raise ValueError(f'on_error is {on_error!r}; expected "raise" or "report"')
    return on_error == "report"


def _check_text(column: str, value: Any) -> None:
    """Tables have None, NaN or NA where a text is missing, all of which would become texts themselves."""
    missing = value is None or type(value).__name__ in ("NAType", "NaTType")
    if missing or (isinstance(value, (float, np.floating)) and value != value):
        raise ValueError(f"the column {column!r} has {value} instead of a text; fill it in or filter the row out")
    if isinstance(value, (bytes, bytearray)):
        raise TypeError(f"the column {column!r} has {type(value).__name__}; decode them to a text first")


class _Errors:
    """What became of each row; the first error is raised unless errors are reported."""

    def __init__(self, report: bool, rows: int) -> None:
        self._report = report
        self._rows: list[str | None] = [None] * rows

    def add(self, row: int, error: TypeError | ValueError) -> None:
        if not self._report:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"row {row} of the batch: {error}") from error
        self._rows[row] = str(error)

    def column(self) -> dict[str, np.ndarray]:
        return {"error": np.array(self._rows, dtype=object)} if self._report else {}


_DOUBLED = "braces that are text are doubled: {{ }}"


def _names_in(prompt: str) -> list[str]:
    """The columns that `prompt` names."""
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    except ValueError as error:
        raise ValueError(f"the prompt cannot be read: {error}; {_DOUBLED}") from None
    names = [re.split(r"[.\[]", field, maxsplit=1)[0] for field in found]
    for field, name in zip(found, names):
        if not name or name.isdigit():
            raise ValueError(f"the prompt holds {{{field}}}; expected the name of a column in braces; {_DOUBLED}")
    return names


class Generate:
    """Continues a prompt made from each row; adds the columns `answer` and `finish`.

    Args:
        model: A model folder or GGUF file that every node can read.
        prompt: Text with the columns of the row in braces, `"{text}\\n\\nSummary:"`; braces that are text are doubled.
        chat: Whether to give the prompt to the model's chat template as the message of a user.
        output: Name of the column for the answers.
        generate: Settings of `Engine.generate` (`max_tokens`, `temperature`, …), but for `stream`.
        on_error: `"raise"`: a row that cannot be answered ends the job. `"report"`: its answer is None, its `finish`
            `"error"`, and the column `error` says why (None for the other rows).
        **engine: Settings of `Engine` (`threads`, `context`, `method`, `budget`, …).

    Raises:
        TypeError: For a setting of another type.
        ValueError: For a prompt whose braces hold no name, and for settings that are not known or out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        prompt: str,
        *,
        chat: bool = False,
        output: str = "answer",
        generate: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        **engine: Any,
    ) -> None:
        self._report = _check_on_error(on_error)
        self._prompt, self._chat, self._output = prompt, chat, output
        self._names = _names_in(prompt)
        self._generate = dict(generate or {})
        if "stream" in self._generate:
            raise ValueError("generate has 'stream'; expected settings without it: a row gets its answer as a whole")
        _check_names("generate", self._generate, GenerateSettings.__annotations__)
        self._engine = Engine(model, **engine)
        # For what only the engine knows; it stops at once.
        with self._engine.generate(self._message("a"), stream=True, **{**self._generate, "progress": None}):
            pass

    def __call__(self, batch: Batch) -> Batch:
        rows = len(next(iter(batch.values()), ()))
        errors = _Errors(self._report, rows)
        texts: list[str | None] = [None] * rows
        ends = ["error"] * rows
        for name in self._names:
            if name not in batch:
                raise ValueError(f"the prompt names {name!r}; the batch has the columns {sorted(batch)}; {_DOUBLED}")
        for row in range(rows):
            try:
                text = self._text({name: column[row] for name, column in batch.items()})
                answer = self._engine.generate(self._message(text), **self._generate)
            except (TypeError, ValueError) as error:
                errors.add(row, error)
            else:
                texts[row], ends[row] = answer.text, answer.finish
        columns = {self._output: np.array(texts, dtype=object), "finish": np.array(ends, dtype=object)}
        return {**batch, **columns, **errors.column()}

    def _text(self, row: Mapping[str, Any]) -> str:
        for name in self._names:
            _check_text(name, row[name])
        try:
            return self._prompt.format(**row)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the prompt does not go with the row: {error}; {_DOUBLED}") from None

    def _message(self, text: str) -> Any:
        return [{"role": "user", "content": text}] if self._chat else text


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
        on_error: `"raise"`: a row without a text ends the job. `"report"`: its vector is NaN (0 where vectors are whole
            numbers), and the column `error` says why (None for the other rows).
        **model_settings: Settings of `SentenceTransformer` (`truncate_dim`, `trust_remote_code`, …).

    Raises:
        TypeError: For a setting of another type.
        ValueError: For settings that are not known or out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        column: str = "text",
        *,
        output: str = "embedding",
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        encode: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        **model_settings: Any,
    ) -> None:
        import torch

        from iceformer import sentence_transformers
        from iceformer import transformers as hook

        self._report = _check_on_error(on_error)
        self._hook, self._settings = hook, dict(settings or {})
        _check_names("settings", self._settings, [field.name for field in fields(hook.Settings)])
        with hook.settings(**self._settings):
            pass
        if threads is not None:
            torch.set_num_threads(threads)
        self._model = sentence_transformers.load(model, **model_settings)
        self._column, self._output = column, output
        self._encode = {"show_progress_bar": False, **(encode or {})}
        # For what only the model knows, and for the width of its vectors.
        self._none = self._vectors(["a"], show_progress_bar=False)[:0]

    def __call__(self, batch: Batch) -> Batch:
        column = _column(batch, self._column)
        errors = _Errors(self._report, len(column))
        texts, rows = [], []
        for row, text in enumerate(column):
            try:
                _check_text(self._column, text)
            except (TypeError, ValueError) as error:
                errors.add(row, error)
            else:
                texts.append(str(text))
                rows.append(row)
        vectors = self._vectors(texts) if texts else self._none
        if len(rows) < len(column):
            missing = np.nan if np.issubdtype(vectors.dtype, np.floating) else 0
            given, vectors = vectors, np.full((len(column), *vectors.shape[1:]), missing, dtype=vectors.dtype)
            vectors[rows] = given
        return {**batch, self._output: vectors, **errors.column()}

    def _vectors(self, texts: list[str], **changes: Any) -> np.ndarray:
        with self._hook.settings(**self._settings):
            return np.asarray(self._model.encode(texts, **{**self._encode, **changes}))


__all__ = ["Embed", "Generate"]
