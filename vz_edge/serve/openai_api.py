"""OpenAI's chat completions, as far as they can be answered here: strict requests, and what goes back.

The form is that of https://platform.openai.com/docs/api-reference/chat. Types are not coerced and unknown fields are
refused. Fields of OpenAI's that cannot change an answer are taken and ignored; those that could, and are not
supported, are taken only with the value that changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

MOST_MESSAGES, MOST_PARTS, MOST_STOPS = 256, 64, 4
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Strict(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _form_of(value: Any) -> str | None:
    """Which of the forms in JSON a value has, so that what is wrong is told of that one."""
    forms: tuple[tuple[type, str], ...] = ((str, "string"), (list, "list"), (dict, "object"))
    return next((name for kind, name in forms if isinstance(value, kind)), None)


def _either_form(expected: str) -> Discriminator:
    return Discriminator(_form_of, custom_error_type="form", custom_error_message=f"expected {expected}")


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """A piece of an earlier answer that refused to answer; it is text as any other."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Strict):
    """A picture, as a data URL or a web address. ``detail`` is ignored: the bundle's token budget decides."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """A picture between the texts. The URL alone, as a string, is no form of OpenAI's, and usual elsewhere."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("string")] | Annotated[ImageUrl, Tag("object")], _either_form('{"url": ...}, or the URL')
    ]

    @property
    def url(self) -> str:
        """The picture's URL, in whichever form it came."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS)]
UserParts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1, max_length=MOST_PARTS)
]
AnswerParts = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]], Field(min_length=1, max_length=MOST_PARTS)
]
STRING_OR_PARTS = _either_form("a string, or a list of parts")


class Named(Strict):
    """A message. ``name`` tells participants of one role apart; it is ignored: chat templates have no place for it."""

    name: str | None = None


class SystemMessage(Named):
    """What the model is told first."""

    role: Literal["system", "developer"]
    content: Annotated[Annotated[str, Tag("string")] | Annotated[TextParts, Tag("list")], STRING_OR_PARTS]


class UserMessage(Named):
    """A question, with its pictures."""

    role: Literal["user"]
    content: Annotated[Annotated[str, Tag("string")] | Annotated[UserParts, Tag("list")], STRING_OR_PARTS]


class AssistantMessage(Named):
    """An earlier answer, as this server or OpenAI's client wrote it down; one that refused has no content."""

    role: Literal["assistant"]
    content: Annotated[Annotated[str, Tag("string")] | Annotated[AnswerParts, Tag("list")], STRING_OR_PARTS] | None = (
        None
    )
    refusal: str | None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class NamedSchema(Strict):
    """A JSON schema that the answer has to follow. It is always followed strictly."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    # Python's name for it is taken by pydantic.
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None

    @field_validator("json_schema")
    @classmethod
    def no_guidance(cls, schema: dict[str, Any]) -> dict[str, Any]:
        """Refuse the one key with which a schema could tell llguidance more than what an answer is."""
        if "x-guidance" in schema:
            raise ValueError("x-guidance is no part of a JSON schema")
        return schema


class TextFormat(Strict):
    """The answer is text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """The answer is any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """The answer follows a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StreamOptions(Strict):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Unsupported(Strict):
    """Fields of OpenAI's that are taken only where they change no answer."""

    n: Annotated[int, Field(ge=1, le=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None


class ChatRequest(Unsupported):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    logprobs: bool | None = None

    # vz-edge's own: one of the bundle's token budgets for each picture, by its total.
    tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    # Taken, and ignored: they change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None


class TokenLogprob(BaseModel):
    """A token of the answer; ``bytes`` is None where it is no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any] = []


class Logprobs(BaseModel):
    """The tokens of the answer, the stop token included."""

    content: list[TokenLogprob]
    refusal: None = None


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those that did not have to be read, and the pictures' (which OpenAI does not tell)."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens; the pictures' are prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(BaseModel):
    """vz-edge's own: seconds that the answer took, the wait in the queue not counted."""

    preprocess_sec: float
    vision_sec: float
    prefill_sec: float
    decode_sec: float


FinishReason = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one choice there is."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A whole answer; ``created`` is in seconds since 1970."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings


class ChunkChoice(BaseModel):
    """What a chunk adds to the one choice there is: ``delta`` has a role, a piece of content, or nothing."""

    index: Literal[0] = 0
    delta: dict[str, str]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["vz-edge"] = "vz-edge"


class ModelList(BaseModel):
    """The models that can be asked: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether questions are answered."""

    status: Literal["ok"] = "ok"
