"""The tensor operations that are worth a kernel of their own, and who carries them out."""

# What carries them out, by name; see ``choose_backend``.
BACKENDS = ("auto", "reference", "cpu")
