"""Holds bodies against an OpenAPI document: stdin has `{document, bodies: [{what, schema, body}]}`, where `schema` is a pointer
into the document. The document itself has to be one."""

import json
import sys

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate


def close(document):
    """Lets no object have a property that its schema does not name."""
    schemas = document["components"]["schemas"]
    joined = set()

    def walk(schema):
        if isinstance(schema, list):
            for one in schema:
                walk(one)
        if not isinstance(schema, dict):
            return
        if schema.get("type") == "object" and "properties" in schema:
            if "$ref" in schema:
                joined.add(schema["$ref"].split("/")[-1])
                schema["unevaluatedProperties"] = False
            else:
                schema.setdefault("additionalProperties", False)
        for one in list(schema.values()):
            walk(one)

    walk(schemas)
    for name in joined:
        # Its object has the properties beside the reference too.
        schemas[name].pop("additionalProperties", None)


told = json.load(sys.stdin)
document = told["document"]
validate(document)
close(document)
validators = {}
wrong = 0
for one in told["bodies"]:
    pointer = one["schema"]
    if pointer not in validators:
        validators[pointer] = Draft202012Validator({**document, "$ref": "#" + pointer})
    for error in validators[pointer].iter_errors(one["body"]):
        wrong += 1
        deepest = error
        while deepest.context:
            deepest = max(deepest.context, key=lambda inner: len(inner.absolute_path))
        print(f"{one['what']} ({pointer}) at {list(deepest.absolute_path)}: {deepest.message[:300]}", file=sys.stderr)
if wrong:
    sys.exit(1)
print(len(told["bodies"]), "bodies")
