"""Cases for the openai package: `suite.py BASE_URL CASE...`. Works with versions 1 and 3. A case that fails ends it."""

import sys
import time

import openai

BASE = sys.argv[1]
client = openai.OpenAI(base_url=BASE + "/v1", api_key="unused", max_retries=0)
HI = [{"role": "user", "content": "What do bees make?"}]
SURE = {"model": "tinybee", "messages": HI, "temperature": 0, "max_tokens": 20}


def raised(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def chat():
    answer = client.chat.completions.create(**SURE)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == "Bees make honey.", answer
    assert choice.finish_reason == "stop" and choice.index == 0 and choice.logprobs is None
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == "tinybee"
    assert abs(answer.created - time.time()) < 60 and answer.system_fingerprint.startswith("rbee-")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens > 2
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert answer._request_id


def stream():
    whole = client.chat.completions.create(**SURE)
    chunks = list(client.chat.completions.create(**SURE, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:] if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop" and not any(reasons[:-1]), reasons
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    with client.chat.completions.with_streaming_response.create(**SURE, stream=True) as raw:
        headers = raw.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8", headers
        assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no" and headers["x-request-id"]
        assert all(chunk.get("usage", "absent") == "absent" for chunk in events(raw))


def events(raw):
    import json

    for line in raw.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


def choices():
    story = [{"role": "user", "content": "Tell me a story."}]
    asked = dict(model="tinybee", messages=story, n=3, max_tokens=30, seed=5, temperature=1.5)
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts, ends = ["", "", ""], [0, 0, 0]
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices] and ends == [1, 1, 1], (texts, ends)
    assert len(set(texts)) > 1


def parameters():
    create = client.chat.completions.create
    short = create(model="tinybee", messages=HI, max_completion_tokens=2, temperature=0)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2
    stopped = create(**SURE, stop=["honey"])
    assert stopped.choices[0].message.content == "Bees make " and stopped.choices[0].finish_reason == "stop", stopped
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(**SURE, stop="honey", stream=True)]
    assert "".join(pieces) == "Bees make ", pieces
    parts = [{"role": "user", "content": [{"type": "text", "text": "What do bees make?"}]}]
    assert create(**{**SURE, "messages": parts}).choices[0].message.content == "Bees make honey."
    roles = [{"role": "developer", "content": "Be brief."}, *HI]
    assert create(**{**SURE, "messages": roles}).choices[0].message.content
    back = create(**SURE).choices[0].message.model_dump()
    assert create(**{**SURE, "messages": [*HI, back, *HI]}).choices[0].message.content
    biased = create(**SURE, logit_bias={"300": 100}, extra_body={"min_tokens": 4, "ignore_eos": True})
    assert biased.usage.completion_tokens == 20, biased
    seeds = [create(model="tinybee", messages=HI, seed=-7, max_tokens=8).choices[0].message.content for _ in range(2)]
    assert seeds[0] == seeds[1]
    ranges = dict(temperature=1.5, top_p=0.5, presence_penalty=1.0, frequency_penalty=-1.0)
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    assert create(model="tinybee", messages=HI, max_tokens=4, extra_body=extra, **ranges).choices[0].message.content


