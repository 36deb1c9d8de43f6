"""Requests, parsed and checked as vLLM does; prepared answer schemas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from ..core.images import IMAGE_PART, is_image, read_media_type
from ..core.schemas import open_validator
from .json_schema import PARAM, ValueGenerator, check_keywords
from .values import (
    ApiError,
    SeededRandom,
    TextMaker,
    compile_pattern,
    count_chat_tokens,
    count_text_tokens,
    hash_parts,
)

_TRIES: Final = 20


class AnswerSchema:
    """JSON Schema that the fleet can answer.

    Each drawn value is validated; a draw that fails (for example two branches of a ``oneOf`` that
    both match) is repeated, and a schema that no draw satisfies is refused.

    Args:
        schema: A JSON Schema.

    Raises:
        ApiError: 400: not a JSON Schema, or one with an unsupported keyword.
    """

    def __init__(self, schema: Any) -> None:
        try:
            self._validator = open_validator(schema, formats=True)
        except ValueError as why:  # all errors of jsonschema-rs are ValueErrors
            raise ApiError(f"Invalid JSON schema: {why}", param=PARAM) from why
        check_keywords(schema)
        self.schema = schema

    def accepts(self, value: Any) -> bool:
        """Return True if a JSON value validates, formats included."""
        return self._validator.is_valid(value)

    def draw(self, key: bytes) -> Any:
        """Draw a conforming value; equal keys give equal values.

        Raises:
            ApiError: The generator finds no value that the schema allows.
        """
        for attempt in range(_TRIES):
            value = ValueGenerator(self.schema, SeededRandom(hash_parts(key, attempt))).draw(
                self.schema
            )
            if self._validator.is_valid(value):
                return value
        raise ApiError("No answer that conforms to the JSON schema was found.", param=PARAM)

    def draw_invalid(self, key: bytes) -> Any:
        """Draw a value that does not conform, as from a model that ignores its instructions.

        Args:
            key: Equal keys give equal values.

        Returns:
            The conforming value without one field if that breaks the schema, otherwise an
            entirely different one.

        Raises:
            ApiError: The schema accepts everything.
        """
        value = self.draw(key)
        less = (
            [{k: v for k, v in value.items() if k != name} for name in value]
            if (isinstance(value, dict))
            else []
        )
        for wrong in [*less, {"answer": None}, "not what was asked", None, [None], 0.5]:
            if not self._validator.is_valid(wrong):
                return wrong
        raise ApiError("The JSON schema accepts everything; no answer breaks it.", param=PARAM)


class SchemaCache:
    """Schemas by their text, since a run uses the same one again and again.

    Args:
        size: Number of schemas to keep.
    """

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._ready: dict[bytes, AnswerSchema] = {}

    def get(self, schema: Any) -> AnswerSchema:
        """Return the prepared schema; the same object for the same text.

        Raises:
            ApiError: See `AnswerSchema`.
        """
        text = orjson.dumps(schema)
        found = self._ready.get(text)
        if found is None:
            if len(self._ready) >= self._size:
                del self._ready[next(iter(self._ready))]
            found = self._ready[text] = AnswerSchema(schema)
        return found


_RANGES: Final = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Required form of an answer; at most one attribute is set.

    Attributes:
        schema: JSON Schema that the answer must satisfy.
        choices: Texts, one of which the answer must be.
        pattern: Generator of texts that match the regular expression.
        tool: Name of the function that must be called; ``schema`` describes its arguments.
    """

    schema: AnswerSchema | None = None
    choices: tuple[str, ...] = ()
    pattern: TextMaker | None = None
    tool: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One parsed request.

    Attributes:
        key: Identity of the question: fleet's seed, model, messages, form, body's seed.
            Neither node nor attempt is part of it.
        messages: The conversation; a bare prompt becomes one user message.
        prompt_tokens: Length of the conversation.
        form: Required form of the answer.
        max_tokens: Maximum of output tokens, clamped to the context.
        stop: Texts that end the answer.
        chat: Whether it is a chat completion, not a bare completion.
        stream: Whether the answer is streamed.
        include_usage: Whether the stream ends with a usage chunk.
        tools: The functions that may be called, as described in the request.
        logprobs: Whether the log probabilities of the answer's tokens are asked for.
        sampled: Whether equal questions get different answers: a temperature above 0 and no seed.
    """

    key: bytes
    messages: list[dict[str, Any]]
    prompt_tokens: int
    form: AnswerForm
    max_tokens: int
    stop: tuple[str, ...]
    chat: bool
    stream: bool
    include_usage: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    logprobs: bool = False
    sampled: bool = False

    def draw(self, number: int) -> Question:
        """Return the question for the answer with a number, from 0: the next draw if sampled."""
        if not self.sampled or not number:
            return self
        return replace(self, key=hash_parts(self.key, "draw", number))

    @property
    def first_round(self) -> bool:
        """Whether the conversation has no assistant message yet."""
        return all(message.get("role") != "assistant" for message in self.messages)


class QuestionReader:
    """Parser of request bodies.

    Args:
        model: The served model.
        seed: The fleet's seed, part of every key.
    """

    def __init__(self, model: str, seed: int) -> None:
        self._model = model
        self._seed = seed
        self._schemas = SchemaCache()

    def read(self, body: bytes, chat: bool, max_model_len: int) -> Question:
        """Parse a request.

        Args:
            body: The request's body.
            chat: Whether it came to ``/v1/chat/completions``.
            max_model_len: The node's context length in tokens.

        Raises:
            ApiError: 400 or 404, as from vLLM.
        """
        data = load_object(body)
        self.check_model(data)
        _check_ranges(data)
        messages = _messages(data) if chat else [{"role": "user", "content": _prompt(data)}]
        tokens = count_chat_tokens(messages) if chat else count_text_tokens(messages[0]["content"])
        limit = _limit(data, tokens, max_model_len)
        stop = data.get("stop") or ()
        asked = [messages, *(data.get(k) for k in _KEYED)]
        return Question(
            key=hash_parts(
                self._seed, self._model, orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
            ),
            messages=messages,
            prompt_tokens=tokens,
            form=self._form(data),
            max_tokens=limit,
            stop=(stop,) if isinstance(stop, str) else tuple(map(str, stop)),
            chat=chat,
            stream=bool(data.get("stream")),
            include_usage=bool((data.get("stream_options") or {}).get("include_usage")),
            tools=_offered_tools(data) if chat else (),
            logprobs=chat and data.get("logprobs") is True,
            sampled=bool(data.get("temperature")) and data.get("seed") is None,
        )

    def check_model(self, data: Mapping[str, Any]) -> None:
        """Refuse a model that is not served; a missing model means the served one.

        Raises:
            ApiError: 404.
        """
        model = data.get("model") or self._model
        if model != self._model:
            text = f"The model `{model}` does not exist."
            raise ApiError(text, 404, "NotFoundError", "model")

    def _form(self, data: Mapping[str, Any]) -> AnswerForm:
        tool = _forced_tool(data)
        if tool is not None:
            schema = tool.get("parameters") or {"type": "object", "additionalProperties": False}
            return AnswerForm(self._schemas.get(schema), tool=str(tool.get("name")))
        if structured := data.get("structured_outputs"):
            return self._structured(structured)
        wanted = data.get("response_format") or {"type": "text"}
        match wanted.get("type"):
            case "json_schema":
                return AnswerForm(
                    self._schemas.get((wanted.get("json_schema") or {}).get("schema", {}))
                )
            case "json_object":
                return AnswerForm(self._schemas.get(_SMALL_OBJECT))
            case "text":
                return AnswerForm()
            case other:
                raise ApiError(f"Unknown response format {other!r}.", param="response_format")

    def _structured(self, wanted: Mapping[str, Any]) -> AnswerForm:
        kinds = [kind for kind in _STRUCTURED if wanted.get(kind) not in (None, False)]
        if len(kinds) != 1:
            raise ApiError(
                "You must use exactly one kind of structured outputs constraint.",
                param="structured_outputs",
            )
        match kinds[0]:
            case "json":
                schema = wanted["json"]
                return AnswerForm(self._schemas.get(_parse_schema(schema)))
            case "json_object":
                return AnswerForm(self._schemas.get(_SMALL_OBJECT))
            case "choice" if wanted["choice"]:
                return AnswerForm(choices=tuple(map(str, wanted["choice"])))
            case "regex":
                return AnswerForm(pattern=compile_pattern(wanted["regex"]))
            case kind:
                raise ApiError(
                    f"structured_outputs.{kind} cannot be simulated.", param="structured_outputs"
                )


_KEYED: Final = (*("response_format", "structured_outputs", "tools", "tool_choice", "seed"),)
_STRUCTURED: Final = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_SMALL_OBJECT: Final = {
    "type": "object",
    "properties": {"answer": {"type": "string"}, "score": {"type": "number", "maximum": 1}},
    "required": ["answer"],
}


def load_object(body: bytes) -> dict[str, Any]:
    """Parse a request's body.

    Raises:
        ApiError: 400: not a JSON object.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"JSON decode error: {error}") from error
    if not isinstance(data, dict):
        raise ApiError("Input should be a valid dictionary")
    return data


