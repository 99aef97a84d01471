"""The forms in which models write calls of tools, as their chat templates have them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallForm:
    """One form; a call is a JSON object of a name and of arguments in it.

    Attributes:
        opens: what stands before the first call, or before each that ``closes`` ends.
        closes: what stands behind each.
        between: what else may stand around calls, a character each.
        arguments: how the arguments are called.
        bare: a reply that begins with a call has nothing before it.
    """

    name: str
    opens: str
    closes: str = ""
    between: str = ""
    arguments: str = "arguments"
    bare: bool = False


# Of Hermes, Qwen and many others.
HERMES = CallForm("hermes", "<tool_call>", "</tool_call>")
LLAMA = CallForm("llama", "<|python_tag|>", between=";", arguments="parameters", bare=True)
MISTRAL = CallForm("mistral", "[TOOL_CALLS]", between="[,]")
FORMS = {form.name: form for form in (HERMES, LLAMA, MISTRAL)}
# What gives a form away, in a template or in what llama's writes itself.
MARKS = {HERMES.opens: HERMES, MISTRAL.opens: MISTRAL, LLAMA.opens: LLAMA, '"parameters": ': LLAMA}
# Of newer models, whose calls are not JSON from end to end.
OTHERS = ("[ARGS]", "<function=")


def form_of(template: str) -> CallForm | None:
    """The form of the calls that a chat template writes; None: it writes none that is known here."""
    if any(mark in template for mark in OTHERS):
        return None
    return next((form for mark, form in MARKS.items() if mark in template), None)
