"""Which of a tenant's requests go first."""

from typing import Literal

Priority = Literal["high", "normal", "low"]