def logprobs():
    answer = client.chat.completions.create(**SURE, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert content[0].logprob <= 0 and len(content[0].top_logprobs) == 2
    assert content[0].top_logprobs[0].token == content[0].token and content[0].bytes == list(content[0].token.encode())
    streamed = client.chat.completions.create(**SURE, logprobs=True, top_logprobs=2, stream=True)
    tokens = [one for chunk in streamed for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    assert [one.logprob for one in tokens] == [one.logprob for one in content]


def completions():
    create = client.completions.create
    asked = dict(model="tinybee", prompt="Once upon a time", temperature=0, max_tokens=8)
    one = create(**asked)
    assert one.object == "text_completion" and one.choices[0].text.startswith(", there was"), one
    assert one.choices[0].finish_reason == "length" and one.usage.completion_tokens == 8
    assert "".join(chunk.choices[0].text for chunk in create(**asked, stream=True)) == one.choices[0].text
    assert create(model="tinybee", prompt="Once", temperature=0).usage.completion_tokens == 16
    two = create(**{**asked, "prompt": ["Once upon a time", "Once upon a time"]}, n=1)
    assert [choice.text for choice in two.choices] == [one.choices[0].text] * 2 and two.usage.completion_tokens == 16
    lists = create(**asked, logprobs=2).choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.text_offset) == 8
    assert "".join(lists.tokens) == one.choices[0].text and lists.text_offset[1] == len(lists.tokens[0])
    ids = create(model="tinybee", prompt=[5, 6, 7], temperature=0, max_tokens=8)
    assert ids.usage.prompt_tokens == 3 and len(ids.choices) == 1, ids
    several = create(model="tinybee", prompt=[[5, 6, 7], [5, 6], [5, 6, 7]], temperature=0, max_tokens=8)
    assert [choice.text for choice in several.choices][::2] == [ids.choices[0].text] * 2 and len(several.choices) == 3
    assert several.usage.prompt_tokens == 8, several.usage
    error = raised(openai.BadRequestError, lambda: create(model="tinybee", prompt=[5, 10**6]))
    assert error.param == "prompt", error


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]


def tools(model):
    """A model that thinks, calls both tools, and answers when it is told what they said."""
    import json

    create = client.chat.completions.create
    asked = {"model": model, "messages": HI, "tools": TOOLS}
    choice = create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["get_weather", "get_time"] and calls[0].type == "function"
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"} and json.loads(calls[1].function.arguments) == {}
    assert choice.message.content == "Let me look." and choice.message.reasoning_content == "Two tools.", choice.message
    assert len({call.id for call in calls}) == 2 and all(len(call.id) == 9 for call in calls)

    chunks = list(create(**asked, stream=True))
    text = thought = ""
    names, arguments, ids = {}, {}, {}
    for delta in (chunk.choices[0].delta for chunk in chunks):
        text += delta.content or ""
        thought += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            assert (call.id is None) == (call.function.name is None)
            if call.id:
                assert call.index not in ids and call.type == "function"
                ids[call.index], names[call.index] = call.id, call.function.name
            arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    assert (text, thought) == ("Let me look.", "Two tools.")
    assert names == {0: "get_weather", 1: "get_time"} and list(arguments) == [0, 1]
    assert [json.loads(arguments[index]) for index in (0, 1)] == [{"city": "Paris"}, {}]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or [] if call.index == 0]
    assert len(parts) > 2, "arguments come while they are written"

    # The answer goes back as the SDK has it.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"} for call in calls]
    told = create(model=model, messages=[*HI, choice.message, *results], tools=TOOLS).choices[0]
    assert told.message.content == "Warm." and told.finish_reason == "stop" and not told.message.tool_calls

    one = create(**asked, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in one.message.tool_calls] == ["get_weather"]
    none = create(**asked, tool_choice="none").choices[0]
    assert none.message.content == "No tools here." and not none.message.tool_calls, none
    # What must be called is, though the model would rather do something else first.
    time_only = {"type": "function", "function": {"name": "get_time"}}
    plain = {"type": "function", "function": {"name": "get_time"}}
    for forced, offered in ((time_only, [TOOLS[0], plain]), ("required", [plain])):
        choice = create(model=model, messages=HI, tools=offered, tool_choice=forced, parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls" and not (choice.message.content or "").strip(), choice
        assert [call.function.name for call in choice.message.tool_calls] == ["get_time"], choice
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {}, choice
    unknown = {"type": "function", "function": {"name": "get_none"}}
    error = raised(openai.BadRequestError, lambda: create(**asked, tool_choice=unknown))
    assert error.param == "tool_choice" and "tool_choice" in error.message, error.body
    strict = [{"type": "function", "function": {**TOOLS[1]["function"], "strict": True}}]
    raw = client.chat.completions.with_raw_response.create(model=model, messages=HI, tools=strict)
    assert raw.headers["x-rbee-ignored"] == "tools.function.strict"


def forms():
    import json
    from typing import Literal

    import pydantic

    class Bee(pydantic.BaseModel):
        kind: Literal["worker", "queen"]
        legs: int = pydantic.Field(ge=0, le=20)
        busy: bool

    create = client.chat.completions.create
    asked = {"model": "tinybee", "messages": HI, "max_tokens": 200}
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["worker", "queen"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 20}},
        "required": ["kind", "legs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "bee", "schema": schema, "strict": True}}
    for seed in range(5):
        bee = json.loads(create(**asked, response_format=form, seed=seed).choices[0].message.content)
        assert set(bee) == {"kind", "legs"} and bee["kind"] in ("worker", "queen") and 0 <= bee["legs"] <= 20, bee
    chunks = list(create(**asked, response_format=form, seed=4, stream=True))
    assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == bee
    assert chunks[-1].choices[0].finish_reason == "stop"
    # The helper that makes the schema of a class and reads the answer back.
    parse = getattr(client.chat.completions, "parse", None) or client.beta.chat.completions.parse
    for seed in range(3):
        choice = parse(**asked, response_format=Bee, seed=seed).choices[0]
        assert isinstance(choice.message.parsed, Bee) and choice.finish_reason == "stop", choice
    some = create(**asked, response_format={"type": "json_object"}, seed=1).choices[0]
    assert some.message.content.startswith("{"), some
    if some.finish_reason == "stop":
        assert isinstance(json.loads(some.message.content), dict)
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "thing"}}}
    for streams in (False, True):
        error = raised(openai.BadRequestError, lambda: create(**asked, response_format=broken, stream=streams))
        assert error.param == "response_format" and "response_format" in error.message, error.body


