"""The tensor operations that are worth a kernel of their own, and who carries them out."""
