"""What was measured and trained of models: how their layers share a budget, and their gates."""

from pathlib import Path

from workers.policies.budget import MEASURED, read_calibration
from workers.policies.gates import Gates, read_gates

# By the models' fingerprints; what comes with this, and what deployments name.
CALIBRATIONS = {each.model: each for each in map(read_calibration, sorted(MEASURED.glob("*.json")))}
GATES = {each.model: each for each in map(read_gates, sorted(MEASURED.glob("*.safetensors")))}


def use_budgets(file: str) -> None:
    """Takes in what ``pyramidserve calibrate`` has written; "": nothing. Raises ConfigurationError."""
    if file:
        calibration = read_calibration(Path(file))
        CALIBRATIONS[calibration.model] = calibration


def use_gates(file: str) -> None:
    """As ``use_budgets``, of the gates that it has trained."""
    if file:
        gates = read_gates(Path(file))
        GATES[gates.model] = gates


def gates_of(model: str) -> Gates | None:
    """The gates that were trained of a ``model``, a fingerprint."""
    return GATES.get(model)