def errors():
    create = client.chat.completions.create
    error = raised(openai.NotFoundError, lambda: create(model="no-such-model", messages=HI))
    assert error.code == "model_not_found" and error.param == "model" and error.type == "invalid_request_error", error.body
    error = raised(openai.NotFoundError, lambda: list(create(model="no-such-model", messages=HI, stream=True)))
    assert error.code == "model_not_found"
    error = raised(openai.BadRequestError, lambda: create(**{**SURE, "temperature": 9}))
    assert error.param == "temperature" and error.code == "invalid_request" and error.request_id, error.body
    long = [{"role": "user", "content": "bee " * 4000}]
    for streams in (False, True):
        error = raised(openai.BadRequestError, lambda: create(model="tinybee", messages=long, stream=streams))
        assert error.code == "context_length_exceeded", error.body
    refusals = dict(
        response_format={"type": "xml"}, tool_choice="required", audio={"voice": "x", "format": "wav"},
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    )
    for name, value in refusals.items():
        error = raised(openai.BadRequestError, lambda: create(**SURE, **{name: value}))
        assert error.param == name and name in error.message, error.body
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]
    assert raised(openai.BadRequestError, lambda: create(model="tinybee", messages=picture)).param == "messages"


def embeddings():
    create = client.embeddings.create
    # Asked for as base64 by the SDK itself.
    answer = create(model="tinybee", input=["Bees make honey.", "A fox ran.", "Bees make honey."])
    first, other, again = (item.embedding for item in answer.data)
    assert [item.index for item in answer.data] == [0, 1, 2] and answer.model == "tinybee" and answer.object == "list"
    assert first == again and first != other and len(first) > 32
    assert abs(sum(value * value for value in first) - 1) < 1e-4
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 6
    floats = create(model="tinybee", input="Bees make honey.", encoding_format="float").data[0].embedding
    assert floats == first, "both ways of writing a vector are the same vector"
    tokens = create(model="tinybee", input=[[5, 6, 7], [5, 6, 8]])
    assert len(tokens.data) == 2 and tokens.usage.prompt_tokens == 6
    many = create(model="tinybee", input=["bee"] * 100)
    assert len(many.data) == 100 and [item.index for item in many.data] == list(range(100))
    error = raised(openai.BadRequestError, lambda: create(model="tinybee", input="x", dimensions=3))
    assert error.param == "dimensions", error.body
    error = raised(openai.BadRequestError, lambda: create(model="tinybee", input=["fine", "bee " * 4000]))
    assert error.code == "context_length_exceeded", error.body
    assert raised(openai.NotFoundError, lambda: create(model="none", input="x")).code == "model_not_found"


