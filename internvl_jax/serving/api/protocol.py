"""OpenAI's API as this server speaks it. Unknown fields are errors; null stands for the default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from internvl_jax.serving.requests import TOP_LOGPROBS
from internvl_jax.serving.structured import Grammar

MAX_STOPS = 4
MAX_TOKENS = 2**31 - 1


class Body(BaseModel):
    """What all objects of the API share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where an image is: a data: URI, or an https URL if the server fetches images."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = False


class JsonSchema(Body):
    """A JSON schema and its name."""

    name: str
    content: dict[str, Any] = Field(alias="schema")
    description: str = ""
    strict: bool = True


class ResponseFormat(Body):
    """The form of an answer: text, a JSON object, or what a JSON schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError('json_schema belongs to the type "json_schema", which needs it')
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the engine takes."""
        if self.type == "text":
            return None
        return Grammar(json_schema={"type": "object"} if self.json_schema is None else self.json_schema.content)


class StructuredOutputs(Body):
    """The form of an answer as vLLM names it: one of these."""

    schema_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None

    @property
    def grammar(self) -> Grammar:
        """What the engine takes. Raises ValueError unless exactly one field is given."""
        return Grammar(self.schema_, self.regex, None if self.choice is None else tuple(self.choice))


class Sampling(Body):
    """What chat completions and completions share.

    top_k, min_tokens and repetition_penalty are not OpenAI's; they are named as in vLLM.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=MAX_TOKENS)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    seed: int | None = Field(None, ge=0, le=MAX_TOKENS)
    stop: str | list[str] = Field(default_factory=list)
    structured_outputs: StructuredOutputs | None = None
    user: str = ""
    metadata: dict[str, str] = Field(default_factory=dict)
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise ValueError(f"stop takes at most {MAX_STOPS} strings, none of them empty")
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.structured_outputs is not None:
            _ = self.structured_outputs.grammar  # raises for none or several
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must look like."""
        return None if self.structured_outputs is None else self.structured_outputs.grammar

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; None: what there is room for."""
        return self.max_tokens


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=TOP_LOGPROBS)
    response_format: ResponseFormat = ResponseFormat(type="text")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.structured_outputs is not None and self.response_format.type != "text":
            raise ValueError("response_format and structured_outputs: give one of them")
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must look like."""
        return self.response_format.grammar or super().grammar

    @property
    def limit(self) -> int | None:
        """Longest answer in tokens; None: what there is room for."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None: no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Sampling):
    """POST /v1/completions: a prompt as it is, without the conversation template."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=TOP_LOGPROBS)
    echo: Literal[False] = False

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None: no log-probabilities."""
        return self.logprobs


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation."""

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str = ""
    tokens: list[Annotated[int, Field(ge=0)]]
