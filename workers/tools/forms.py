"""The forms in which models write calls of tools, as their chat templates have them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CallForm:
    """One form; a call is a JSON object of a name and of arguments in it, unless a ``head`` names it.

    Attributes:
        opens: what stands before the first call, or before each that ``closes`` ends.
        closes: what stands behind each.
        between: what else may stand around calls, a character each.
        arguments: how the arguments are called.
        bare: a reply that begins with a call has nothing before it.
        head: what stands before the arguments of a call, as an expression whose group is the tool's name.
        decides: the character with which it is certain whether that is one.
        marks: what is text of a call beside ``opens``, also where the tokenizer calls it special.
        parameters: they are written one by one, see ``workers.tools.parameters``.
    """

    name: str
    opens: str
    closes: str = ""
    between: str = ""
    arguments: str = "arguments"
    bare: bool = False
    head: str = ""
    decides: str = ""
    marks: tuple[str, ...] = ()
    parameters: bool = False


# Of Hermes, Qwen and many others.
HERMES = CallForm("hermes", "<tool_call>", "</tool_call>")
LLAMA = CallForm("llama", "<|python_tag|>", between=";", arguments="parameters", bare=True)
MISTRAL = CallForm("mistral", "[TOOL_CALLS]", between="[,]")
# Of Mistral's newer models, some of which give each call a name.
MISTRAL_ARGS = CallForm(
    "mistral-args",
    "[TOOL_CALLS]",
    head=r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?\[ARGS\]\s*(?=\{)",
    decides="{",
    marks=("[ARGS]", "[CALL_ID]"),
)
# Of Qwen's newer models, those for code first.
QWEN_CODER = CallForm(
    "qwen-coder",
    "<tool_call>",
    "</tool_call>",
    head=r"\s*<function=([\w.-]+)>",
    decides=">",
    parameters=True,
)
FORMS = {form.name: form for form in (HERMES, LLAMA, MISTRAL, MISTRAL_ARGS, QWEN_CODER)}
# What gives a form away, in a template or in what llama's writes itself; the first that is there.
MARKS = {
    "[ARGS]": MISTRAL_ARGS,
    "<parameter=": QWEN_CODER,
    HERMES.opens: HERMES,
    MISTRAL.opens: MISTRAL,
    LLAMA.opens: LLAMA,
    '"parameters": ': LLAMA,
}
# Of others, whose parameters are not named so.
OTHER = "<function="


def form_of(template: str) -> CallForm | None:
    """The form of the calls that a chat template writes; None: it writes none that is known here."""
    form = next((form for mark, form in MARKS.items() if mark in template), None)
    return None if OTHER in template and form is not QWEN_CODER else form
