"""Renders a chat template in a process of its own, with little time and memory: it is a program that came with a file.

Run by chat_template.py, by path. Reads {"template", "conversations", "variables"} as JSON; prints a JSON list of texts,
null where the template raises.
"""

import datetime
import json
import sys

SECONDS, BYTES = 2, 1 << 30  # of a processor and of memory; a template needs a fraction
LONGEST = 100_000  # characters of a rendered text


def limit() -> None:
    """Bound what this process may use, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))


def environment():
    """jinja2's sandbox with what transformers offers in it."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, which marks answers and renders what is inside."""

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
        except Exception:  # whatever a template can raise: it does not take this form of messages
            text = None
        texts.append(text if text is not None and len(text) <= LONGEST else None)
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