def _parse_schema(schema: Any) -> Any:
    return load_object(schema.encode()) if isinstance(schema, str) else schema


def _messages(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = data.get("messages")
    if not isinstance(messages, list):
        raise ApiError(f"'{type(messages).__name__}' object is not iterable")
    if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ApiError("messages must be a list of objects with a role", param="messages")
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if is_image(part):
                _check_image(part)
    return messages


def _check_image(part: Mapping[str, Any]) -> None:
    """Refuse what is no image; those of other servers are accepted without a look."""
    held = part.get(IMAGE_PART)
    url = held.get("url") if isinstance(held, Mapping) else None
    if isinstance(url, str) and url.startswith(("http://", "https://")):
        return
    if not isinstance(url, str) or read_media_type(url) is None:
        raise ApiError("Failed to load image: cannot identify image file", param="messages")


def _prompt(data: Mapping[str, Any]) -> str:
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError("the simulated fleet takes one prompt, a text", param="prompt")
    return prompt


def _check_ranges(data: Mapping[str, Any]) -> None:
    for name, (low, high) in _RANGES.items():
        value = data.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ApiError(f"{name} must be a number", param=name)
        if value < low or (high is not None and value > high):
            bounds = f"in [{low}, {high}]" if high is not None else "non-negative"
            raise ApiError(f"{name} must be {bounds}, got {value}.", param=name)
    if data.get("n") not in {None, 1}:
        raise ApiError("the simulated fleet gives one choice per request", param="n")


def _limit(data: Mapping[str, Any], prompt_tokens: int, max_model_len: int) -> int:
    """Return the limit of output tokens, clamped silently to the context, as in vLLM."""
    if prompt_tokens > max_model_len:
        raise ApiError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {prompt_tokens} input tokens. Please reduce the length of the input prompt.",
            param="input_tokens",
        )
    name = "max_tokens" if data.get("max_completion_tokens") is None else "max_completion_tokens"
    asked = data.get(name)
    if asked is None:
        return max_model_len - prompt_tokens
    if not isinstance(asked, int) or asked < 1:
        raise ApiError(f"{name} must be at least 1, got {asked}.", param=name)
    if asked > max_model_len:
        raise ApiError(
            f"{name}={asked} cannot be greater than max_model_len={max_model_len}.", param=name
        )
    return min(asked, max_model_len - prompt_tokens)


def _offered_tools(data: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the functions that may be called."""
    choice = data.get("tool_choice")
    wanted = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    tools = [dict(tool.get("function", {})) for tool in data.get("tools") or ()]
    return tuple(tool for tool in tools if choice != "none" and wanted in {None, tool.get("name")})


def _forced_tool(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the function that must be called, if any; of several, the first."""
    choice = data.get("tool_choice")
    if choice in {None, "none", "auto"} if not isinstance(choice, dict) else False:
        return None
    fitting = _offered_tools(data)
    if not fitting:
        raise ApiError("tool_choice names no function of tools", param="tool_choice")
    return fitting[0]
