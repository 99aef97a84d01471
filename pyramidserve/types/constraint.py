"""What a reply must be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constraint:
    """What the text of a reply must be, from its beginning to its end-of-sequence token.

    Attributes:
        kind: "json_schema"; "regex", in Rust's syntax; or "grammar", in Lark's as llguidance has it.
        text: the schema, the expression or the grammar; at most 65,536 characters.
    """

    kind: str
    text: str
