"""Script that renders a chat template, an untrusted Jinja program, under limits on time and memory.

chat_template.py runs it by path in a subprocess. stdin: {"template", "conversations", "variables"} as JSON; stdout: a
JSON list of texts, null where the template raises. Jinja2 is imported under the limits.
"""

import datetime
import json
import sys

SECONDS, BYTES = 2, 1 << 30  # limits on processor time and memory; templates need a fraction
LONGEST = 100_000  # characters of a rendered text


def limit() -> None:
    """Limit processor time and memory of this process, on systems that support it."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def environment():
    """Return Jinja's sandbox with the extensions that transformers provides."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks answers and renders its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def main() -> None:
    work = json.loads(sys.stdin.buffer.read())
    limit()
    template = environment().from_string(work["template"])
    texts = []
    for messages in work["conversations"]:
        try:
            text = template.render(messages=messages, add_generation_prompt=True, **work["variables"])
        except Exception:  # a template can raise anything for messages of a form that it does not support
            text = None
        texts.append(text if text is not None and len(text) <= LONGEST else None)
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
