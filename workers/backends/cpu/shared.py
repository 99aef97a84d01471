"""Numbers that Python and the kernels in C have in common: C is compiled with them as macros. Pure."""

from workers.budget.kv_format import KV_FORMATS
from workers.budget.pages import PAGE_TOKENS

# Tokens that one thread attends to at a time; a long sequence is shared among threads.
CHUNK = 256
# Values side by side in a vector.
LANES = 16
# What there is of a part of a sequence beside the sums of values: the sum of shares, the greatest logit.
PARTIAL = 2
# Rows of weights that are multiplied together.
COLUMNS = 4
# Formats of rows, by their names.
FORMATS = {name: number for number, name in enumerate(KV_FORMATS)}
MACROS = {
    "PAGE_TOKENS": PAGE_TOKENS,
    "CHUNK": CHUNK,
    "LANES": LANES,
    "PARTIAL": PARTIAL,
    "COLUMNS": COLUMNS,
    **{name.upper(): number for name, number in FORMATS.items()},
}