def ignored():
    raw = client.chat.completions.with_raw_response.create(**SURE, user="me", extra_body={"zzz": 1})
    assert raw.headers["x-rbee-ignored"] == "user, zzz", raw.headers
    assert "x-rbee-ignored" not in client.chat.completions.with_raw_response.create(**SURE).headers
    strict = {"x-rbee-strict": "true"}
    error = raised(
        openai.BadRequestError,
        lambda: client.chat.completions.create(**SURE, extra_body={"zzz": 1}, extra_headers=strict),
    )
    assert error.param == "zzz"


def models():
    listed = [model.id for model in client.models.list()]
    assert "tinybee" in listed, listed
    one = client.models.retrieve("tinybee")
    assert one.id == "tinybee" and one.object == "model" and one.owned_by == "rbee" and one.created > 1.7e9
    assert raised(openai.NotFoundError, lambda: client.models.retrieve("org/none")).code == "model_not_found"


def metrics():
    """What the queen says to Prometheus is what Prometheus' own parser reads."""
    import urllib.request

    from prometheus_client.parser import text_string_to_metric_families

    client.chat.completions.create(**SURE)
    text = urllib.request.urlopen(BASE + "/metrics").read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["vllm:time_to_first_token_seconds"].type == "histogram", families.keys()
    assert families["vllm:generation_tokens"].type == "counter"
    assert families["vllm:num_requests_running"].type == "gauge"
    labels = [sample.labels["model_name"] for sample in families["vllm:e2e_request_latency_seconds"].samples]
    assert "tinybee" in labels


def waits():
    """The model loads for 20 s: neither form of the answer raises, with everything as the SDK has it by default."""
    patient = openai.OpenAI(base_url=BASE + "/v1", api_key="unused")
    chunks = patient.chat.completions.create(model="tinybee", messages=HI, max_tokens=4, stream=True)
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) == 4


def waits_whole():
    patient = openai.OpenAI(base_url=BASE + "/v1", api_key="unused")
    answer = patient.chat.completions.create(model="tinybee", messages=HI, max_tokens=4)
    assert answer.usage.completion_tokens == 4


def dies():
    """Somebody kills the worker in the middle of this answer."""

    def read():
        for chunk in client.chat.completions.create(model="tinybee", messages=HI, max_tokens=4000, stream=True):
            assert chunk.choices[0].finish_reason is None

    error = raised(openai.APIError, read)
    assert error.code == "worker_lost", (error, error.body)


def dies_whole():
    error = raised(
        openai.InternalServerError,
        lambda: client.chat.completions.create(model="tinybee", messages=HI, max_tokens=4000),
    )
    assert error.status_code == 502 and error.code == "worker_lost", error.body


def leaves():
    """Goes away in the middle; whoever runs this sees that nothing runs on."""
    stream = client.chat.completions.create(model="tinybee", messages=HI, max_tokens=60000, stream=True)
    for seen, _ in enumerate(stream):
        if seen == 3:
            break
    stream.close()
    short = openai.OpenAI(base_url=BASE + "/v1", api_key="unused", max_retries=0, timeout=0.5)
    raised(
        openai.APITimeoutError,
        lambda: short.chat.completions.create(model="tinybee", messages=HI, max_tokens=60000),
    )


for case in sys.argv[2:]:
    name, _, argument = case.partition("=")
    globals()[name](*filter(None, [argument]))
    print("ok", name, flush=True)
