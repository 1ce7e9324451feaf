"""Whole models without torch: a Hugging Face folder or a GGUF file, read and run by the native engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from iceformer import _core
from iceformer._attention import (
    KV_TYPES,
    as_list,
    choice,
    method_and_budget,
    real_number,
    thread_count,
    truth,
    whole_number,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: A text as it is, tokens, or messages for the chat template.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class GenerateSettings(TypedDict, total=False):
    """Settings of `Engine.generate`, described there."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    repetition_window: int
    seed: int
    stop: Sequence[str]
    ignore_end: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_variables: Mapping[str, Any] | None
    progress: Callable[[int, int], object] | None


@dataclass(frozen=True)
class Answer:
    """A finished generation."""

    #: Text without stop string and end token.
    text: str
    #: Tokens sampled, an end token included.
    tokens: list[int]
    #: Why it ended: `end`, `stop`, `length`, `context` or `cancelled`.
    finish: str
    #: Tokens of the prompt, and how many of them an earlier call had read already.
    prompt_tokens: int
    kept_tokens: int
    #: Wall time.
    prompt_seconds: float
    decode_seconds: float


class Stream(Iterator[str]):
    """Pieces of text as they come. `answer` is there once the last piece was taken; `close()` stops early, as does a
    `with` block that is left."""

    def __init__(self, generation: _core.Generation, progress: Callable[[int, int], object] | None) -> None:
        self._generation = generation
        self._progress = progress
        #: The finished generation; None while it runs.
        self.answer: Answer | None = None

    def __next__(self) -> str:
        while True:
            event = self._generation.next_event()
            if event is None:
                raise StopIteration
            kind, *content = event
            if kind == "text":
                return content[0]
            if kind == "done":
                self.answer = Answer(**content[0])
                raise StopIteration
            if self._progress is not None:
                self._progress(*content)

    def close(self) -> None:
        """Stops the generation at the next layer."""
        self._generation.cancel()
        for _ in self:
            pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine:
    """A model ready to generate.

    ```python
    engine = iceformer.Engine("MODEL")
    print(engine.generate("Once upon a time").text)
    for piece in engine.generate("Once upon a time", stream=True):
        print(piece, end="", flush=True)
    ```

    What a prompt shares with the one before (a chat that goes on, a document asked about again) is not read again.

    Args:
        model: A folder with `config.json`, `tokenizer.json` and `*.safetensors`, or a `.gguf` file.
        threads: All cores that the process may use unless given.
        context: Most tokens of prompt and answer; what the model is made for unless given.
        chunk: Tokens of one pass through the layers; 512 unless given, 2,048 of method budgeted.
        kv_type: Type of the key/value cache: `"int8"` (also `"auto"`), `"bf16"` or `"f32"`.
        method: How attention chooses keys; see `iceformer.attention`.
        budget: Softmax mass that a row may miss; .05 unless given (method budgeted).
        progress: Called with `(done, total)` layers while the model is loaded.

    Raises:
        ValueError: When a file is missing or malformed, or a setting is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        threads: int | None = None,
        context: int | None = None,
        chunk: int | None = None,
        kv_type: str = "auto",
        method: str = "auto",
        budget: float | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        count = thread_count(threads)
        if context is not None:
            context = whole_number("context", context)
        if chunk is not None:
            chunk = whole_number("chunk", chunk)
        kv_type = choice("kv_type", kv_type, KV_TYPES)
        method, budget = method_and_budget(method, budget)
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model is a {type(model).__name__}; expected the path of a model folder or a .gguf file")
        _check_progress(progress)
        self._engine = _core.Engine(os.fspath(model), count, context, chunk, kv_type, method, budget, progress)

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **settings: Unpack[GenerateSettings]
    ) -> Answer: ...
    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **settings: Unpack[GenerateSettings]) -> Stream: ...
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        max_tokens: int | None = 1024,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repetition_penalty: float = 1.0,
        repetition_window: int = 64,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Answer | Stream:
        """Continues `prompt`: a text as it is, tokens, or messages (`[{"role": "user", "content": ...}]`) through the
        model's chat template, which sees every key of a message (`tool_calls`, `reasoning_content`).

        Args:
            stream: Whether to return a `Stream` of pieces of text instead of an `Answer`.
            max_tokens: Most tokens to generate; None: until the context is full.
            temperature: Divisor of the logits; 0 takes the most probable token always.
            top_k: Keep the `top_k` most probable tokens; 0 keeps all.
            top_p: Keep the most probable tokens that add up to this share; 1 keeps all.
            min_p: Keep tokens at least this share as probable as the most probable one; 0 keeps all. Like `top_k` and
                `top_p` it changes nothing without a temperature.
            repetition_penalty: Divides the logits of recent tokens; 1 leaves them.
            repetition_window: Tokens that the penalty looks at, prompt included.
            seed: The same seed gives the same text, on any number of threads.
            stop: Strings that end the text and are no part of it.
            ignore_end: Goes on at end tokens.
            tools: Descriptions of functions for the chat template, as JSON schemas.
            template_variables: What else the chat template tests, such as `{"enable_thinking": False}`.
            progress: Called with `(done, total)` tokens while the prompt is read.

        Raises:
            TypeError: When the prompt, or a setting, is of another type.
            ValueError: When the prompt is empty or does not fit the context, or a setting is out of range.
        """
        if template_variables is not None and not isinstance(template_variables, Mapping):
            found = type(template_variables).__name__
            raise TypeError(f"template_variables is a {found}; expected a dictionary of names and values")
        variables = dict(template_variables or {})
        if tools is not None:
            variables["tools"] = as_list("tools", tools, "a list of descriptions of functions")
        _check_progress(progress)
        tokens, chat = self._encode(prompt, variables)
        request = {
            "max_tokens": None if max_tokens is None else whole_number("max_tokens", max_tokens),
            "stop": _stop_strings(stop),
            "ignore_end": truth("ignore_end", ignore_end),
            "temperature": real_number("temperature", temperature),
            "top_k": whole_number("top_k", top_k),
            "top_p": real_number("top_p", top_p),
            "min_p": real_number("min_p", min_p),
            "repetition_penalty": real_number("repetition_penalty", repetition_penalty),
            "repetition_window": whole_number("repetition_window", repetition_window),
            "seed": whole_number("seed", seed, 2**64 - 1),
        }
        pieces = Stream(self._engine.generate(tokens, chat, request), progress)
        if stream:
            return pieces
        for _ in pieces:
            pass
        assert pieces.answer is not None
        return pieces.answer

    def _encode(self, prompt: Prompt, variables: Mapping[str, Any] | None = None) -> tuple[list[int], bool]:
        if isinstance(prompt, str):
            parts: list[Any] = []
        else:
            if isinstance(prompt, (bytes, bytearray, memoryview)):
                raise TypeError(f"the prompt is a {type(prompt).__name__}; decode it to a text first")
            if isinstance(prompt, Mapping):
                raise TypeError("the prompt is a single message; expected a list of messages")
            # Arrays and tensors of tokens come as lists.
            parts = as_list("prompt", prompt, "a text, tokens or messages")
        if parts and all(isinstance(part, Mapping) for part in parts):
            for index, part in enumerate(parts):
                _check_message(index, part)
            messages = _json("messages", [dict(part) for part in parts])
            return self._engine.encode_chat(messages, _json("template's variables", variables or {})), True
        if variables:
            raise ValueError("tools and template_variables are for messages; write them into the prompt instead")
        if isinstance(prompt, str):
            return self._engine.encode(prompt), False
        return _tokens("prompt", prompt, parts), False

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, with the model's own first token where it has one."""
        return self._engine.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`.

        Raises:
            TypeError: When a token is no whole number (a bool is none).
            ValueError: When a token is negative or not in the model's vocabulary, or `tokens` has several dimensions.
        """
        checked = _tokens("tokens", tokens, as_list("tokens", tokens, "a list of tokens"))
        size = self._engine.vocabulary_size
        for token in checked:
            if token >= size:
                raise ValueError(f"token {token} is not below the model's vocabulary of {size}")
        return self._engine.decode(checked)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.context

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be given."""
        return self._engine.has_chat_template

    @property
    def threads(self) -> int:
        """Threads in use."""
        return self._engine.threads


def _tokens(name: str, given: Any, listed: Sequence[Any]) -> list[int]:
    """`listed`, the parts of what was given, when they are tokens: whole numbers of Python, NumPy or torch."""
    dimensions = getattr(given, "ndim", 1)
    if dimensions != 1:
        raise ValueError(
            f"{name} has {dimensions} dimensions, {tuple(given.shape)}; expected one, [tokens]: hand over one row at a time"
        )
    if listed and all(isinstance(part, (list, tuple)) or getattr(part, "ndim", 0) for part in listed):
        raise TypeError(f"{name} is a list of {len(listed)} sequences; expected one of tokens: hand over one at a time")
    for index, part in enumerate(listed):
        if isinstance(part, bool) or str(getattr(part, "dtype", "")).endswith("bool"):
            raise TypeError(f"token {index} is {part}; expected a whole number")
        if name == "prompt" and not hasattr(part, "__index__"):
            raise TypeError("the prompt is a list of neither tokens nor messages; expected a text, tokens or messages")
    return [whole_number(f"token {index}", token, 2**32 - 1) for index, token in enumerate(listed)]


def _stop_strings(stop: Any) -> list[str]:
    expected = "a text or a list of texts"
    listed = [stop] if isinstance(stop, str) else as_list("stop", stop, expected)
    for text in listed:
        if not isinstance(text, str):
            raise TypeError(f"stop holds {text!r}; expected {expected}")
    return listed


def _check_progress(progress: Any) -> None:
    # Else it would fail in the middle of the work.
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}; expected a function of two numbers, done and total")


def _check_message(index: int, message: Mapping[str, Any]) -> None:
    """What a message says stands in `content`, unless it has other keys that say it (`tool_calls`)."""
    required = {"role", "content"} if message.keys() <= {"role", "content"} else {"role"}
    if not required <= message.keys():
        raise ValueError(f"message {index} has the keys {sorted(message)}; expected role and content")
    for field in ("role", "content"):
        value = message.get(field)
        if not isinstance(value, str) and (field in required or value is not None):
            raise TypeError(f"the {field} of message {index} is a {type(value).__name__}; expected a text")


def _json(name: str, value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"the {name} hold what JSON cannot: {error}") from None
